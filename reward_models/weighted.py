"""Several rewards, each in its own standard deviations, added with weights.

    python -m rlhf stage=ppo reward=weighted +reward.parts.short._target_=reward_models.function.FunctionReward \\
        +reward.parts.short.function=my_package.shortness +reward.parts.short.weight=0.2

A part is a node like `reward` with a `weight`. A reward model among the parts is normalised with the mean and std that
its artifact stores; what stores none is taken as it is. Each part's mean is logged as `reward/parts/<name>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.adapters import SharedBase
from rlhf.errors import ConfigError
from rlhf.rewards import build_reward, part_scores


class WeightedSum:
    """The sum of weight * (score - mean) / std over the parts; one number a response.

    parts: by name, nodes with `_target_`, `weight` and the arguments of the target.
    artifact: the reward model of a part that names none; PPO gives that of the run.
    trust_remote_code, shared_base: given by PPO, for the parts that take them.
    """

    mean, std = 0.0, 1.0  # the parts are normalised already

    def __init__(
        self, parts: Mapping[str, Mapping[str, Any]], artifact: str | None = None, trust_remote_code: bool = False,
        shared_base: SharedBase | None = None,
    ) -> None:  # fmt: skip
        if not parts:
            raise ConfigError("reward.parts: is empty: give at least one part")
        model = None if artifact is None else Path(artifact)
        self.weights: dict[str, float] = {}
        self.parts = {}
        for name, part in parts.items():
            key = f"reward.parts.{name}"
            weight = part.get("weight")
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise ConfigError(f"{key}.weight: must be a number, not {weight!r}")
            self.weights[name] = float(weight)
            node = {k: v for k, v in part.items() if k != "weight"}
            self.parts[name] = build_reward(
                node, model, key=key, shared_base=shared_base, trust_remote_code=trust_remote_code
            )  # fmt: skip
        self.details: dict[str, list[float]] = {}

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """One number a response; `details` then holds what each part said."""
        sums = [0.0] * len(responses)
        for name, part in self.parts.items():
            said = part_scores(name, part.reward, prompts, responses, rows)
            mean, std = part.mean or 0.0, part.std or 1.0
            sums = [total + self.weights[name] * (score - mean) / std for total, score in zip(sums, said, strict=True)]
            self.details[name] = said
        return sums
