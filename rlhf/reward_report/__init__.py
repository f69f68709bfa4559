"""What a reward model is worth, as data and as a table: rlhf.reward_report.write.write_report."""
