"""Statistics of scores against known values, and intervals against data whose mean is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from s3d.segmentation.comparison import (
    Interval,
    average_with_interval,
    compare_runs,
    holm,
    mean_score,
    mean_with_interval,
    ranks,
    signed_rank_test,
)

NAN = math.nan


def test_means_leave_out_what_is_not_there() -> None:
    scores = np.array([[0.2, NAN, 0.4], [NAN, NAN, NAN]])
    np.testing.assert_array_equal(mean_score(scores, axis=1), [0.2 / 2 + 0.4 / 2, NAN])
    np.testing.assert_array_equal(mean_score(scores, axis=0), [0.2, NAN, 0.4])


def test_interval_is_the_bootstrap_of_scipy() -> None:
    from scipy.stats import bootstrap

    scores = np.random.default_rng(0).beta(8, 2, size=52)
    found = mean_with_interval(scores, confidence=0.9)
    expected = bootstrap((scores,), np.mean, method="percentile", confidence_level=0.9, rng=1).confidence_interval
    assert found.mean == pytest.approx(scores.mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.001)
    assert mean_with_interval(scores, confidence=0.9) == found  # the draws are seeded
    padded = np.insert(scores, [0, 10, 52], NAN)
    assert mean_with_interval(padded, confidence=0.9) == found


def _covered(
    draw: Callable[[np.random.Generator], NDArray[np.float64]], confidence: float = 0.95, times: int = 1000
) -> float:
    """Share of the intervals that hold the true mean, 0."""
    generator = np.random.default_rng(1)
    intervals = [
        mean_with_interval(draw(generator), resamples=500, confidence=confidence, seed=k) for k in range(times)
    ]
    return float(np.mean([interval.low <= 0 <= interval.high for interval in intervals]))


def test_intervals_over_cases_hold_the_true_mean_as_often_as_they_say() -> None:
    def draw(generator: np.random.Generator) -> NDArray[np.float64]:
        return generator.normal(size=40)

    assert 0.92 <= _covered(draw) <= 0.96
    assert 0.46 <= _covered(draw, confidence=0.5) <= 0.54


def test_intervals_over_cases_and_seeds_hold_the_true_mean() -> None:
    def draw(generator: np.random.Generator) -> NDArray[np.float64]:
        of_seed, of_case = generator.normal(size=(8, 1)), generator.normal(size=(1, 40))
        return of_seed + of_case + generator.normal(size=(8, 40))

    assert 0.86 <= _covered(draw, times=200) <= 0.97
    # As if every score were independent of the others, or the seeds were given.
    assert _covered(lambda generator: draw(generator).ravel(), times=100) < 0.6
    assert _covered(lambda generator: draw(generator).mean(axis=0), times=100) < 0.8


def test_interval_of_seeds_without_all_scores() -> None:
    scores = np.array([[0.5, NAN, 0.7], [0.6, NAN, NAN]])
    interval = mean_with_interval(scores)
    assert interval.mean == pytest.approx(0.6)
    assert (interval.low, interval.high) == pytest.approx((0.5, 0.7))


def test_intervals_that_do_not_exist() -> None:
    assert str(mean_with_interval(np.array([NAN, NAN]))) == str(Interval(NAN, NAN, NAN))
    assert str(mean_with_interval(np.array([]))) == str(Interval(NAN, NAN, NAN))
    assert str(mean_with_interval(np.array([0.5, NAN]))) == str(Interval(0.5, NAN, NAN))
    assert mean_with_interval(np.full(9, 0.25)) == Interval(0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match=r"must be \[cases\] or \[seeds, cases\], got shape \(1, 2, 3\)"):
        mean_with_interval(np.zeros((1, 2, 3)))


def test_signed_rank_test() -> None:
    first = np.array([0.1, 0.2, 0.3, 0.4, 0.5, NAN, 0.9])
    second = first + np.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.1, NAN])
    assert signed_rank_test(first, second) == pytest.approx(2 / 2**5)  # all five of one sign
    assert signed_rank_test(second, first) == pytest.approx(2 / 2**5)
    assert signed_rank_test(first, first) == 1
    assert signed_rank_test(first[:0], first[:0]) == 1


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]).tolist() == [1, 1]
    assert holm([0.2]).tolist() == [0.2]
    assert holm([]).tolist() == []


def test_runs_are_compared_in_pairs() -> None:
    generator = np.random.default_rng(0)
    base = generator.uniform(0.5, 0.8, size=30)
    better, same = base + generator.uniform(0.05, 0.15, size=30), base + generator.normal(0, 0.02, size=30)
    better[3] = NAN
    pairs = compare_runs({"base": base, "better": better, "same": same})
    assert [(pair.first, pair.second) for pair in pairs] == [("base", "better"), ("base", "same"), ("better", "same")]
    assert [pair.cases for pair in pairs] == [29, 30, 29]
    assert pairs[0].difference.mean == pytest.approx(np.nanmean(better - base))
    assert 0.05 < pairs[0].difference.low < pairs[0].difference.high < 0.15
    assert pairs[2].difference.mean < 0
    assert pairs[0].p_value < 1e-6 < 0.01 < pairs[1].p_value
    np.testing.assert_allclose([pair.p_holm for pair in pairs], holm([pair.p_value for pair in pairs]))


def test_ranks_share_places() -> None:
    scores = np.array([[0.9, 0.8, 0.7], [0.5, 0.6, 0.5], [0.4, 0.4, 0.4]])
    found = ranks(scores)
    assert found.tolist() == [[1, 2, 3], [2.5, 1, 2.5], [2, 2, 2]]
    assert found.mean(axis=0).tolist() == pytest.approx([5.5 / 3, 5 / 3, 7.5 / 3])
    with pytest.raises(ValueError, match="every run needs a score on every data set"):
        ranks(np.array([[0.9, NAN]]))


def test_average_over_data_sets_counts_them_alike() -> None:
    small, large = np.array([[0.2, 0.4]]), np.array([[0.8, 0.9, 1.0, NAN, 0.9]])
    interval = average_with_interval([small, large])
    assert interval.mean == pytest.approx((0.3 + 0.9) / 2)
    assert 0.5 <= interval.low < interval.mean < interval.high <= 0.7
    assert average_with_interval([large]) == mean_with_interval(large)
    # Variances of independent means add up: half of the square root of their sum.
    generator = np.random.default_rng(0)
    tables = [generator.normal(size=(1, 60)) for _ in range(2)]
    widths = [interval.high - interval.low for interval in map(mean_with_interval, tables)]
    both = average_with_interval(tables)
    assert both.high - both.low == pytest.approx(math.hypot(*widths) / 2, rel=0.03)


def test_average_of_the_same_cases_draws_them_together() -> None:
    table = np.random.default_rng(0).normal(size=(1, 60))
    alone = mean_with_interval(table)
    # Twice the same is not known better; and against itself reversed the mean does not move.
    assert average_with_interval([table, table], ["liver", "liver"]) == alone
    fixed = average_with_interval([table, -table], ["liver", "liver"])
    assert (fixed.low, fixed.high) == pytest.approx((0, 0), abs=1e-12)
    apart = average_with_interval([table, table], ["liver", "spleen"])
    assert apart.high - apart.low < 0.8 * (alone.high - alone.low)


def test_average_draws_seeds_for_all_data_sets_together() -> None:
    of_seed = np.array([[-1.0], [0.0], [1.0]])
    tables = [np.repeat(of_seed, 5, axis=1), np.repeat(of_seed, 9, axis=1)]
    assert average_with_interval(tables) == mean_with_interval(tables[0])
    against_each_other = average_with_interval([tables[0], -tables[1]])
    assert (against_each_other.low, against_each_other.high) == pytest.approx((0, 0), abs=1e-12)


def test_intervals_of_averages_hold_the_true_mean() -> None:
    generator = np.random.default_rng(2)
    held = []
    for k in range(200):
        tables = [generator.normal(size=(8, 1)) + generator.normal(size=(8, n)) for n in (20, 40)]
        interval = average_with_interval(tables, resamples=500, seed=k)
        held.append(interval.low <= 0 <= interval.high)
    assert 0.86 <= np.mean(held) <= 0.97


def test_averages_that_do_not_exist() -> None:
    assert str(average_with_interval([])) == str(Interval(NAN, NAN, NAN))
    assert str(average_with_interval([np.ones((1, 2)), np.full((1, 2), NAN)])) == str(Interval(NAN, NAN, NAN))
    assert str(average_with_interval([np.zeros((1, 1)), np.ones((1, 1))])) == str(Interval(0.5, NAN, NAN))
    with pytest.raises(ValueError, match="tables must have the same seeds, got 1, 2"):
        average_with_interval([np.ones((1, 2)), np.ones((2, 2))])
    with pytest.raises(ValueError, match=r"same cases \(liver\) must have the same shape, got \(1, 2\), \(1, 3\)"):
        average_with_interval([np.ones((1, 2)), np.ones((1, 3))], ["liver", "liver"])
