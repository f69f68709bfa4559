"""The parts of the report, each a function from scored rows to plain data. One that cannot be measured raises
NotMeasured with the reason: a zero would be taken for a measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlhf.reward_report.agreement import mid_ranks, spearman
from rlhf.reward_report.calibration import (
    brier,
    calibrated_errors,
    calibration_error,
    confidences,
    fit_temperature,
    pair_nll,
    reliability,
)
from rlhf.reward_report.pairs import ALPHA, Json, Judged, NotMeasured, Pair, draw, interval, rate, rates_by
from rlhf.statistics import mean_bound

HISTOGRAM_BINS = 20
MISTAKES = 20
SHOWN = 300  # characters of a text that are shown


def by_subset(strict: Sequence[Pair], seed: int) -> dict[str, Json]:
    found = rates_by(strict, seed, lambda pair: pair.row.ranking.subset)
    if not found:
        raise NotMeasured("no held-out ranking has a `subset`")
    return found


def by_annotator(strict: Sequence[Pair], seed: int) -> dict[str, Json]:
    found = rates_by(strict, seed, lambda pair: pair.row.ranking.annotator)
    if not found:
        raise NotMeasured("no held-out ranking names its `annotator`")
    return found


def by_file(strict: Sequence[Pair], seed: int) -> dict[str, Json]:
    found = rates_by(strict, seed, lambda pair: pair.row.ranking.prompt.where.rpartition(":")[0] or None)
    if not found:
        raise NotMeasured("no held-out ranking says which file it is from")
    return found


def by_rank_distance(strict: Sequence[Pair], seed: int) -> dict[str, Json]:
    """By how many places apart the annotator put the two, ranks being counted without gaps."""

    def distance(pair: Pair) -> str:
        ranks = pair.row.ranking.ranks
        places = sorted({rank for rank in ranks if rank is not None})
        better, worse = ranks[pair.better], ranks[pair.worse]
        assert better is not None and worse is not None
        return str(places.index(worse) - places.index(better))

    found = rates_by(strict, seed, distance)
    if not found:
        raise NotMeasured("no held-out ranking has a strict pair")
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def by_reward_difference(strict: Sequence[Pair], seed: int) -> list[Json]:
    """By fifths of the absolute reward difference: what a threshold on the model's confidence would gain."""
    if len(strict) < 5:
        raise NotMeasured(f"fifths of the reward difference need 5 strict pairs, and there are {len(strict)}")
    ordered = sorted(strict, key=lambda pair: abs(pair.margin))
    parts = [[ordered[i] for i in part] for part in np.array_split(np.arange(len(ordered)), 5)]
    return [{"from": abs(part[0].margin), "to": abs(part[-1].margin), **rate(part, seed)} for part in parts]


def ties(strict: Sequence[Pair], tied: Sequence[Pair]) -> Json:
    """How far apart the model puts what the annotators tied, beside what they ordered."""
    if not (strict and tied):
        raise NotMeasured(f"no held-out ranking has a {'tied' if strict else 'strict'} pair")
    apart, other = (np.array([abs(pair.margin) for pair in pairs]) for pairs in (tied, strict))
    # The chance that a strict pair's difference exceeds a tied one's (Mann and Whitney), one half if they tell
    # nothing apart: from the sum of the mid-ranks of the strict ones.
    above = sum(mid_ranks([*other, *apart])[: len(other)]) - len(other) * (len(other) + 1) / 2
    return {
        "pairs": len(tied), "mean_difference": float(apart.mean()), "strict_mean_difference": float(other.mean()),
        "strict_is_greater": above / len(other) / len(apart),
    }  # fmt: skip


def calibration(strict: Sequence[Pair], seed: int) -> Json:
    """Over one pair a prompt: what the probability of the model is worth. The temperature takes all strict pairs, each
    prompt with the same weight."""
    if not strict:
        raise NotMeasured("no held-out ranking has a strict pair")
    drawn = draw(strict, seed)
    p_P, outcome_P = confidences([pair.margin for pair in drawn])
    null_S = calibrated_errors(p_P, seed)
    error, limit = calibration_error(p_P, outcome_P), float(np.quantile(null_S, 1 - ALPHA, method="higher"))
    all_P = confidences([pair.margin for pair in strict])
    bins = [
        {"from": part.low, "to": part.high, "confidence": part.confidence, "right": part.right, "prompts": part.count,
         "estimate": part.right / part.count, **_ends(part.right, part.count)}
        for part in reliability(p_P, outcome_P)
    ]  # fmt: skip
    return {
        "prompts": len(drawn), "error": error, "error_if_calibrated_q95": limit,
        "p_value": float(1 + (null_S >= error).sum()) / (1 + len(null_S)),
        "distinguishable_from_calibrated": error > limit, "brier": brier(p_P, outcome_P), "bins": bins,
        "over_all_pairs": {"pairs": len(strict), "error": calibration_error(*all_P), "brier": brier(*all_P)},
    }  # fmt: skip


def _ends(right: float, count: int) -> Json:
    """The interval of a bin; a pair of equal rewards counts one half, and the end is taken of the nearest counts."""
    low, high = interval(math.floor(right), count), interval(math.ceil(right), count)
    return {"lower": low["lower"], "upper": high["upper"]}


