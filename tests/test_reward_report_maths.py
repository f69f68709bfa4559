"""The statistics of the reward model's report: published examples, closed forms, simulations with known answers."""

from __future__ import annotations

import math
from math import comb

import numpy as np
import pytest
from scipy.special import expit

from rlhf.reward_report.agreement import mid_ranks, ordinal_alpha, spearman
from rlhf.reward_report.baselines import fit_bag_of_words
from rlhf.reward_report.calibration import (
    brier,
    calibrated_errors,
    calibration_error,
    confidences,
    fit_temperature,
    pair_nll,
    reliability,
)
from rlhf.statistics import mcnemar_exact, tango_interval


def by_unit(*observers: str) -> list[list[float]]:
    """One line an observer, a sign a unit, a dot for a missing value."""
    return [[float(v) for v in unit if v != "."] for unit in zip(*(line.split() for line in observers), strict=True)]


# ---- agreement


def test_alpha_equals_the_published_example_with_missing_values() -> None:
    """Krippendorff 2011, example D: four observers, twelve units; ordinal .815 (nominal .743, interval .849)."""
    units = by_unit(
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    )
    assert ordinal_alpha(units) == pytest.approx(0.815, abs=5e-4)


def test_alpha_of_two_values_equals_the_published_binary_example() -> None:
    """The same, example A: two observers, ten units of 0 and 1, .095. With two values all metrics are the same."""
    units = by_unit("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0")
    assert ordinal_alpha(units) == pytest.approx(0.095, abs=5e-4)


def test_alpha_worked_by_hand() -> None:
    """Units (1, 1), (2, 3), (3, 3): counts 2, 1, 3, mid-ranks 1, 2.5, 4.5, squared distances 2.25, 12.25, 4.
    Observed: the unit (2, 3) twice, 8. Expected: 2 (2*1*2.25 + 2*3*12.25 + 1*3*4) / 5 = 180 / 5 = 36."""
    assert ordinal_alpha([[1, 1], [2, 3], [3, 3], [2]]) == pytest.approx(1 - 8 / 36)
    assert ordinal_alpha([[1, 1, 1], [2, 2], [3, 3]]) == pytest.approx(1.0)


def test_alpha_is_of_order_alone_and_undefined_without_variation() -> None:
    units = [[1, 2], [2, 2], [3, 1], [3, 3, 2]]
    assert ordinal_alpha([[v**3 for v in unit] for unit in units]) == pytest.approx(ordinal_alpha(units))
    assert ordinal_alpha([[2, 2], [2, 2]]) is None and ordinal_alpha([[1], [2]]) is None


def test_mid_ranks_and_spearman() -> None:
    assert mid_ranks([30, 10, 30, 20]) == [3.5, 1, 3.5, 2]
    # without ties: 1 - 6 sum d^2 / (n (n^2 - 1)), d = (0, 1, 1, 0), so 1 - 12 / 60
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert spearman([1, 5], [9, 2]) == pytest.approx(-1)
    assert spearman([1, 2], [3, 3]) is None


# ---- calibration


def test_confidence_is_of_the_preferred_side() -> None:
    p, outcome = confidences([math.log(3), -math.log(3), 0.0])
    assert p == pytest.approx([0.75, 0.75, 0.5]) and outcome == pytest.approx([1, 0, 0.5])
    assert brier(p, outcome) == pytest.approx((0.0625 + 0.5625 + 0) / 3)


def test_calibration_error_of_two_bins_by_hand() -> None:
    """Twenty pairs make ten bins of two: five with p .6, outcomes 1 and 0, then five with p .9, outcomes 1 and 1."""
    p, outcome = np.array([0.9] * 10 + [0.6] * 10), np.array([1.0] * 10 + [1.0, 0.0] * 5)
    assert calibration_error(p, outcome) == pytest.approx((10 * 0.1 + 10 * 0.1) / 20)
    bins = reliability(p, outcome)
    assert [part.count for part in bins] == [2] * 10
    assert (bins[0].low, bins[0].high, bins[0].right) == (0.6, 0.6, 1.0) and bins[-1].right == 2.0
    # one high outcome and one low one cancel within a bin, not across bins
    assert calibration_error(np.linspace(0.5, 0.95, 10), np.tile([0.0, 1.0], 5)) == pytest.approx(
        np.abs(np.tile([0.0, 1.0], 5) - np.linspace(0.5, 0.95, 10)).mean()
    )


@pytest.mark.parametrize(("n", "about"), [(100, 0.10), (500, 0.044), (1000, 0.033)])
def test_error_of_a_calibrated_model_is_not_zero(n: int, about: float) -> None:
    p = np.random.default_rng(0).uniform(0.5, 1.0, n)
    assert calibrated_errors(p, 0).mean() == pytest.approx(about, rel=0.15)


def test_calibrated_models_stay_below_the_null_quantile_in_19_of_20_cases() -> None:
    """400 calibrated models: 380 are expected, standard deviation 4.4. One three times too sure hardly ever does."""
    generator = np.random.default_rng(1)
    kept = {1.0: 0, 3.0: 0}
    for seed in range(400):
        d = generator.normal(0, 1.2, 200)
        difference = np.where(generator.random(200) < expit(d), d, -d)  # r(better) - r(worse)
        for scale in kept:
            p, outcome = confidences(scale * difference)
            kept[scale] += calibration_error(p, outcome) <= np.quantile(calibrated_errors(p, seed, 400), 0.95)
    assert abs(kept[1.0] - 380) <= 14
    assert kept[3.0] <= 4


