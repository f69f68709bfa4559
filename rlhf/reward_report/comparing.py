"""The model beside what needs no model: length, words, the annotators themselves; and the sentence that sums it up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

from rlhf.ranking_loss import comparable_pairs
from rlhf.reward_report.agreement import mid_ranks, ordinal_alpha
from rlhf.reward_report.baselines import BagOfWords, fit_bag_of_words
from rlhf.reward_report.pairs import ALPHA, Json, NotMeasured, Pair, by_model, choice, draw, interval, rate, settle
from rlhf.statistics import mcnemar_exact, tango_interval
from rlhf.types import Ranking


def fit_words(train: Sequence[Ranking]) -> BagOfWords | None:
    """The bag of words of the training rankings: each ranking's strict pairs weigh 1 together."""
    texts: list[str] = []
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    for ranking in train:
        strict, _ = comparable_pairs(ranking.ranks)
        pairs += [(len(texts) + better, len(texts) + worse) for better, worse in strict]
        weights += [1 / len(strict) for _ in strict]
        texts += ranking.responses
    return fit_bag_of_words(texts, pairs, weights)


def longer_wins(train: Sequence[Ranking], lengths: Sequence[Sequence[int]]) -> bool:
    """Whether the longer response is the preferred one more often than not, over the training pairs."""
    balance = 0
    for ranking, tokens in zip(train, lengths, strict=True):
        for better, worse in comparable_pairs(ranking.ranks)[0]:
            balance += (tokens[better] > tokens[worse]) - (tokens[better] < tokens[worse])
    return balance >= 0


def by_length(longer: bool) -> Callable[[Pair], float]:
    """The rule "the longer (or shorter) response is better"."""
    return lambda pair: choice(pair.longer_by if longer else -pair.longer_by)


def by_words(pair: Pair) -> float:
    words = pair.row.words
    assert words is not None
    return choice(words[pair.better] - words[pair.worse])


def baseline(strict: Sequence[Pair], seed: int, right: Callable[[Pair], float]) -> Json:
    """A baseline's accuracy, and the model against it on the same pairs, one a prompt."""
    found = rate(strict, seed, right)
    drawn = draw(strict, seed)
    model, other = [by_model(pair) > 0 for pair in drawn], settle([right(pair) for pair in drawn], seed)
    model_alone = sum(mine and not theirs for mine, theirs in zip(model, other, strict=True))
    other_alone = sum(theirs and not mine for mine, theirs in zip(model, other, strict=True))
    lower, upper = tango_interval(model_alone, other_alone, len(drawn), ALPHA)
    return {
        **found,
        "model_against_it": {
            "only_model_right": model_alone, "only_baseline_right": other_alone, "prompts": len(drawn),
            "difference": (model_alone - other_alone) / len(drawn), "lower": lower, "upper": upper,
            "p_value": mcnemar_exact(model_alone, other_alone),
        },
    }  # fmt: skip


Places = dict[str, float]  # of the texts that one annotator ranked
Shared = dict[tuple[str, frozenset[str]], dict[str, Places]]  # by prompt and texts, then by annotator


def shared_rankings(rankings: Sequence[tuple[str, Ranking]]) -> Shared:
    """What several annotators made of the same responses to the same prompt; each ranking with its prompt's key.

    Places are mid-ranks among the responses that the annotator ranked, so that 1, 1, 2 and 1, 1, 3 are the same.
    """
    found: Shared = {}
    for prompt, ranking in rankings:
        if ranking.annotator is None:
            continue
        texts = [text.strip() for text in ranking.responses]
        ranked = [(text, rank) for text, rank in zip(texts, ranking.ranks, strict=True) if rank is not None]
        places = dict(zip((text for text, _ in ranked), mid_ranks([rank for _, rank in ranked]), strict=True))
        found.setdefault((prompt, frozenset(texts)), {}).setdefault(ranking.annotator, places)
    if not found:
        raise NotMeasured("no ranking names its `annotator`")
    several = {key: raters for key, raters in found.items() if len(raters) >= 2}
    if not several:
        raise NotMeasured("no two annotators ranked the same responses to the same prompt")
    return several


def rank_agreement(shared: Shared) -> Json:
    """Krippendorff's alpha, ordinal: the units are responses, the values their places."""
    units = [
        [places[text] for places in raters.values() if text in places]
        for (_, texts), raters in shared.items() for text in sorted(texts)
    ]  # fmt: skip
    alpha = ordinal_alpha(units)
    if alpha is None:
        raise NotMeasured("all responses that several annotators ranked have the same rank, or no such response is")
    return {
        "alpha": alpha, "prompts": len({prompt for prompt, _ in shared}),
        "annotators": len({name for raters in shared.values() for name in raters}),
        "responses": sum(len(unit) >= 2 for unit in units),
    }  # fmt: skip


def pair_agreement(shared: Shared, seed: int) -> Json:
    """How often two annotators who both order a pair order it alike: one such judgement a prompt, and all of them. No
    model can agree with a single annotator much more often than a second one does."""
    by_prompt: dict[str, list[bool]] = {}
    for (prompt, _), raters in shared.items():
        for one, other in itertools.combinations(raters.values(), 2):
            for a, b in itertools.combinations(sorted(one.keys() & other.keys()), 2):
                first, second = one[a] - one[b], other[a] - other[b]
                if first != 0 and second != 0:
                    by_prompt.setdefault(prompt, []).append((first > 0) == (second > 0))
    if not by_prompt:
        raise NotMeasured("no two annotators ordered the same pair of responses")
    generator = random.Random(seed)
    picked = [generator.choice(found) for found in by_prompt.values()]
    alike = [same for found in by_prompt.values() for same in found]
    return {**interval(sum(picked), len(picked)), "pairs": len(alike), "over_all_pairs": sum(alike) / len(alike)}


def verdict(accuracy: Json | None, baselines: Json) -> Json:
    """Whether the model is better than chance and than each baseline, and the sentence that says so."""
    if accuracy is None:
        raise NotMeasured("there is no held-out accuracy")
    chance = 1 if accuracy["lower"] > 0.5 else -1 if accuracy["upper"] < 0.5 else 0
    found: Json = {"against_chance": _WORDS[chance]}
    sentences = [f"Held-out accuracy {_rate(accuracy)}: {_CHANCE[chance]} chance."]
    for name, key in (("length alone", "length"), ("a bag of words", "bag_of_words")):
        other = baselines[key]
        if other is None:
            continue
        test = other["model_against_it"]
        sign = 0 if test["p_value"] >= ALPHA else 1 if test["difference"] > 0 else -1
        found[f"against_{key}"] = _WORDS[sign]
        sentences.append(
            f"{_BASELINE[sign].format(name)} ({other['estimate']:.3f}; difference {test['difference']:+.3f}, 95 % "
            f"{test['lower']:+.3f} to {test['upper']:+.3f}; exact McNemar p = {test['p_value']:.2g})."
        )
    return {**found, "sentence": " ".join(sentences)}


_WORDS = {1: "better", 0: "not distinguishable", -1: "worse"}
_CHANCE = {1: "better than", 0: "not distinguishable from", -1: "worse than"}
_BASELINE = {1: "Better than {}", 0: "Not distinguishable from {}", -1: "Worse than {}"}


def _rate(found: Json) -> str:
    return f"{found['estimate']:.3f} (95 % {found['lower']:.3f} to {found['upper']:.3f}, {found['prompts']} prompts)"
