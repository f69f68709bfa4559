"""Whether sigmoid(reward difference) is the rate at which the model is right. numpy and scipy alone.

A pair is read from the side that the model prefers: its confidence is p = sigmoid(|d|), from 1/2 to 1, and its outcome
is 1 if the annotator preferred that side too. So it cannot matter which response a file names first.

The calibration error of a perfectly calibrated model is not 0: with 10 bins and n = 100 it is about .10, since each
bin's rate is that of a few pairs. It is therefore compared with its own distribution under the model's probabilities,
simulated. That needs independent pairs: give one a prompt.

Shapes: P pairs, S simulations, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

BINS = 10
SIMULATIONS = 2000
Array = NDArray[np.float64]


def confidences(difference_P: Sequence[float]) -> tuple[Array, Array]:
    """p_P and outcome_P of pairs whose difference is r(better) - r(worse). Equal rewards: p 1/2, outcome 1/2."""
    d_P = np.asarray(difference_P, dtype=float)
    return expit(np.abs(d_P)), (1 + np.sign(d_P)) / 2


@dataclass(kw_only=True, slots=True)
class Bin:
    """Pairs of neighbouring confidence."""

    low: float
    high: float
    count: int
    confidence: float  # mean
    right: float  # sum of the outcomes


def reliability(p_P: Array, outcome_P: Array) -> list[Bin]:
    """Bins of equal numbers of pairs in order of confidence, at most BINS. With bins of equal width, all pairs of a
    model that is nowhere sure would lie in one."""
    order = np.argsort(p_P, kind="stable")
    return [
        Bin(low=float(p_P[part[0]]), high=float(p_P[part[-1]]), count=len(part), confidence=float(p_P[part].mean()),
            right=float(outcome_P[part].sum()))
        for part in np.array_split(order, min(BINS, len(p_P))) if len(part)
    ]  # fmt: skip


def calibration_error(p_P: Array, outcome_P: Array) -> float:
    """Expected calibration error: the mean over pairs of their bin's |rate of right outcomes - mean confidence|."""
    bins = reliability(p_P, outcome_P)
    return sum(abs(part.right - part.count * part.confidence) for part in bins) / len(p_P)


def calibrated_errors(p_P: Array, seed: int, simulations: int = SIMULATIONS) -> Array:
    """The calibration errors of S draws of outcomes that happen with probability p: the error of a calibrated model."""
    generator = np.random.default_rng(seed)
    sorted_P = np.sort(p_P)
    starts_B = [part[0] for part in np.array_split(np.arange(len(p_P)), min(BINS, len(p_P)))]
    mean_B = np.add.reduceat(sorted_P, starts_B)
    found = []
    chunk = max(1, 4_000_000 // len(p_P))
    for start in range(0, simulations, chunk):
        outcome_SP = generator.random((min(chunk, simulations - start), len(p_P))) < sorted_P
        found.append(np.abs(np.add.reduceat(outcome_SP.astype(float), starts_B, axis=1) - mean_B).sum(axis=1))
    return np.concatenate(found) / len(p_P)


def brier(p_P: Array, outcome_P: Array) -> float:
    """Mean squared error of the confidence; 1/4 for a model that is never sure."""
    return float(((p_P - outcome_P) ** 2).mean())


def pair_nll(difference_P: Sequence[float], weight_P: Sequence[float], temperature: float = 1.0) -> float:
    """Weighted mean of -log sigmoid(d / temperature), nats a pair; log 2 = .693 for a model that is never sure."""
    d_P, w_P = np.asarray(difference_P, dtype=float), np.asarray(weight_P, dtype=float)
    return float((w_P * np.logaddexp(0.0, -d_P / temperature)).sum() / w_P.sum())


def fit_temperature(difference_P: Sequence[float], weight_P: Sequence[float]) -> float | None:
    """The T > 0 that maximises the weighted likelihood of sigmoid(d / T), d being r(better) - r(worse).

    Above 1 the model is too sure, below 1 not sure enough. None if there is no such T: at d >= 0 throughout the
    likelihood grows for ever as T falls, and at a mean d of 0 or less it is highest at no finite positive T.
    """
    d_P, w_P = np.asarray(difference_P, dtype=float), np.asarray(weight_P, dtype=float)
    scale = float(np.abs(d_P).max(initial=0.0))
    if scale == 0 or d_P.min() >= 0 or (w_P * d_P).sum() <= 0:
        return None
    d_P = d_P / scale

    def slope(inverse: float) -> float:
        """Of the log-likelihood in 1/T, which is concave."""
        return float((w_P * d_P * expit(-inverse * d_P)).sum())

    low, high = 0.0, 1.0
    while slope(high) > 0:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return scale / ((low + high) / 2)
