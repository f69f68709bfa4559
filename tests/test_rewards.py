"""A custom reward is built by name, its arguments checked, and a fault in its scores is named by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from reward_models.function import FunctionReward
from rlhf.errors import ConfigError, TrainingError
from rlhf.rewards import build_reward, check_reward, checked_scores

NAMES = ["one", "two", "three"]
ROWS: list[dict[str, Any]] = [{"n": 0}, {"n": 1}, {"n": 2}]


class Fixed:
    """Returns what the test hands over."""

    def __init__(self, scores: Any, artifact: str = "", mean: float | None = None, std: float | None = None) -> None:
        self.scores, self.artifact, self.mean, self.std = scores, artifact, mean, std

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Any:
        return self.scores


class Scoreless:
    """No reward."""


class RaisesOnTwo:
    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [1 / (1 - row["n"]) for row in rows]


def score(reward: Any) -> Any:
    return checked_scores(reward, ["p"] * 3, ["a", "bb", "ccc"], ROWS, NAMES, [1, 2, 3])


def length(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    return len(response) + 10 * row["n"]


def test_a_plain_function_scores_each_row() -> None:
    assert score(FunctionReward("test_rewards.length")) == [1.0, 12.0, 23.0]


def test_scores_may_be_given_for_each_token() -> None:
    assert score(Fixed([[1], [1, 2], [1, 2, 3]])) == [[1.0], [1.0, 2.0], [1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Fixed([1.0, 2.0]), "2 scores for 3 responses; row three is the first without one"),
        (Fixed([1.0] * 4), "4 scores for 3 responses"),
        (Fixed([1.0, float("nan"), 2.0]), "row two: the score is nan"),
        (Fixed([1.0, 2.0, float("inf")]), "row three: the score is inf"),
        (Fixed([1.0, None, 2.0]), "row two: the score is None"),
        (Fixed([1.0, "high", 2.0]), "row two: the score is 'high'"),
        (Fixed([[1], [1], [1, 2, 3]]), "row two: 1 per-token scores for a response of 2 tokens"),
        (Fixed([[1], [1, float("nan")], [1, 2, 3]]), "row two: the score is nan"),
        (RaisesOnTwo(), "raised ZeroDivisionError on row two: division by zero"),
    ],
)
def test_a_fault_names_the_row(reward: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        score(reward)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (None, r"reward: needs `_target_"),
        ({"_target_": "reward_models.function.FunctionRewrad"}, "did you mean FunctionReward"),
        ({"_target_": "no_such_module.X"}, "no_such_module"),
        ({"_target_": "test_rewards.Fixed", "scroes": []}, r"reward\.scroes.*did you mean scores"),
        ({"_target_": "test_rewards.Fixed"}, "missing a required argument: 'scores'"),
        ({"_target_": "test_rewards.Scoreless"}, "no method score"),
    ],
)
def test_a_wrong_node_is_a_config_error(node: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_reward(node)


def test_a_function_as_target_is_told_how_to_be_used() -> None:
    node = {"_target_": "test_rewards.length", "prompt": "p", "response": "r", "row": {"n": 0}}
    with pytest.raises(ConfigError, match=r"reward_models\.function\.FunctionReward"):
        build_reward(node)


def test_the_runs_reward_model_is_filled_in_with_its_statistics() -> None:
    model, stored = Path("runs/x/rm/model"), {"reward_mean": 2.0, "reward_std": 3.0}
    built = build_reward({"_target_": "test_rewards.Fixed", "scores": []}, model, stored)
    assert built.reward.artifact == str(model)  # type: ignore[attr-defined]
    assert (built.mean, built.std) == (2.0, 3.0)


def test_statistics_of_the_runs_reward_model_are_not_those_of_another() -> None:
    stored = {"reward_mean": 2.0, "reward_std": 3.0}
    other = {"_target_": "test_rewards.Fixed", "scores": [], "artifact": "elsewhere"}
    built = build_reward(other, Path("runs/x/rm/model"), stored)
    assert (built.mean, built.std) == (None, None)
    built = build_reward({**other, "mean": 0.5, "std": 2}, Path("runs/x/rm/model"), stored)
    assert (built.mean, built.std) == (0.5, 2.0)
    with pytest.raises(ConfigError, match="reward_std is 0"):
        build_reward({**other, "mean": 0.5, "std": 0})
