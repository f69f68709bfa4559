"""What pairs can be told apart by without a language model: the words alone. numpy and scipy alone, deterministic.

A Bradley-Terry model on the words of a response: P(i over j) = sigmoid(w x_i - w x_j), with x the response's words,
weighted by tf-idf and scaled to unit length (so that x does not know how long the response is), and an L2 penalty.
The prompt is the same on both sides of a pair and drops out.

Shapes: N responses, P pairs, V words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit

WORDS = 20_000  # the most common ones
L2 = 1.0  # against the sum over prompts of their mean cross-entropy
_WORD = re.compile(r"\w+")


@dataclass(kw_only=True, slots=True)
class BagOfWords:
    place: dict[str, int]
    rarity_V: NDArray[np.float64]
    weight_V: NDArray[np.float64]

    def score(self, texts: Sequence[str]) -> list[float]:
        """w x of each text; a text without a known word has 0."""
        return [float(score) for score in _features(texts, self.place, self.rarity_V) @ self.weight_V]


def fit_bag_of_words(
    texts: Sequence[str], pairs: Sequence[tuple[int, int]], weights: Sequence[float]
) -> BagOfWords | None:  # fmt: skip
    """Fit to strict pairs, (better, worse) as places in `texts`, that weigh `weights`.

    Words of at least two different texts count. None if there is no pair or no such word.
    """
    distinct = sorted(set(texts))
    spread = Counter(word for text in distinct for word in set(_words(text)))
    common = sorted((word for word, count in spread.items() if count >= 2), key=lambda word: (-spread[word], word))
    place = {word: i for i, word in enumerate(common[:WORDS])}
    if not place or not pairs:
        return None
    rarity_V = np.array([1 + np.log((1 + len(distinct)) / (1 + spread[word])) for word in place])
    x_NV = _features(texts, place, rarity_V)
    better_P, worse_P = np.array(pairs).T
    weight_P = np.asarray(weights, dtype=float)

    def loss(w_V: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        score_N = x_NV @ w_V
        margin_P = score_N[better_P] - score_N[worse_P]
        pull_P = weight_P * expit(-margin_P)
        slope_N = np.bincount(worse_P, pull_P, len(score_N)) - np.bincount(better_P, pull_P, len(score_N))
        value = float((weight_P * np.logaddexp(0.0, -margin_P)).sum() + L2 / 2 * (w_V @ w_V))
        return value, x_NV.T @ slope_N + L2 * w_V

    found = minimize(loss, np.zeros(len(place)), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return BagOfWords(place=place, rarity_V=rarity_V, weight_V=found.x)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _features(texts: Sequence[str], place: dict[str, int], rarity_V: NDArray[np.float64]) -> Any:
    """Sparse x_NV: (1 + log count) times rarity, each row of length 1 or empty."""
    rows, columns, values = [], [], []
    for i, text in enumerate(texts):
        counts = Counter(word for word in _words(text) if word in place)
        value_W = [(1 + np.log(count)) * rarity_V[place[word]] for word, count in counts.items()]
        length = float(np.sqrt(np.sum(np.square(value_W))))
        rows += [i] * len(counts)
        columns += [place[word] for word in counts]
        values += [value / length for value in value_W]
    return csr_matrix((values, (rows, columns)), shape=(len(texts), len(place)))
