"""Statistics of scores: means with confidence intervals, paired tests between runs, ranks over data sets.

Plain arrays in, so that experiments can use it on whatever they have measured. NaN is a score that does not exist (see
`metrics`) and is left out everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval; all NaN without scores, the interval NaN with a single one."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same cases."""

    first: str
    second: str
    difference: Interval  # of the means, second - first
    cases: int  # that both have a score for
    p_value: float  # Wilcoxon's signed-rank test, two-sided
    p_holm: float  # corrected for all pairs of runs


def mean_score(scores: NDArray[np.floating], axis: int) -> NDArray[np.float64]:
    """Mean along an axis; NaN where there is no score."""
    there = ~np.isnan(scores)
    number = there.sum(axis=axis)
    total = np.where(there, scores, 0.0).sum(axis=axis)
    return np.divide(total, number, out=np.full(np.shape(total), np.nan), where=number > 0)


def mean_with_interval(
    scores: NDArray[np.floating],  # [cases] or [seeds, cases]
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean and bootstrap percentile interval: how far the mean would move with other cases, and other seeds.

    With several seeds, cases and seeds are drawn independently of each other (the "pigeonhole" bootstrap): cases are
    the same under each seed, so the scores are not independent. An interval over few seeds (or cases) is too narrow,
    as their bootstrap variance is (n - 1) / n of what it should be.

    Args:
        scores: of each case, or of each case in each of several runs that differ in their seed.
        confidence: of the interval.
        resamples: how often it is drawn.
        seed: of the draws.
    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; Owen, The pigeonhole bootstrap
        (Annals of Applied Statistics 2007).
    """
    return average_with_interval([np.atleast_2d(scores)], confidence=confidence, resamples=resamples, seed=seed)


def average_with_interval(
    tables: Sequence[NDArray[np.floating]],  # of [seeds, cases]
    same_cases: Sequence[str] | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean over tables of each table's mean, and its bootstrap interval: all tables count the same.

    Cases are drawn within each table. The draws of seeds are the same for all tables, so that what a seed does to
    all of them (a pre-trained network that they share, say) stays in the interval; where seeds do nothing in common,
    the interval is right as well. Tables of the same cases share the draws of cases for the same reason.

    Args:
        tables: scores of a data set each, under the same seeds in the same order.
        same_cases: for each table a name that it shares with the tables of the same cases in the same order
            (a data set under several numbers of labels); None: no two tables share their cases.
        confidence, resamples, seed: as for `mean_with_interval`.
    Returns: all NaN where a table has no score.
    Raises:
        ValueError: shapes do not fit.
    """
    scores = [np.asarray(table, dtype=np.float64) for table in tables]
    for table in scores:
        if table.ndim != 2:
            raise ValueError(f"scores must be [cases] or [seeds, cases], got shape {table.shape}")
    groups: dict[str, list[NDArray[np.float64]]] = {}
    for name, table in zip(map(str, range(len(scores))) if same_cases is None else same_cases, scores, strict=True):
        groups.setdefault(name, []).append(table)
    for name, group in groups.items():
        if len({table.shape for table in group}) > 1:
            shapes = ", ".join(str(table.shape) for table in group)
            raise ValueError(f"tables of the same cases ({name}) must have the same shape, got {shapes}")
    if len({len(table) for table in scores}) > 1:
        raise ValueError(f"tables must have the same seeds, got {', '.join(str(len(table)) for table in scores)}")
    if not scores or any(np.isnan(table).all() for table in scores):
        return Interval(math.nan, math.nan, math.nan)
    # Without the cases that have no score at all.
    for group in groups.values():
        there = ~np.all([np.isnan(table).all(axis=0) for table in group], axis=0)
        group[:] = [table[:, there] for table in group]
    kept = [table for group in groups.values() for table in group]
    average = float(np.mean([np.nanmean(table) for table in kept]))
    if all(table.size == 1 for table in kept):
        return Interval(average, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    seed_counts = _draw(generator, resamples, len(kept[0]))
    averages = np.zeros(resamples)
    for group in groups.values():
        case_counts = _draw(generator, resamples, group[0].shape[1])
        for table in group:
            total, number = (
                ((seed_counts @ values) * case_counts).sum(axis=1)
                for values in (np.nan_to_num(table), 1.0 - np.isnan(table))
            )
            averages += np.divide(total, number, out=np.full(resamples, np.nan), where=number > 0)
    low, high = np.nanquantile(averages / len(kept), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(average, float(low), float(high))


def _draw(generator: np.random.Generator, resamples: int, number: int) -> NDArray[np.int_]:
    """How often each of `number` things is drawn in as many draws with replacement, [resamples, number]."""
    draws = generator.integers(number, size=(resamples, number)) + number * np.arange(resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=resamples * number).reshape(resamples, number)


def signed_rank_test(
    first: NDArray[np.floating],  # [cases]
    second: NDArray[np.floating],  # [cases]
) -> float:
    """p-value of Wilcoxon's signed-rank test, two-sided: whether two runs score the same cases alike.

    Cases without a score in either are left out. 1 where no case differs.
    """
    from scipy.stats import wilcoxon

    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    differences = differences[~np.isnan(differences)]
    if not differences.any():
        return 1.0
    return float(wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """p-values corrected for how many there are, in the same order.

    Source: Holm, A simple sequentially rejective multiple test procedure (Scandinavian Journal of Statistics 1979).
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = values.argsort()
    # The smallest times n, the next times n - 1, ...; never below the one before.
    factors = np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1)
    return corrected


def compare_runs(scores: Mapping[str, NDArray[np.floating]]) -> list[Comparison]:
    """Every pair of runs.

    Args:
        scores: name of the run -> score of each case, [cases], the same cases in the same order.
    """
    pairs = list(itertools.combinations(scores, 2))
    p_values = [signed_rank_test(scores[first], scores[second]) for first, second in pairs]
    comparisons = []
    for (first, second), p_value, p_holm in zip(pairs, p_values, holm(p_values)):
        differences = scores[second] - scores[first]
        comparisons.append(
            Comparison(
                first=first,
                second=second,
                difference=mean_with_interval(differences),
                cases=int(np.count_nonzero(~np.isnan(differences))),
                p_value=p_value,
                p_holm=float(p_holm),
            )
        )
    return comparisons


def ranks(
    scores: NDArray[np.floating],  # [data sets, runs]
) -> NDArray[np.float64]:
    """Rank of each run on each data set: 1 is the highest score, equal scores share the mean of their ranks.

    The mean over data sets, `ranks(scores).mean(axis=0)`, is the mean rank that the paper reports.

    Returns: [data sets, runs].
    Raises:
        ValueError: a score is missing (NaN).
    """
    from scipy.stats import rankdata

    table = np.asarray(scores, dtype=np.float64)
    if np.isnan(table).any():
        raise ValueError("every run needs a score on every data set to be ranked; some are NaN")
    return np.asarray(rankdata(-table, axis=1))
