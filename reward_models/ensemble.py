"""Several reward models that judge together, and are trusted less where they disagree.

    python -m rlhf rm.members=3 reward=ensemble reward.k=2
    python -m rlhf stage=ppo reward=ensemble \\
        +reward.members.a._target_=reward_models.trained.TrainedReward +reward.members.a.artifact=runs/a/rm/model ...

Each member is normalised with the mean and std that its artifact stores; what stores none is taken as it is. The mean
of their standard deviations is logged as `reward/parts/disagreement`. Source: Coste et al. 2310.02743, section 3
(there the penalty is k times the variance; here the standard deviation, which has the unit of the scores).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.adapters import SharedBase
from rlhf.errors import ConfigError
from rlhf.rewards import build_reward, part_scores


class Ensemble:
    """mean - k * std over M members, std = sqrt(sum of squared deviations / M); or the least of them.

    members: by name, at least two nodes like `reward`; PPO puts in those of the run where none is named.
    mode: mean or worst. k: at least 0, of mode=mean alone.
    artifact: the reward model of a member that names none; PPO gives that of the run.
    trust_remote_code, shared_base: given by PPO, for the members that take them.
    """

    mean, std = 0.0, 1.0  # the members are normalised already

    def __init__(
        self, members: Mapping[str, Mapping[str, Any]], mode: str = "mean", k: float = 1.0,
        artifact: str | None = None, trust_remote_code: bool = False, shared_base: SharedBase | None = None,
    ) -> None:  # fmt: skip
        if len(members) < 2:
            raise ConfigError(f"reward.members: needs at least two, not {len(members)}")
        if "disagreement" in members:
            raise ConfigError("reward.members.disagreement: that name is taken: choose another")
        if mode not in ("mean", "worst"):
            raise ConfigError(f"reward.mode={mode!r}: must be mean or worst")
        if not (math.isfinite(k) and k >= 0):
            raise ConfigError(f"reward.k={k}: must be a number of at least 0")
        self.mode, self.k = mode, float(k)
        model = None if artifact is None else Path(artifact)
        self.members = {
            name: build_reward(
                node, model, key=f"reward.members.{name}", shared_base=shared_base, trust_remote_code=trust_remote_code
            )
            for name, node in members.items()
        }
        self.details: dict[str, list[float]] = {}

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """One number a response; `details` then holds the members' raw scores and their disagreement."""
        normalised: list[list[float]] = []
        for name, member in self.members.items():
            said = part_scores(name, member.reward, prompts, responses, rows)
            mean, std = member.mean or 0.0, member.std or 1.0
            normalised.append([(score - mean) / std for score in said])
            self.details[name] = said
        means, stds, least = [], [], []
        for of_one in zip(*normalised, strict=True):
            mean = sum(of_one) / len(of_one)
            means.append(mean)
            stds.append(math.sqrt(sum((score - mean) ** 2 for score in of_one) / len(of_one)))
            least.append(min(of_one))
        self.details["disagreement"] = stds
        return least if self.mode == "worst" else [m - self.k * s for m, s in zip(means, stds, strict=True)]
