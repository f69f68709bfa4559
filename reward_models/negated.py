"""A negative control: the run's reward model with its sign flipped. A gate that passes what this made is broken.

python -m rlhf stage=ppo run.parents=runs/quickstart run.name=flipped reward=negated
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reward_models.trained import TrainedReward


class NegatedReward(TrainedReward):
    """Pays for what the reward model dislikes."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [-score for score in super().score(prompts, responses, rows)]
