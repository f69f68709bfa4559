"""Krippendorff's alpha for ordered values: how far several annotators agree beyond chance. numpy alone.

alpha = 1 - observed disagreement / disagreement expected when the same values are dealt out to the units at random; 1
is agreement, 0 chance, and below 0 is systematic disagreement. Definitions and worked examples: Krippendorff,
"Computing Krippendorff's Alpha-Reliability" (2011).

Shapes: U units, V distinct values in ascending order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ordinal_alpha(units: Sequence[Sequence[float]]) -> float | None:
    """alpha with the ordinal metric. `units[u]` holds the values that annotators gave to unit u, missing ones left out.

    A unit with fewer than two values says nothing of agreement and is left out. None if no unit has two, or if all
    values are the same: without any variation alpha is 0 / 0.
    """
    paired = [list(unit) for unit in units if len(unit) >= 2]
    values = sorted({value for unit in paired for value in unit})
    if len(values) < 2:
        return None
    place = {value: i for i, value in enumerate(values)}
    coincidence_VV = np.zeros((len(values), len(values)))
    for unit in paired:
        count_V = np.bincount([place[value] for value in unit], minlength=len(values)).astype(float)
        coincidence_VV += (np.outer(count_V, count_V) - np.diag(count_V)) / (len(unit) - 1)
    count_V = coincidence_VV.sum(axis=1)
    # The ordinal metric, the number of values from c to k with half of those at each end, squared: it is the
    # difference of two mid-ranks.
    middle_V = np.cumsum(count_V) - count_V / 2
    distance_VV = (middle_V[:, None] - middle_V[None, :]) ** 2
    observed = float((coincidence_VV * distance_VV).sum())
    expected = float((np.outer(count_V, count_V) * distance_VV).sum()) / (count_V.sum() - 1)
    return float(1 - observed / expected)


def mid_ranks(values: Sequence[float]) -> list[float]:
    """The place of each value from 1 (the smallest) on; equal values share the mean of their places."""
    _, place_N, count_V = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    middle_V = np.cumsum(count_V) - (count_V - 1) / 2
    return [float(rank) for rank in middle_V[place_N]]


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Rank correlation, ties by mid-ranks; None if either side is constant."""
    left_N, right_N = np.array(mid_ranks(left)), np.array(mid_ranks(right))
    left_N, right_N = left_N - left_N.mean(), right_N - right_N.mean()
    spread = float(np.sqrt((left_N**2).sum() * (right_N**2).sum()))
    return float((left_N * right_N).sum()) / spread if spread > 0 else None
