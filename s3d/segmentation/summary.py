"""What the scores of an evaluation say, as tables: CSV, Markdown, HTML."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s3d.csv_table import csv_text
from s3d.segmentation.comparison import (
    CONFIDENCE,
    Comparison,
    Interval,
    compare_runs,
    mean_score,
    mean_with_interval,
    ranks,
)
from s3d.segmentation.scores import Scores, number

MEAN = "mean"


@dataclass(frozen=True)
class SummaryRow:
    """A run on all cases.

    Attributes:
        run: its name.
        of: a class, or `MEAN`: each case counts with the mean of its classes.
        cases: that have a score.
        dice, nsd: mean over them.
    """

    run: str
    of: str
    cases: int
    dice: Interval
    nsd: Interval


@dataclass(frozen=True)
class Summary:
    """Every run in numbers, and the runs against each other by Dice (mean of a case's classes).

    Attributes:
        rows: for each run `MEAN`, then its classes.
        ranks: of each run, 1 is best.
        comparisons: of all pairs of runs.
    """

    rows: tuple[SummaryRow, ...]
    ranks: dict[str, float]
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Table:
    """Cells as people read them."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def summarise(scores: Scores) -> Summary:
    """Means, intervals, ranks and tests.

    Raises:
        ValueError: a run has no score at all.
    """
    means = mean_score(scores.case_dice, axis=-1)
    for run, mean in zip(scores.runs, means):
        if np.isnan(mean):
            raise ValueError(f"run {run!r} has nothing to score: neither it nor the labels have any class")
    rows = []
    for i, run in enumerate(scores.runs):
        columns = [(MEAN, scores.case_dice[i], scores.case_nsd[i])]
        columns += [(name, scores.dice[i, :, k], scores.nsd[i, :, k]) for k, name in enumerate(scores.classes)]
        for of, dice, nsd in columns:
            cases = int(np.count_nonzero(~np.isnan(dice)))
            rows.append(SummaryRow(run, of, cases, mean_with_interval(dice), mean_with_interval(nsd)))
    return Summary(
        rows=tuple(rows),
        ranks=dict(zip(scores.runs, ranks(means[None])[0].tolist())),
        comparisons=tuple(compare_runs(dict(zip(scores.runs, scores.case_dice)))),
    )


def tables(summary: Summary) -> list[Table]:
    """Runs, best first; classes; comparisons, where there are several runs."""
    interval = f"[{CONFIDENCE:.0%} interval]"
    rows = {(row.run, row.of): row for row in summary.rows}
    best_first = sorted(summary.ranks, key=lambda run: summary.ranks[run])
    classes = [of for of in dict.fromkeys(row.of for row in summary.rows) if of != MEAN]
    found = [
        Table(
            "Runs",
            ("run", "cases", f"Dice {interval}", f"NSD {interval}", "rank"),
            [
                (run, str(row.cases), str(row.dice), str(row.nsd), f"{summary.ranks[run]:g}")
                for run in best_first
                for row in [rows[run, MEAN]]
            ],
        ),
        Table(
            "Classes",
            ("class", "run", "cases", f"Dice {interval}", f"NSD {interval}"),
            [
                (name, run, str(row.cases), str(row.dice), str(row.nsd))
                for name in classes
                for run in best_first
                for row in [rows[run, name]]
            ],
        ),
    ]
    if summary.comparisons:
        found.append(
            Table(
                "Comparisons",
                ("runs", "cases", f"difference of Dice {interval}", "p", "p, Holm"),
                [
                    (
                        f"{pair.second} - {pair.first}",
                        str(pair.cases),
                        str(pair.difference),
                        f"{pair.p_value:.2g}",
                        f"{pair.p_holm:.2g}",
                    )
                    for pair in summary.comparisons
                ],
            )
        )
    return found


def notes(tolerance_mm: float) -> list[str]:
    """What the numbers mean, sentences."""
    return [
        f"NSD: share of the surfaces within {tolerance_mm:g} mm of each other.",
        "A class in neither truth nor prediction has no score and is left out of the means; a class in one of them "
        "only scores 0.",
        "Intervals: bootstrap over cases. p: Wilcoxon's signed-rank test over cases, two-sided; Holm: corrected for "
        "all pairs of runs.",
    ]


def summary_markdown(summary: Summary, tolerance_mm: float) -> str:
    """All tables."""
    parts = [f"## {table.title}\n\n{table.markdown()}" for table in tables(summary)]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes(tolerance_mm))]) + "\n"


def summary_csv(summary: Summary) -> str:
    """One row for each run and class (or `MEAN`)."""
    return csv_text(
        ("run", "class", "cases", "dice", "dice_low", "dice_high", "nsd", "nsd_low", "nsd_high"),
        ((row.run, row.of, row.cases, *_cells(row.dice), *_cells(row.nsd)) for row in summary.rows),
    )


def comparisons_csv(summary: Summary) -> str:
    """One row for each pair of runs."""
    return csv_text(
        ("first", "second", "cases", "difference", "difference_low", "difference_high", "p", "p_holm"),
        (
            (pair.first, pair.second, pair.cases, *_cells(pair.difference), number(pair.p_value), number(pair.p_holm))
            for pair in summary.comparisons
        ),
    )


def _cells(interval: Interval) -> tuple[str, ...]:
    return number(interval.mean), number(interval.low), number(interval.high)
