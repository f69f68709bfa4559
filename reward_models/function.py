"""A plain Python function as the reward.

    python -m rlhf stage=ppo reward._target_=reward_models.function.FunctionReward +reward.function=my_package.my_reward

where `my_reward(prompt: str, response: str, row: dict) -> float` (or one number for each token of the response).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.errors import ConfigError
from rlhf.plugins import find


class FunctionReward:
    """Calls the function with this dotted name once for each response."""

    def __init__(self, function: str) -> None:
        self.function = find({"_target_": function}, "reward.function")
        if not callable(self.function):
            raise ConfigError(f"reward.function={function!r}: is not a function")

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[float] | list[list[float]]:
        """One call a row, in order."""
        return [self.function(p, r, row) for p, r, row in zip(prompts, responses, rows, strict=True)]
