"""Held-out pairs with what the model and the baselines say of them, and rates over prompts that are independent.

Pairs of one prompt share responses, and annotators of one prompt share the prompt. So whatever has an interval or a
test takes one pair a prompt, drawn with the seed; the share over all pairs stands beside it, without an interval.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.ranking_loss import comparable_pairs
from rlhf.statistics import clopper_pearson_lower, clopper_pearson_upper
from rlhf.types import Ranking

ALPHA = 0.05  # of every interval and test
Json = dict[str, Any]


class NotMeasured(Exception):
    """What is asked for cannot be measured on these rows; the message is the reason that stands in the report."""


@dataclass(kw_only=True, slots=True)
class Judged:
    """A held-out ranking, with one number a response from each that scores it."""

    ranking: Ranking
    prompt: str  # the same for all rankings of one prompt: what intervals count
    rewards: list[float]
    lengths: list[int]  # tokens of the response
    words: list[float] | None = None  # by the bag of words, if one could be fitted


@dataclass(kw_only=True, slots=True)
class Pair:
    """Two responses of a ranking; of a tied pair, `better` is the one that the row names first."""

    row: Judged
    better: int
    worse: int

    @property
    def margin(self) -> float:
        """Reward of the better response less that of the worse one."""
        return self.row.rewards[self.better] - self.row.rewards[self.worse]

    @property
    def longer_by(self) -> int:
        """Tokens that the better response has more than the worse one."""
        return self.row.lengths[self.better] - self.row.lengths[self.worse]


def pairs_of(rows: Iterable[Judged]) -> tuple[list[Pair], list[Pair]]:
    """Strict pairs and tied pairs of all rows, in their order."""
    strict, tied = [], []
    for row in rows:
        ordered, equal = comparable_pairs(row.ranking.ranks)
        strict += [Pair(row=row, better=i, worse=j) for i, j in ordered]
        tied += [Pair(row=row, better=i, worse=j) for i, j in equal]
    return strict, tied


def draw(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """One pair of each prompt, in the order of the prompts."""
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.row.prompt, []).append(pair)
    generator = random.Random(seed)
    return [generator.choice(found) for found in by_prompt.values()]


def by_model(pair: Pair) -> float:
    """1 if the model orders the pair as the annotator did, else 0: equal rewards are a miss, as in the gate."""
    return float(pair.margin > 0)


def choice(difference: float) -> float:
    """1, 0, or one half where a baseline sees no difference."""
    return 0.5 if difference == 0 else float(difference > 0)


def settle(values: Sequence[float], seed: int) -> list[bool]:
    """Halves by a fair coin of the seed: a baseline guesses where it sees no difference, and half of its guesses are
    right. To call them all misses would flatter the model that it is compared with."""
    generator = random.Random(seed)
    return [generator.random() < value for value in values]


def interval(right: int, count: int) -> Json:
    """A rate with its exact two-sided 95 % interval. `right` of `count` independent trials."""
    return {
        "right": right, "prompts": count, "estimate": right / count,
        "lower": clopper_pearson_lower(right, count, ALPHA / 2),
        "upper": clopper_pearson_upper(right, count, ALPHA / 2),
    }  # fmt: skip


def rate(pairs: Sequence[Pair], seed: int, right: Callable[[Pair], float] = by_model) -> Json:
    """How often `right`: over one pair a prompt with its interval, and over all pairs."""
    if not pairs:
        raise NotMeasured("no held-out pair of this kind")
    drawn = settle([right(pair) for pair in draw(pairs, seed)], seed)
    shares = [right(pair) for pair in pairs]
    return {**interval(sum(drawn), len(drawn)), "pairs": len(pairs), "over_all_pairs": sum(shares) / len(shares)}


def rates_by(pairs: Sequence[Pair], seed: int, label: Callable[[Pair], str | None]) -> dict[str, Json]:
    """`rate` of each group of pairs, by its label; pairs without a label are left out."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        name = label(pair)
        if name is not None:
            groups.setdefault(name, []).append(pair)
    return {name: rate(found, seed) for name, found in sorted(groups.items())}
