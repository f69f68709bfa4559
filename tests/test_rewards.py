"""A custom reward is built by name, its arguments checked, and a fault in its scores is named by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from reward_models.function import FunctionReward
from reward_models.weighted import WeightedSum
from rlhf.artifacts import folder_digest, sha256_file
from rlhf.errors import ConfigError, TrainingError
from rlhf.manifest import reward_digests
from rlhf.rewards import build_reward, check_reward, checked_scores

NAMES = ["one", "two", "three"]
ROWS: list[dict[str, Any]] = [{"n": 0}, {"n": 1}, {"n": 2}]


class Fixed:
    """Returns what the test hands over."""

    def __init__(self, scores: Any, artifact: str = "", mean: float | None = None, std: float | None = None) -> None:
        self.scores, self.artifact, self.mean, self.std = scores, artifact, mean, std

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Any:
        return self.scores


class Plain:
    """Five points for everything; takes no argument."""

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [5.0] * len(responses)


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
    with pytest.raises(ConfigError, match=r"reward_std\) is 0"):
        build_reward({**other, "mean": 0.5, "std": 0})


def test_statistics_of_another_runs_reward_model_stand_in_the_manifest_beside_it(tmp_path: Path) -> None:
    (tmp_path / "rm" / "model").mkdir(parents=True)
    (tmp_path / "rm" / "manifest.json").write_text('{"extra": {"reward_mean": -1.0, "reward_std": 4.0}}')
    node = {"_target_": "test_rewards.Fixed", "scores": [], "artifact": str(tmp_path / "rm" / "model")}
    built = build_reward(node, Path("runs/x/rm/model"), {"reward_mean": 2.0, "reward_std": 3.0})
    assert (built.mean, built.std) == (-1.0, 4.0)


def test_mean_and_std_may_stand_in_any_node() -> None:
    """They go to the object only if it takes them, and come before what it has or stores."""
    rules = {"_target_": "reward_models.rules.RulesReward", "rules": {"a": {"rule": "repetition", "weight": 1}}}
    built = build_reward({**rules, "mean": 2, "std": 4.0})
    assert (built.mean, built.std) == (2.0, 4.0)
    built = build_reward({**rules, "mean": None, "std": None})
    assert (built.mean, built.std) == (None, None)
    parts = {"a": {"_target_": "test_rewards.Plain", "mean": 1.0, "std": 4.0, "weight": 2}}  # 2 * (5 - 1) / 4
    assert score(WeightedSum(parts)) == [2.0] * 3
    twice = build_reward({"_target_": "reward_models.weighted.WeightedSum", "parts": parts, "mean": 7.0, "std": 3.0})
    assert (twice.mean, twice.std) == (7.0, 3.0)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"mean": 1.0}, "reward: gives only one of mean and std"),
        ({"std": 1.0, "mean": None}, "reward: gives only one of mean and std"),
        ({"mean": "1", "std": 1.0}, r"reward\.mean: must be a number, not '1'"),
        ({"mean": 1.0, "std": float("nan")}, r"reward\.std: must be a number, not nan"),
        ({"mean": 1.0, "std": True}, r"reward\.std"),
    ],
)
def test_a_wrong_scale_is_a_config_error(scale: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_reward({"_target_": "test_rewards.Plain", **scale})
    with pytest.raises(ConfigError, match="must be positive"):
        build_reward({"_target_": "test_rewards.Plain", "mean": 1.0, "std": 0})


def weighted(**parts: Any) -> WeightedSum:
    return WeightedSum(parts, artifact="runs/x/rm/model")


def test_a_weighted_sum_adds_its_parts_in_standard_deviations() -> None:
    """2 * (score - 1) / 4 - .5 * score: 2 * 0 - .5, 2 * 1 - 1, 2 * -1 - 1.5."""
    fixed = {"_target_": "test_rewards.Fixed"}
    both = weighted(
        model={**fixed, "scores": [1.0, 5.0, -3.0], "mean": 1.0, "std": 4.0, "weight": 2},
        plain={**fixed, "scores": [1, 2, 3], "weight": -0.5},
    )
    assert score(both) == [-0.5, 1.0, -3.5]
    assert both.details == {"model": [1.0, 5.0, -3.0], "plain": [1.0, 2.0, 3.0]}
    built = build_reward(
        {"_target_": "reward_models.weighted.WeightedSum", "parts": {"a": {**fixed, "scores": [], "weight": 1}}}
    )
    assert (built.mean, built.std) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, r"reward\.parts: is empty"),
        (
            {"a": {"_target_": "test_rewards.Fixed", "scores": []}},
            r"reward\.parts\.a\.weight: must be a number, not None",
        ),
        ({"a": {"_target_": "test_rewards.Fixed", "scores": [], "weight": True}}, r"reward\.parts\.a\.weight"),
        ({"a": {"_target_": "test_rewards.Fixed", "score": [], "weight": 1}}, r"reward\.parts\.a\.score.*did you mean"),
    ],
)
def test_a_wrong_part_names_its_key(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weighted(**parts)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "part 'a' gave 1 scores for 3"),
        ([[1.0]] * 3, "part 'a' must give one number"),
        ([float("nan")] * 3, "is nan"),
    ],
)
def test_a_fault_of_a_part_is_named(scores: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        score(weighted(a={"_target_": "test_rewards.Fixed", "scores": scores, "weight": 1.0}))


def test_the_models_that_a_reward_names_are_part_of_what_ppo_is_made_of(tmp_path: Path) -> None:
    """At any depth; what is no folder (a hub id, a function) has no digest of ours. Another file, another digest."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w").write_text(name)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    node = {"_target_": "x.Y", "parts": {"one": {"artifact": a}, "two": [{"artifact": "org/model"}]}, "n": 3}
    first = reward_digests([node, b])
    assert first == {a: folder_digest(tmp_path / "a"), b: folder_digest(tmp_path / "b")}
    (tmp_path / "a" / "w").write_text("other")
    assert reward_digests([node, b])[a] != first[a] and reward_digests([None, {}]) == {}


def test_the_code_that_a_reward_is_made_of_is_part_of_what_ppo_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own files, at any depth; not what is installed, what this package ships or what is not there."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_code.py").write_text("def pay(prompt, response, row): return 1.0\n")
    (tmp_path / "their_class.py").write_text("class Pay: ...\n")
    function = {"_target_": "reward_models.function.FunctionReward", "function": "their_code.pay"}
    node = {"_target_": "their_class.Pay", "parts": {"a": function, "b": {"_target_": "torch.nn.Linear"},
            "c": {"_target_": "nowhere.at.All"}, "d": {"function": "statistics.mean"}}}  # fmt: skip
    first = reward_digests(node)
    assert first == {name: sha256_file(tmp_path / f"{name}.py") for name in ("their_code", "their_class")}
    (tmp_path / "their_code.py").write_text("def pay(prompt, response, row): return 2.0\n")
    assert reward_digests(node)["their_code"] != first["their_code"]