def test_temperature_has_its_closed_form() -> None:
    """Three of four pairs right at |d| = 2: sigmoid(2 / T) = 3/4, so T = 2 / log 3. By weights alike."""
    assert fit_temperature([2, 2, 2, -2], [1] * 4) == pytest.approx(2 / math.log(3))
    assert fit_temperature([2, -2], [3, 1]) == pytest.approx(2 / math.log(3))
    assert pair_nll([2, -2], [3, 1], 2 / math.log(3)) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_temperature_is_recovered() -> None:
    generator = np.random.default_rng(2)
    d = generator.normal(0, 1.5, 20_000)
    difference = np.where(generator.random(len(d)) < expit(d), d, -d)
    fitted = fit_temperature(3 * difference, np.ones(len(d)))
    assert fitted == pytest.approx(3, rel=0.05)
    assert fitted == pytest.approx(3 * fit_temperature(difference, np.ones(len(d))), rel=1e-9)  # type: ignore[operator]


@pytest.mark.parametrize("difference", [[1, 2, 0], [-1, 1], [-2, 1], [0, 0], []])
def test_no_temperature_fits_all_right_or_no_better_than_chance(difference: list[float]) -> None:
    assert fit_temperature(difference, [1] * len(difference)) is None


# ---- baselines


def test_bag_of_words_learns_a_planted_word() -> None:
    """`please` wins and `never` loses among words that mean nothing, at every length."""
    generator = np.random.default_rng(3)
    texts, pairs = [], []
    for i in range(200):
        filler = [" ".join(f"w{k}" for k in generator.integers(0, 30, 8 + int(generator.integers(20)))) for _ in "ab"]
        texts += [f"{filler[0]} please", f"{filler[1]} Never"]
        pairs.append((2 * i, 2 * i + 1))
    model = fit_bag_of_words(texts, pairs, [1.0] * len(pairs))
    assert model is not None
    ranked = sorted(model.place, key=lambda word: model.weight_V[model.place[word]])
    assert (ranked[0], ranked[-1]) == ("never", "please")
    score = model.score(["w1 w2 please", "w1 w2 never", "unknown words"])
    assert score[0] > 0 > score[1] and score[2] == 0
    again = fit_bag_of_words(texts, pairs, [1.0] * len(pairs))
    assert again is not None and np.array_equal(again.weight_V, model.weight_V)


def test_bag_of_words_is_the_penalised_optimum() -> None:
    """Texts of one word each: x is a unit vector, and by symmetry w = (a, -a) with a = weight * sigmoid(-2 a)."""
    model = fit_bag_of_words(["good", "bad", "good.", "bad!"], [(0, 1), (2, 3)], [1.0, 2.0])
    assert model is not None and set(model.place) == {"good", "bad"}
    good, bad = (model.weight_V[model.place[word]] for word in ("good", "bad"))
    assert good == pytest.approx(-bad, abs=1e-6) and good == pytest.approx(3 * expit(-2 * good), abs=1e-4)
    assert fit_bag_of_words(["a", "b"], [(0, 1)], [1.0]) is None  # no word twice


def test_bag_of_words_does_not_read_the_length() -> None:
    """The longer text wins always, by repetition of the same words: nothing is learnt."""
    texts = [text for i in range(20) for text in (f"a{i % 5} b " * 9, f"a{i % 5} b")]
    model = fit_bag_of_words(texts, [(2 * i, 2 * i + 1) for i in range(20)], [1.0] * 20)
    assert model is not None and np.abs(model.weight_V).max() < 1e-6


# ---- paired tests


@pytest.mark.parametrize(("b", "c"), [(0, 5), (8, 2), (3, 3), (0, 0), (13, 12), (40, 20)])
def test_mcnemar_is_the_binomial_tail(b: int, c: int) -> None:
    tail = sum(comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)


@pytest.mark.parametrize(("b", "c", "n", "upper"), [(1, 2, 500, 0.0053), (2, 1, 500, 0.0102), (12, 0, 1000, 0.0191),
                                                    (3, 2, 1000, 0.0057)])  # fmt: skip
def test_tango_upper_bound_equals_the_table(b: int, c: int, n: int, upper: float) -> None:
    assert tango_interval(b, c, n, 0.10)[1] == pytest.approx(upper, abs=6e-5)


def test_tango_interval_mirrors_and_has_its_closed_form() -> None:
    low, high = tango_interval(12, 2, 40, 0.05)
    assert tango_interval(2, 12, 40, 0.05) == pytest.approx((-high, -low), abs=1e-9)
    assert low < 0.25 < high
    # b = n: q = (1 - D) / 2, so the squared score is n (1 - D) / (1 + D), which is z^2 at D = (n - z^2) / (n + z^2)
    z2 = 1.959963984540054**2
    assert tango_interval(50, 0, 50, 0.05) == pytest.approx(((50 - z2) / (50 + z2), 1.0), abs=1e-9)
