"""Bounds that decide: exact for counts, skew-aware and clustered for means. numpy and scipy alone, no torch.

All bounds are one-sided at level `alpha`: in at most that share of repetitions they miss the true value. An interval
for people to look at is two-sided at `alpha`. The point estimate never decides anything: at the limit itself it is
right half of the time (false pass .5 to .7 in simulation), the exact bound at most `alpha` of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import betainc, betaincinv, ndtri, stdtrit  # scipy.stats takes a second to import

Side = Literal["upper", "lower"]


def _check_count(k: int, n: int, alpha: float) -> None:
    if not (n >= 1 and 0 <= k <= n and 0 < alpha < 1):
        raise ValueError(f"needs 0 <= k <= n, n >= 1 and 0 < alpha < 1, not k={k}, n={n}, alpha={alpha}")


def clopper_pearson_upper(k: int, n: int, alpha: float) -> float:
    """Largest rate at which `k` or fewer events in `n` independent trials still have probability `alpha`.

    Exact: the true rate lies above it with probability at most `alpha`, at any n (Clopper and Pearson 1934).
    For k = 0 it is 1 - alpha^(1/n); for k = n it is 1.
    """
    _check_count(k, n, alpha)
    return 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - alpha))


def clopper_pearson_lower(k: int, n: int, alpha: float) -> float:
    """Smallest rate at which `k` or more events in `n` trials still have probability `alpha`; 0 for k = 0."""
    _check_count(k, n, alpha)
    return 0.0 if k == 0 else float(betaincinv(k, n - k + 1, alpha))


def wilson_interval(k: int, n: int, alpha: float) -> tuple[float, float]:
    """Two-sided score interval (Wilson 1927), for display: shorter than the exact one, and sometimes too short."""
    _check_count(k, n, alpha)
    z = float(ndtri(1 - alpha / 2))
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided p-value of the paired test of two rates: `b` trials where only the first was right, `c` where only the
    second was. Under equal rates b is binomial with b + c trials and one half (McNemar 1947); twice the smaller tail.
    """
    if not (b >= 0 and c >= 0):
        raise ValueError(f"needs counts, not b={b}, c={c}")
    low, n = min(b, c), b + c
    if 2 * low == n:
        return 1.0
    return min(1.0, 2 * float(betainc(n - low, low + 1, 0.5)))  # P(X <= low)


def tango_interval(b: int, c: int, n: int, alpha: float) -> tuple[float, float]:
    """Two-sided score interval of the difference of two paired rates, (b - c) / n in `n` trials (Tango 1998).

    Each end is the difference D at which the score statistic (b - c - n D) / sqrt(n (2 q + D (1 - D))) is the normal
    quantile, q being the most likely share of `c` under D. Approximate; it does not collapse where c or b is 0.
    """
    if not (b >= 0 and c >= 0 and n >= 1 and b + c <= n and 0 < alpha < 1):
        raise ValueError(f"needs 0 <= b + c <= n, n >= 1 and 0 < alpha < 1, not b={b}, c={c}, n={n}, alpha={alpha}")
    z = float(ndtri(1 - alpha / 2))

    def score(difference: float) -> float:
        linear = -b - c + (2 * n - b + c) * difference
        root = linear * linear + 8 * n * c * difference * (1 - difference)
        q = (math.sqrt(max(root, 0.0)) - linear) / (4 * n)
        spread = math.sqrt(max(n * (2 * q + difference * (1 - difference)), 1e-300))
        return (b - c - n * difference) / spread

    def solve(target: float, low: float, high: float) -> float:
        for _ in range(100):  # the score falls as the difference grows
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    estimate = (b - c) / n
    return solve(z, -1.0, estimate), solve(-z, estimate, 1.0)


@dataclass(kw_only=True, slots=True)
class MeanBound:
    mean: float
    bound: float  # infinite if the values are too sparse for any bound at this level
    clusters: int


def mean_bound(
    values: Sequence[float], clusters: Sequence[str], alpha: float, side: Side, seed: int = 0
) -> MeanBound:  # fmt: skip
    """One-sided bound of the mean of `values` whose errors are shared within a cluster (the samples of one prompt).

    Each cluster is reduced to its mean, so that the number of independent things is the number of clusters, however
    many samples each has. Over these, the bootstrap-t: 2,000 resamples of clusters, each studentised by its own
    standard error. Unlike Student's t it follows the skew of KL and reward differences (its error falls as 1/n, not
    1/sqrt(n)), and unlike the percentile bootstrap it is not too short at small n. The bound that is farther from
    the mean, of the bootstrap-t and Student's t, is taken: neither may flatter.

    A resample without spread counts as infinitely far, so that sparse values (all zero but a few) give an infinite
    bound, not a confident one. If all clusters have the same mean, the bound is that mean.

    values, clusters: one entry a sample. Raises ValueError for fewer than two clusters or a non-finite value.
    """
    sums: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"{value} in cluster {cluster!r} is not a finite number")
        sums.setdefault(cluster, []).append(float(value))
    if len(sums) < 2:
        raise ValueError(f"a bound of a mean needs at least two clusters, not {len(sums)}")
    x_C = np.array([math.fsum(group) / len(group) for group in sums.values()])
    count, mean = len(x_C), float(x_C.mean())
    error = float(x_C.std(ddof=1)) / math.sqrt(count)
    if float(np.ptp(x_C)) <= 1e-12 * max(1.0, float(np.abs(x_C).max())):
        return MeanBound(mean=mean, bound=mean, clusters=count)
    sign = 1.0 if side == "upper" else -1.0
    student = float(stdtrit(count - 1, 1 - alpha))
    resampled = _bootstrap_t(sign * x_C, alpha, seed)
    return MeanBound(mean=mean, bound=mean + sign * max(student, resampled) * error, clusters=count)


def _bootstrap_t(x_C: np.ndarray, alpha: float, seed: int, resamples: int = 2000) -> float:
    """How many standard errors above its estimate the mean must be taken to lie: -quantile_alpha of t*."""
    generator = np.random.default_rng(seed)
    count, mean = len(x_C), x_C.mean()
    chunks = []
    for start in range(0, resamples, 200):
        drawn_RC = x_C[generator.integers(0, count, size=(min(200, resamples - start), count))]
        shift_R = drawn_RC.mean(axis=1) - mean
        error_R = drawn_RC.std(axis=1, ddof=1) / math.sqrt(count)
        flat_R = error_R <= 1e-12 * max(1.0, float(np.abs(x_C).max()))
        chunks.append(np.where(flat_R, np.copysign(np.inf, shift_R), shift_R / np.where(flat_R, 1.0, error_R)))
    t_R = np.sort(np.concatenate(chunks))
    return -float(t_R[max(0, math.floor(alpha * (resamples + 1)) - 1)])


def samples_needed(limit: float, alpha: float, rate: float = 0.0, side: Side = "upper") -> int | None:
    """About how many trials let the exact bound keep `limit` if the event goes on at `rate`.

    side "upper": the rate must be shown to be at most `limit`; "lower": at least `limit`. At rate 0 (or 1 for
    "lower") this is the fewest trials with which anything can be shown. None if no number suffices (the rate does
    not keep the limit itself, or it would take more than 10 million).
    """
    if side == "lower":
        return samples_needed(1 - limit, alpha, 1 - rate, "upper")
    if limit >= 1:
        return 1
    if limit <= 0 or rate >= limit:
        return None

    def enough(n: int) -> bool:
        return clopper_pearson_upper(math.ceil(rate * n - 1e-9), n, alpha) <= limit

    high = 1
    while not enough(high):
        high *= 2
        if high > 10_000_000:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
