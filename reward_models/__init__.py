"""What PPO can be paid by: each file one class with `score(prompts, responses, rows)`."""
