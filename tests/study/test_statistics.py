"""Intervals, equivalence and sample sizes: against scipy's tests, and on simulated studies whose truth is known."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from amclr_scale.study.statistics.decisions import (
    Estimate,
    Verdict,
    decide,
    estimate,
    holm,
    paired,
    with_items,
)
from amclr_scale.study.statistics.power import (
    detectable_difference,
    power_of_difference,
    power_of_equivalence,
    seeds_needed,
    seeds_needed_for_equivalence,
)

STUDIES = 6000
NOISE = 3.5 * math.sqrt(0.05 * 0.95 / STUDIES)  # what a simulated share of 5 % may be off by chance


def simulated(mean: float, sigma: float, n: int, seed: int = 0) -> list[Estimate]:
    """Studies with normal paired differences."""
    drawn = np.random.default_rng(seed).normal(mean, sigma, (STUDIES, n))
    return [estimate(list(row)) for row in drawn]


def test_paired_differences_are_scipys():
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.2, 0.02, 7), rng.normal(0.21, 0.02, 7)
    found = paired(list(first), list(second))
    oracle = stats.ttest_rel(second, first)
    interval = oracle.confidence_interval(0.95)
    assert found.p_different() == pytest.approx(oracle.pvalue, rel=1e-9)
    assert found.interval() == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert (found.value, found.n, found.degrees_of_freedom) == (pytest.approx(np.mean(second - first)), 7, 6)
    assert found.deviation == pytest.approx(np.std(second - first, ddof=1))


@pytest.mark.parametrize("margin", [0.001, 0.01, 0.05])
def test_equivalence_is_two_one_sided_tests(margin):
    d = np.random.default_rng(2).normal(0.003, 0.01, 5)
    found = estimate(list(d))
    lower = stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    upper = stats.ttest_1samp(d, margin, alternative="less").pvalue
    assert found.p_equivalent(margin) == pytest.approx(max(lower, upper), rel=1e-9)
    assert found.p_not_worse(margin) == pytest.approx(lower, rel=1e-9)
    inside = [-margin < end < margin for end in found.interval(0.90)]
    assert all(inside) == (found.p_equivalent(margin) < 0.05)  # the other way to say it


def test_values_of_statsmodels():
    """statsmodels 0.15.0: ttost_paired, TTestPower and TTestIndPower, multipletests."""
    first, second = [0.21, 0.19, 0.24, 0.2], [0.214, 0.195, 0.238, 0.206]
    assert paired(first, second).p_equivalent(0.01) == pytest.approx(0.016486934968261948, rel=1e-6)
    assert power_of_difference(1, 0.5, 8) == pytest.approx(0.232077005, abs=5e-6)
    assert power_of_difference(1, 0.5, 8, paired=False) == pytest.approx(0.154047502, abs=5e-6)
    assert holm([0.02, 0.3, 0.011, 0.04]) == pytest.approx([0.06, 0.3, 0.044, 0.08])


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_as_often_as_they_say(n):
    ends = np.array([one.interval() for one in simulated(0.3, 2.0, n)])
    covered = np.mean((ends[:, 0] <= 0.3) & (ends[:, 1] >= 0.3))
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_equivalence_is_claimed_falsely_at_most_five_times_in_a_hundred(n, sigma):
    claimed = np.mean([one.p_equivalent(1.0) < 0.05 for one in simulated(1.0, sigma, n)])  # truth: at the margin
    assert claimed < 0.05 + NOISE
    if sigma == 0.2:  # far from the other margin the size is exact
        assert claimed > 0.05 - NOISE


@pytest.mark.parametrize("n", [4, 12])
def test_power_is_as_predicted(n):
    tested = simulated(0.5, 1.0, n)
    found = np.mean([one.p_different() < 0.05 for one in tested])
    assert found == pytest.approx(power_of_difference(1.0, 0.5, n), abs=0.02)
    equal = simulated(0.2, 1.0, n)
    shown = np.mean([one.p_equivalent(1.2) < 0.05 for one in equal])
    assert shown == pytest.approx(power_of_equivalence(1.0, 1.2, n, difference=0.2), abs=0.02)


def test_power_without_pairs():
    rng = np.random.default_rng(3)
    first, second = rng.normal(0, 1, (STUDIES, 8)), rng.normal(1, 1, (STUDIES, 8))
    found = np.mean(stats.ttest_ind(first, second, axis=1).pvalue < 0.05)
    assert found == pytest.approx(power_of_difference(1.0, 1.0, 8, paired=False), abs=0.02)


def test_seeds_needed_is_the_smallest_number_with_the_power():
    n = seeds_needed(0.01, 0.005)
    assert power_of_difference(0.01, 0.005, n) >= 0.8 > power_of_difference(0.01, 0.005, n - 1)
    n = seeds_needed_for_equivalence(0.01, 0.005)
    assert power_of_equivalence(0.01, 0.005, n) >= 0.8 > power_of_equivalence(0.01, 0.005, n - 1)


def test_power_is_a_number_everywhere_and_grows():
    """scipy's noncentral t is nan at (2 seeds, 8 sigma) and (10 seeds, 8 sigma)."""
    for n in (2, 3, 10, 100):
        for alpha in (0.05, 0.001):
            powers = [power_of_difference(1.0, delta, n, alpha=alpha) for delta in (0.25, 0.5, 1, 2, 4, 8, 16, 1024)]
            assert np.all(np.diff(powers) >= -1e-9)
            assert 0 < powers[0] <= powers[-1] <= 1 + 1e-9


@pytest.mark.parametrize("n", [2, 3, 10])
def test_detectable_difference_has_the_power(n):
    found = detectable_difference(0.01, n)
    assert power_of_difference(0.01, found, n) == pytest.approx(0.8, abs=1e-6)
    assert detectable_difference(0.01, n, alpha=0.001) > found


