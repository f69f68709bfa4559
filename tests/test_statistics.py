"""Numbers from published tables, closed forms and exact binomial tails; coverage by a small simulation."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from rlhf.statistics import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    mean_bound,
    samples_needed,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("k", "n", "bound"),
    [(3, 500, 0.0154), (4, 500, 0.0182), (5, 500, 0.0209), (0, 150, 0.0198), (0, 100, 0.0295), (12, 1000, 0.0194),
     (240, 250, 0.978), (12, 250, 0.0766)],
)  # fmt: skip
def test_upper_bound_equals_the_table(k, n, bound):
    assert clopper_pearson_upper(k, n, 0.05) == pytest.approx(bound, abs=6e-5 if bound < 0.5 else 6e-4)


@pytest.mark.parametrize(("k", "n", "bound"), [(340, 500, 0.644), (110, 200, 0.489), (150, 200, 0.694), (0, 500, 0.0)])
def test_lower_bound_equals_the_table(k, n, bound):
    assert clopper_pearson_lower(k, n, 0.05) == pytest.approx(bound, abs=6e-4)


def test_upper_bound_without_events_has_its_closed_form():
    for n in (1, 7, 150):
        assert clopper_pearson_upper(0, n, 0.05) == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-9)
        assert clopper_pearson_lower(n, n, 0.05) == pytest.approx(0.05 ** (1 / n), rel=1e-9)
        assert clopper_pearson_upper(n, n, 0.05) == 1.0


def test_bounds_invert_the_binomial_tails():
    upper, lower = clopper_pearson_upper(7, 90, 0.03), clopper_pearson_lower(7, 90, 0.03)
    assert binom.cdf(7, 90, upper) == pytest.approx(0.03, rel=1e-6)
    assert binom.sf(6, 90, lower) == pytest.approx(0.03, rel=1e-6)


@pytest.mark.parametrize(("limit", "n"), [(0.02, 100), (0.02, 300), (0.02, 500), (0.05, 200)])
def test_at_the_limit_the_exact_bound_passes_at_most_alpha_of_the_time(limit, n):
    passing = sum(binom.pmf(k, n, limit) for k in range(n + 1) if clopper_pearson_upper(k, n, 0.05) <= limit)
    assert passing <= 0.05


def test_wilson_interval_by_hand():
    # k=0: 0 to z^2/(n+z^2) with z = 1.959964
    low, high = wilson_interval(0, 10, 0.05)
    assert low == 0.0
    assert high == pytest.approx(3.841459 / 13.841459, rel=1e-6)
    low, high = wilson_interval(5, 10, 0.05)
    assert low + high == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [(-1, 5, 0.05), (6, 5, 0.05), (0, 0, 0.05), (1, 5, 0.0)])
def test_impossible_counts_are_refused(bad):
    with pytest.raises(ValueError, match="needs 0 <= k"):
        clopper_pearson_upper(*bad)


@pytest.mark.parametrize(("limit", "n"), [(0.05, 59), (0.02, 149), (0.01, 299), (0.005, 598)])
def test_samples_needed_without_events(limit, n):
    assert samples_needed(limit, 0.05) == n
    assert samples_needed(1 - limit, 0.05, 1.0, "lower") == n


def test_samples_needed_at_a_rate_is_enough_and_none_when_hopeless():
    n = samples_needed(0.02, 0.05, 0.01)
    assert n is not None
    assert clopper_pearson_upper(math.ceil(0.01 * n), n, 0.05) <= 0.02
    assert 500 < n < 1000  # 4 of 500 may pass, 12 of 1000 may
    assert samples_needed(0.02, 0.05, 0.02) is None
    assert samples_needed(0.0, 0.05) is None


def test_mean_bound_counts_clusters_not_samples():
    values = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    names = ["a", "b", "c", "d", "e", "f"]
    alone = mean_bound(values, names, 0.05, "upper")
    copied = mean_bound(values * 50, names * 50, 0.05, "upper")
    assert copied.clusters == 6
    assert (copied.mean, copied.bound) == (alone.mean, alone.bound)
    # Student's bound by hand: mean 2.5, standard error sqrt(3.5/6), t(.95, 5) = 2.015048
    assert alone.bound >= 2.5 + 2.015048 * math.sqrt(3.5 / 6) - 1e-6


def test_mean_bound_mirrors_between_its_sides():
    values = list(np.random.default_rng(0).exponential(size=40))
    names = [str(i) for i in range(40)]
    upper = mean_bound(values, names, 0.05, "upper", seed=3)
    lower = mean_bound([-v for v in values], names, 0.05, "lower", seed=3)
    assert upper.bound == pytest.approx(-lower.bound, rel=1e-12)
    assert upper.bound > upper.mean


def test_sparse_values_give_no_confident_bound_and_equal_ones_a_point():
    names = [str(i) for i in range(30)]
    assert mean_bound([0.0] * 29 + [1.0], names, 0.05, "upper").bound == math.inf
    assert mean_bound([0.3] * 30, names, 0.05, "upper").bound == pytest.approx(0.3)


def test_mean_bound_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="two clusters"):
        mean_bound([1.0, 2.0], ["a", "a"], 0.05, "upper")
    with pytest.raises(ValueError, match="not a finite"):
        mean_bound([1.0, math.nan], ["a", "b"], 0.05, "upper")


def test_mean_bound_covers_a_skewed_mean():
    """Exponential values, true mean 1, 60 clusters of 2: Student's t alone misses in about 8 % of repetitions."""
    generator = np.random.default_rng(11)
    names = [str(i // 2) for i in range(120)]
    missed = 0
    for trial in range(300):
        values = np.repeat(generator.exponential(size=60), 2)
        missed += mean_bound(list(values), names, 0.05, "upper", seed=trial).bound < 1.0
    assert missed / 300 <= 0.085
