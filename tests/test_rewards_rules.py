"""Rules and ensembles against numbers worked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from reward_models.ensemble import Ensemble
from reward_models.rules import RulesReward, layout, length, regex, repetition
from rlhf.errors import ConfigError, TrainingError
from rlhf.rewards import build_reward, checked_scores

FIXED = {"_target_": "test_rewards.Fixed"}


def ask(reward: Any, texts: Sequence[str]) -> Any:
    n = len(texts)
    return checked_scores(reward, ["p"] * n, texts, [{}] * n, [str(i) for i in range(n)], [1] * n)


@pytest.mark.parametrize(
    ("text", "expected"), [("", -1.0), ("abc", -0.25), ("abcd", 0.0), ("a" * 8, 0.0), ("a" * 10, -0.25), ("a" * 99, -1)]
)
def test_length_is_paid_by_its_distance_to_the_band(text: str, expected: float) -> None:
    """Band 4 to 8: 3 / 4 - 1, 1 - 10 / 8, at least -1."""
    assert length(text, 4, 8) == expected
    assert length(" ".join("many" for _ in text), 4, 8, unit="words") == expected


def test_regex_counts_once_or_each() -> None:
    assert regex("no", "sorry") == 0.0 and regex("sorry, sorry", "sorry") == 1.0
    assert regex("sorry, sorry", "sorry", count="each") == 2.0 and regex("aaa", "aa", count="each") == 1.0


@pytest.mark.parametrize(
    ("text", "n", "expected"), [("a b a b a", 2, 0.5), ("a b c", 2, 0.0), ("a a a a", 1, 0.75), ("a b", 3, 0.0)]
)
def test_repetition_is_the_share_of_grams_seen_before(text: str, n: int, expected: float) -> None:
    """ab ba ab ba: 2 of 4 are new."""
    assert repetition(text, n) == expected


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ('{"a": 1}', {"json_": True}, 1.0),
        ("{a: 1}", {"json_": True}, 0.0),
        ("NaN", {"json_": True}, 0.0),
        ("[" * 100_000, {"json_": True}, 0.0),
        ("Dear you", {"starts": "Dear"}, 1.0),
        ("dear you", {"starts": "Dear"}, 0.0),
        ("end.", {"ends": "."}, 1.0),
        ("end", {"ends": "."}, 0.0),
        ("a\nb", {"max_lines": 2}, 1.0),
        ("a\nb\nc", {"max_lines": 2}, 0.0),
        ("end.", {"starts": "x", "ends": "."}, 0.0),
    ],
)
def test_format_needs_all_that_is_asked(text: str, options: dict[str, Any], expected: float) -> None:
    assert layout(text, **options) == expected


def test_rules_add_up_with_their_weights() -> None:
    """2 * 1 - .5 * 0 and 2 * 0 - .5 * .5."""
    reward = RulesReward(
        {
            "json": {"rule": "format", "json": True, "weight": 2},
            "again": {"rule": "repetition", "n": 2, "weight": -0.5},
        }
    )
    assert ask(reward, ["[1]", "a b a b a"]) == [2.0, -0.25]
    assert reward.details == {"json": [1.0, 0.0], "again": [0.0, 0.5]}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "is empty"),
        ({"a": {"rule": "lenght", "weight": 1}}, r"rules\.a\.rule: must be one of length, regex"),
        ({"a": {"rule": "regex", "pattern": "x"}}, r"rules\.a\.weight: must be a number"),
        ({"a": {"rule": "regex", "patern": "x", "weight": 1}}, r"rules\.a\.patern.*did you mean pattern"),
        ({"a": {"rule": "regex", "pattern": "(", "weight": 1}}, r"rules\.a: missing \)"),
        ({"a": {"rule": "length", "low": 9, "high": 2, "weight": 1}}, r"rules\.a: needs 0 <= low <= high"),
        ({"a": {"rule": "length", "low": 1, "high": 2, "unit": "tokens", "weight": 1}}, "characters or words"),
    ],
)
def test_a_wrong_rule_names_its_key(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RulesReward(rules)


def members(*scores: list[Any]) -> dict[str, dict[str, Any]]:
    return {f"m{i}": {**FIXED, "scores": of_one} for i, of_one in enumerate(scores)}


def test_an_ensemble_takes_k_standard_deviations_off_its_mean() -> None:
    """First: 1, 3 have mean 2 and std 1; second: agree. The second member stores mean 2, std 2: 8 -> 3, 12 -> 5."""
    two = members([1.0, 5.0], [8.0, 12.0])
    two["m1"] |= {"mean": 2.0, "std": 2.0}
    both = Ensemble(two, k=0.5)
    assert ask(both, ["a", "b"]) == [1.5, 5.0]
    assert both.details == {"m0": [1.0, 5.0], "m1": [8.0, 12.0], "disagreement": [1.0, 0.0]}
    built = build_reward({"_target_": "reward_models.ensemble.Ensemble", "members": two})
    assert (built.mean, built.std) == (0.0, 1.0)


def test_the_worst_case_is_the_least_of_the_members() -> None:
    assert ask(Ensemble(members([1.0, 5.0], [3.0, -4.0], [2.0, 7.0]), mode="worst", k=9), ["a", "b"]) == [1.0, -4.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": {}}, "at least two, not 0"),
        ({"members": members([1.0], [1.0]), "mode": "best"}, "mean or worst"),
        ({"members": members([1.0], [1.0]), "k": -1}, r"reward\.k=-1"),
        ({"members": {**members([1.0]), "disagreement": {**FIXED, "scores": []}}}, "name is taken"),
        ({"members": {**members([1.0]), "b": {"_target_": "test_rewards.Scoreless"}}}, r"reward\.members\.b"),
    ],
)
def test_wrong_members_are_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ensemble(**options)


@pytest.mark.parametrize(
    ("scores", "message"), [([1.0], "'m1' gave 1 scores for 2"), ([1.0, float("nan")], "part 'm1' is nan")]
)
def test_a_fault_of_a_member_is_named(scores: list[Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        ask(Ensemble(members([1.0, 2.0], scores), mode="worst"), ["a", "b"])
