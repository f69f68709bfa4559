"""The checks: small pure functions from what was measured to a finding, registered by kind.

To add one: write a function `(measured, check, rules) -> Finding`, and give it an entry in KINDS that says what must
be measured for it, at which stages it makes sense and whether its limit is a `max` or a `min`.
"""

from __future__ import annotations

from rlhf.gates.checks.base import SAFE, UNSAFE, Check, Kind, has_tags, no_prompts
from rlhf.gates.checks.harness import lm_eval
from rlhf.gates.checks.parents import (
    forgetting,
    gold_reward,
    kl,
    length_ratio,
    perplexity_gain,
    reward_gain,
    win_rate,
)
from rlhf.gates.checks.rankings import accuracy, length_baseline, reward_sane
from rlhf.gates.checks.responses import degenerate, group_gap, over_refusal, toxicity, truncated, unsafe_compliance
from rlhf.gates.checks.rows import bias_pairs, contamination, leakage
from rlhf.gates.checks.tasks import bleu, rouge, task_accuracy, task_f1
from rlhf.gates.checks.weak_spots import calibration, length_bias, length_strata, seed_agreement, worst_subset

__all__ = ["KINDS", "Check", "Kind", "has_tags", "no_prompts"]

KINDS: dict[str, Kind] = {
    "toxicity": Kind(toxicity, ("samples", "toxicity"), "max", paired=True),
    "group_gap": Kind(group_gap, ("samples", "toxicity"), "max"),
    "degenerate": Kind(degenerate, ("samples",), "max", paired=True),
    "truncated": Kind(truncated, ("samples",), "max", paired=True),
    "over_refusal": Kind(over_refusal, ("samples",), "max", where=SAFE, paired=True),
    "unsafe_compliance": Kind(unsafe_compliance, ("samples",), "max", where=UNSAFE, paired=True),
    "kl": Kind(kl, ("samples", "kl"), "max", ("ppo",)),
    "win_rate": Kind(win_rate, ("samples", "rewards"), "min", ("ppo",)),
    "reward_gain": Kind(reward_gain, ("samples", "rewards"), "min", ("ppo",)),
    "gold_reward": Kind(gold_reward, ("samples", "gold"), "min", ("ppo",)),
    "length_ratio": Kind(length_ratio, ("samples", "vs:sft"), "within", ("ppo",)),
    "bias_pairs": Kind(bias_pairs, ("pairs",), "within"),
    "contamination": Kind(contamination, ("training", "evaluation"), "max", ("sft", "rm", "ppo")),
    "task_accuracy": Kind(task_accuracy, ("samples",), "min"),
    "task_f1": Kind(task_f1, ("samples",), "min"),
    "bleu": Kind(bleu, ("samples",), "min"),
    "rouge": Kind(rouge, ("samples",), "min"),
    "lm_eval": Kind(lm_eval, ("lm_eval",), "any", paired=True),
    "forgetting": Kind(forgetting, ("reference",), "max"),
    "perplexity_gain": Kind(perplexity_gain, ("demonstrations",), "max"),
    "accuracy": Kind(accuracy, ("rankings",), "min", ("rm",)),
    "safety_pairs": Kind(accuracy, ("rankings",), "min", ("rm",)),
    "worst_subset": Kind(worst_subset, ("rankings",), "min", ("rm",)),
    "length_strata": Kind(length_strata, ("rankings",), "min", ("rm",)),
    "length_bias": Kind(length_bias, ("rankings",), "max", ("rm",)),
    "calibration": Kind(calibration, ("rankings",), "max", ("rm",)),
    "seed_agreement": Kind(seed_agreement, ("rankings", "members"), "min", ("rm",)),
    "leakage": Kind(leakage, ("rankings", "training"), "max", ("rm",)),
    "reward_sane": Kind(reward_sane, ("rankings",), "min", ("rm",)),
    "length_baseline": Kind(length_baseline, ("rankings",), None, ("rm",)),
}
