"""Rewards by rule: what can be read off the text without a model.

    python -m rlhf stage=ppo reward=rules '+reward.rules.short={rule: length, low: 20, high: 200, weight: 1}'

Each rule is a function of the response in this file; its arguments stand beside `rule` and `weight`. Nothing is
normalised: the scores are on the scale that the weights give them. Each rule's mean is logged as `reward/parts/<name>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.errors import ConfigError
from rlhf.plugins import check_arguments


def length(text: str, low: float, high: float, unit: str = "characters") -> float:
    """0 inside [low, high]; outside, minus the distance to the band as a share of its near end, at least -1.

    unit: characters, or words (between white space).
    """
    if unit not in ("characters", "words"):
        raise ValueError(f"unit must be characters or words, not {unit!r}")
    if not 0 <= low <= high or high == 0:
        raise ValueError(f"needs 0 <= low <= high and high > 0, not low={low}, high={high}")
    n = len(text) if unit == "characters" else len(text.split())
    if n < low:
        return n / low - 1
    return 0.0 if n <= high else max(1 - n / high, -1.0)


def regex(text: str, pattern: str, count: str = "any") -> float:
    """count=any: 1 if `pattern` is found, else 0; count=each: the number of matches that do not overlap."""
    if count not in ("any", "each"):
        raise ValueError(f"count must be any or each, not {count!r}")
    if count == "any":
        return float(re.search(pattern, text) is not None)
    return float(sum(1 for _ in re.finditer(pattern, text)))


def repetition(text: str, n: int = 3) -> float:
    """The share, in [0, 1), of the n-grams of words that stood in the text before; 0 if it has no n-gram."""
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def layout(text: str, json_: bool = False, starts: str = "", ends: str = "", max_lines: int | None = None) -> float:
    """1 if all that is asked for holds, else 0: parses as JSON, starts or ends with a text, has few enough lines."""
    holds = text.startswith(starts) and text.endswith(ends)
    holds = holds and (max_lines is None or len(text.splitlines()) <= max_lines)
    return float(holds and (not json_ or _is_json(text)))


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


RULES: dict[str, Callable[..., float]] = {
    "length": length, "regex": regex, "repetition": repetition, "format": layout,
}  # fmt: skip


class RulesReward:
    """The sum of weight * rule(response) over the rules; one number a response.

    rules: by name, {"rule": length, regex, repetition or format, "weight": a number, and the rule's arguments}
    (`json: true` for that of format).
    """

    def __init__(self, rules: Mapping[str, Mapping[str, Any]]) -> None:
        if not rules:
            raise ConfigError("reward.rules: is empty: give at least one rule")
        self.rules = {name: _checked(rule, f"reward.rules.{name}") for name, rule in rules.items()}
        self.details: dict[str, list[float]] = {}

    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """One number a response; `details` then holds what each rule said, without its weight."""
        sums = [0.0] * len(responses)
        for name, (rule, weight, arguments) in self.rules.items():
            said = [rule(text, **arguments) for text in responses]
            sums = [total + weight * score for total, score in zip(sums, said, strict=True)]
            self.details[name] = said
        return sums


def _checked(node: Mapping[str, Any], key: str) -> tuple[Callable[..., float], float, dict[str, Any]]:
    if not isinstance(node, Mapping) or node.get("rule") not in RULES:
        raise ConfigError(f"{key}.rule: must be one of {', '.join(RULES)}, in {node!r}")
    weight = node.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f"{key}.weight: must be a number, not {weight!r}")
    rule = RULES[node["rule"]]
    arguments = {"json_" if name == "json" else name: v for name, v in node.items() if name not in ("rule", "weight")}
    check_arguments(rule, {"text": "", **arguments}, key)
    try:
        rule("", **arguments)  # a pattern that is none, a band upside down: now, not after the first rollout
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ConfigError(f"{key}: {error}") from error
    return rule, float(weight), arguments