def test_seeds_needed_approaches_the_normal_approximation():
    sigma, delta = 0.02, 0.002
    approximate = 15.7 * sigma**2 / delta**2
    assert seeds_needed(sigma, delta, paired=False) == pytest.approx(approximate, rel=0.01)
    assert seeds_needed(sigma, delta) == pytest.approx(approximate / 2, rel=0.01)  # sigma: of the differences


@pytest.mark.parametrize(("sigma", "match", "difference"), [(0.25, 4, 5), (0.5, 11, 10), (1, 36, 34), (2, 139, 128)])
def test_seeds_needed_of_the_documentation(sigma, match, difference):
    assert seeds_needed_for_equivalence(sigma, 0.5) == match
    assert seeds_needed(sigma, 0.5) == difference
    row = f"| {sigma:g} point{'' if sigma == 1 else 's'} | {match} | {difference} |"
    assert row in Path("docs/studies.md").read_text()


def test_seeds_needed_at_the_ends():
    assert seeds_needed(0.0, 0.005) == 2
    assert seeds_needed_for_equivalence(0.01, 0.005, difference=0.005) is None
    assert seeds_needed(10.0, 1e-6) is None
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="delta: expected a number above 0"):
            seeds_needed(1.0, wrong)
    with pytest.raises(ValueError, match="sigma: expected"):
        seeds_needed(-1.0, 1.0)


def test_holm_worked_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with_unknown = holm([0.01, math.nan, 0.02])
    assert with_unknown[0] == pytest.approx(0.03)  # the unknown one is a member of the family
    assert math.isnan(with_unknown[1])


def test_holm_keeps_the_family_wise_error():
    rng = np.random.default_rng(4)
    wrong = np.mean([min(holm(list(p))) < 0.05 for p in rng.uniform(size=(STUDIES, 6))])
    assert wrong < 0.05 + NOISE


def test_verdicts():
    sure = {"standard_error": 0.001, "degrees_of_freedom": 20, "n": 21}
    family = [
        Estimate(0.0005, **sure),
        Estimate(0.02, **sure),
        Estimate(-0.02, **sure),
        Estimate(0.004, 0.004, 2, 3),
        Estimate(0.5, math.nan, 0, 1),
    ]
    words = [one.verdict for one in decide(family, 0.005)]
    assert words == [Verdict.MATCHES, Verdict.BETTER, Verdict.WORSE, Verdict.UNDECIDED, Verdict.UNDECIDED]


def test_a_small_difference_that_is_shown_still_matches():
    (one,) = decide([Estimate(0.003, 0.0003, 30, 31)], 0.005)
    assert one.verdict == Verdict.MATCHES
    assert one.p_different < 0.05


def test_one_seed_decides_nothing_and_identical_seeds_decide_all():
    alone = estimate([0.4])
    assert all(math.isnan(end) for end in alone.interval())
    assert math.isnan(alone.p_equivalent(0.1))
    assert math.isnan(alone.p_different())
    same = paired([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (same.p_equivalent(0.005), same.p_different(), same.interval()) == (0.0, 1.0, (0.0, 0.0))
    shifted = estimate([0.25, 0.25])
    assert (shifted.p_equivalent(0.005), shifted.p_different()) == (1.0, 0.0)


def test_items_widen_an_interval_and_change_nothing_without_spread():
    seeds = estimate([0.01, 0.02, 0.03])
    both = with_items(seeds, 0.01, 500)
    assert both.value == seeds.value
    halves = [one.interval()[1] - one.value for one in (seeds, both)]
    assert halves[1] == pytest.approx(math.hypot(halves[0], stats.t.ppf(0.975, 499) * 0.01))
    nothing = with_items(seeds, 0.0, 500)
    assert (nothing.interval(), nothing.p_equivalent(0.05)) == (seeds.interval(), seeds.p_equivalent(0.05))


def test_p_values_and_intervals_say_the_same_with_items():
    both = with_items(estimate([0.01, 0.02, 0.03, 0.015]), 0.004, 300)
    for level in (0.5, 0.9, 0.99):
        low, high = both.interval(level)
        assert both.p_above(low) == pytest.approx((1 - level) / 2, rel=1e-6)
        assert both.p_below(high) == pytest.approx((1 - level) / 2, rel=1e-6)
        assert both.p_above(high) == pytest.approx((1 + level) / 2, rel=1e-6)
    seeds = estimate([0.01, 0.02, 0.03, 0.015])
    assert both.p_different() > seeds.p_different()  # no claim is easier about new items
    assert with_items(estimate([0.5, 0.5]), 1e-6, 300).p_different() < 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired([1.0], [1.0, 2.0]), "second: expected the seeds of first"),
        (lambda: estimate([]), "values: expected one value per seed"),
        (lambda: estimate([1.0, 2.0]).p_equivalent(0.0), "margin: expected a number above 0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_seeds_needed_are_those_of_a_single_comparison():
    """The power that is promised is had by one; of several that Holm adjusts, each has what docs/studies.md says."""
    rng, n = np.random.default_rng(0), seeds_needed_for_equivalence(1.0, 1.0)

    def shown(comparisons):
        families = rng.normal(size=(1000, comparisons, n))
        verdicts = [one.verdict for family in families for one in decide(list(map(estimate, family)), 1.0)]
        return np.mean([verdict is Verdict.MATCHES for verdict in verdicts])

    assert shown(1) > 0.8
    assert shown(3) == pytest.approx(0.75, abs=0.03)
    assert shown(6) == pytest.approx(0.57, abs=0.03)