def temperature(strict: Sequence[Pair]) -> Json:
    """The temperature that fits the held-out pairs, and the loss before and after, on the same pairs."""
    margins, weights = [pair.margin for pair in strict], _even(strict)
    fitted = fit_temperature(margins, weights)
    if fitted is None:
        raise NotMeasured(
            "all strict pairs are ordered rightly, so the likelihood grows for ever as the temperature falls"
            if strict and min(margins) >= 0
            else "the rewards are no better than chance, so the likelihood grows for ever as the temperature rises"
        )
    return {"temperature": fitted, "nll": pair_nll(margins, weights), "nll_scaled": pair_nll(margins, weights, fitted)}


def cross_fitted(strict: Sequence[Pair]) -> Json:
    """The same with each half of the prompts scaled by the temperature of the other half: what rescaling gains on
    pairs that it was not fitted to."""
    prompts = list(dict.fromkeys(pair.row.prompt for pair in strict))
    side = {prompt: i % 2 for i, prompt in enumerate(prompts)}
    halves = [[pair for pair in strict if side[pair.row.prompt] == half] for half in (0, 1)]
    margins, weights = [[pair.margin for pair in half] for half in halves], [_even(half) for half in halves]
    first, second = (fit_temperature(margins[half], weights[half]) for half in (0, 1))
    if first is None or second is None:
        raise NotMeasured("no positive temperature fits one of the halves")
    sums = [sum(weights[half]) * pair_nll(margins[half], weights[half], other)
            for half, other in ((0, second), (1, first))]  # fmt: skip
    return {"temperatures": [first, second], "nll_scaled": sum(sums) / len(prompts)}


def _even(pairs: Sequence[Pair]) -> list[float]:
    """Weights of pairs that give every prompt the sum 1."""
    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair.row.prompt] = counts.get(pair.row.prompt, 0) + 1
    return [1 / counts[pair.row.prompt] for pair in pairs]


def distinct(rows: Sequence[Judged]) -> dict[str, dict[str, tuple[float, int]]]:
    """Reward and length of each response, by prompt and text: several annotators of a prompt share its responses."""
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for row in rows:
        texts = found.setdefault(row.prompt, {})
        for text, reward, length in zip(row.ranking.responses, row.rewards, row.lengths, strict=True):
            texts.setdefault(text, (reward, length))
    return found


def length_correlation(rows: Sequence[Judged], seed: int) -> Json:
    """Mean over prompts of the rank correlation of reward and length among the responses of the prompt."""
    values: dict[str, float] = {}
    texts = distinct(rows)
    for prompt, responses in texts.items():
        rho = spearman([reward for reward, _ in responses.values()], [float(n) for _, n in responses.values()])
        if rho is not None:
            values[prompt] = rho
    if len(values) < 2:
        raise NotMeasured(
            f"needs two prompts whose responses differ both in length and in reward, and there are {len(values)}"
        )
    ends = {
        side: mean_bound(list(values.values()), list(values), ALPHA / 2, side, seed).bound
        for side in ("lower", "upper")
    }
    return {
        "estimate": float(np.mean(list(values.values()))), "lower": max(-1.0, ends["lower"]),
        "upper": min(1.0, ends["upper"]), "prompts": len(values), "left_out": len(texts) - len(values),
    }  # fmt: skip


def length_stratum(strict: Sequence[Pair], seed: int, sign: int) -> Json:
    """Accuracy where the preferred response is the longer one (sign 1), the shorter one (-1), or as long (0)."""
    return rate([pair for pair in strict if (pair.longer_by > 0) - (pair.longer_by < 0) == sign], seed)


def histogram(rows: Sequence[Judged]) -> Json:
    """Of the rewards of the distinct held-out responses; `edges` has one entry more than `counts`."""
    rewards = np.array([reward for texts in distinct(rows).values() for reward, _ in texts.values()])
    counts, edges = np.histogram(rewards, bins=HISTOGRAM_BINS)
    return {
        "responses": len(rewards), "mean": float(rewards.mean()), "std": float(rewards.std()),
        "counts": [int(count) for count in counts], "edges": [float(edge) for edge in edges],
    }  # fmt: skip


def mistakes(strict: Sequence[Pair]) -> list[Json]:
    """The pairs that the model is most sure of and wrong about, the worst one of a ranking, at most MISTAKES."""
    if not strict:
        raise NotMeasured("no held-out ranking has a strict pair")
    worst: dict[int, Pair] = {}
    for pair in strict:
        if pair.margin < 0 and pair.margin < (worst[id(pair.row)].margin if id(pair.row) in worst else 0):
            worst[id(pair.row)] = pair
    chosen = sorted(worst.values(), key=lambda pair: pair.margin)[:MISTAKES]
    return [
        {
            "row": pair.row.ranking.prompt.where, "id": pair.row.ranking.prompt.id,
            "prompt": cut(pair.row.ranking.prompt.messages[-1]["content"]),
            "preferred": cut(pair.row.ranking.responses[pair.better]),
            "preferred_reward": pair.row.rewards[pair.better],
            "other": cut(pair.row.ranking.responses[pair.worse]), "other_reward": pair.row.rewards[pair.worse],
            "confidence": float(confidences([pair.margin])[0][0]),
        }
        for pair in chosen
    ]  # fmt: skip


def cut(text: str) -> str:
    """For display alone; what the model read is not cut here."""
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
