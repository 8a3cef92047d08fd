"""The tables of a comparison as people read them: Dice in percent, intervals beside the means, the best marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from s3d.segmentation.comparison import Interval
from s3d.segmentation.summary import Table

from .notes import NOTHING, missing_notes
from .standings import Cost, LabelStanding, Score, Standing, Standings, Task

DECIMALS = 2  # of Dice in percent and of ranks
SHORT_HOURS = 2  # up to which times are in minutes


@dataclass(frozen=True)
class Cell:
    """What stands at one place of a table.

    Attributes:
        text: as people read it.
        place: 1 or 2 where it is the best or second best of its column, else 0.
        folders: that the number comes from, relative to the folder of the comparison, each with a short name.
    """

    text: str
    place: int = 0
    folders: tuple[tuple[str, Path], ...] = ()

    def markdown(self) -> str:
        mark = {0: "", 1: "**", 2: "_"}[self.place]
        return f"{mark}{self.text}{mark}"


@dataclass(frozen=True)
class LinkedTable:
    """A table whose numbers know where they come from.

    Attributes:
        title: of it.
        header: of the columns.
        rows: of cells, one a column.
        notes: what the numbers mean and what is missing, sentences.
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Title, table and notes."""
        table = Table(self.title, self.header, [tuple(cell.markdown() for cell in row) for row in self.rows])
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join(part for part in (f"## {self.title}", table.markdown(), notes) if part)


def standings_table(title: str, found: Standings) -> LinkedTable:
    """Methods on all tasks: Dice, average, average rank, difference to the reference, cost of pre-training."""
    columns: list[list[Cell]] = [[Cell(row.method) for row in found.rows]]
    for task in found.tasks:
        scores = [row.scores.get(task) for row in found.rows]
        ranked = [None if row.average is None else 100 * row.scores[task].dice.mean for row in found.rows]
        columns.append(_with_places([_score_cell(score, len(found.seeds)) for score in scores], ranked))
    averages = [None if row.average is None else 100 * row.average.mean for row in found.rows]
    columns.append(_with_places([Cell(percent_with_interval(row.average)) for row in found.rows], averages))
    places = [row.average_rank for row in found.rows]
    rank_cells = [Cell(NOTHING if place is None else f"{place:.{DECIMALS}f}") for place in places]
    columns.append(_with_places(rank_cells, [None if place is None else -place for place in places]))
    columns.append([Cell(_difference(row, found.reference)) for row in found.rows])
    columns.append([Cell(NOTHING if row.against is None else f"{row.against.p_holm:.2g}") for row in found.rows])
    columns += [list(column) for column in zip(*(_cost_cells(row.cost) for row in found.rows))]
    header = (
        "method",
        *(str(task) for task in found.tasks),
        "average",
        "average rank",
        f"difference to {found.reference}",
        "p, Holm",
        "pre-training",
        "PFLOP",
        "GiB",
    )
    return LinkedTable(title, header, list(zip(*columns)), missing_notes(found))


def labels_table(dataset: str, found: Sequence[LabelStanding], reference: str, seeds: int) -> LinkedTable:
    """Methods on one data set against the number of labels: Dice, and the difference to the reference.

    Args:
        dataset: its name.
        found: of its methods.
        reference: the method that the others are compared with.
        seeds: that each method has when it is finished.
    """
    tasks = sorted(
        {task for row in found for task in row.scores},
        key=lambda task: math.inf if task.labels is None else task.labels,
    )
    columns: list[list[Cell]] = [[Cell(row.method) for row in found]]
    for task in tasks:
        scores = [row.scores.get(task) for row in found]
        ranked = [
            100 * score.dice.mean if score is not None and len(score.seeds) == seeds else None for score in scores
        ]
        columns.append(_with_places([_score_cell(score, seeds) for score in scores], ranked))
    for task in tasks:
        columns.append([Cell(_difference_and_p(row, task, reference)) for row in found])
    header = (
        "method",
        *(f"{task.labels_text} labels" for task in tasks),
        *(f"{task.labels_text} labels, difference to {reference}" for task in tasks),
    )
    return LinkedTable(f"Number of labels: {dataset}", header, list(zip(*columns)))


def _score_cell(score: Score | None, seeds: int) -> Cell:
    if score is None:
        return Cell(NOTHING)
    missing = f" ({len(score.seeds)} of {seeds} seeds)" if len(score.seeds) < seeds else ""
    links = tuple((f"seed {seed}", folder) for seed, folder in zip(score.seeds, score.folders))
    return Cell(percent_with_interval(score.dice) + missing, folders=links)


def _with_places(
    cells: list[Cell],
    values: Sequence[float | None],  # one for each cell, the highest is best; None: out of competition
) -> list[Cell]:
    """The same with the best and, of three or more, the second best marked.

    By the digits that are printed, so that equal numbers are marked alike.
    """
    there = [round(value, DECIMALS) for value in values if value is not None]
    if len(there) < 2:
        return cells
    best_first = sorted(set(there), reverse=True)[: 2 if len(there) > 2 else 1]
    place_of = {value: place for place, value in enumerate(best_first, start=1)}
    return [
        Cell(cell.text, 0 if value is None else place_of.get(round(value, DECIMALS), 0), cell.folders)
        for cell, value in zip(cells, values)
    ]


def percent_with_interval(interval: Interval | None) -> str:
    """A Dice of 0 to 1 in percent, two decimals as they are published; the interval with one."""
    if interval is None or math.isnan(interval.mean):
        return NOTHING
    if math.isnan(interval.low):
        return f"{100 * interval.mean:.{DECIMALS}f}"
    return f"{100 * interval.mean:.{DECIMALS}f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def signed_percent_with_interval(interval: Interval) -> str:
    """A difference of Dice in points of percent."""
    if math.isnan(interval.mean):
        return NOTHING
    if math.isnan(interval.low):
        return f"{100 * interval.mean:+.{DECIMALS}f}"
    return f"{100 * interval.mean:+.{DECIMALS}f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _difference(row: Standing, reference: str) -> str:
    if row.method == reference:
        return "reference"
    return NOTHING if row.against is None else signed_percent_with_interval(row.against.difference)


def _difference_and_p(row: LabelStanding, task: Task, reference: str) -> str:
    if row.method == reference:
        return "reference"
    against = row.against.get(task)
    if against is None:
        return NOTHING
    return f"{signed_percent_with_interval(against.difference)}, p {against.p_holm:.2g}"


def _cost_cells(cost: Cost | None) -> tuple[Cell, Cell, Cell]:
    if cost is None:
        return Cell(NOTHING), Cell(NOTHING), Cell(NOTHING)
    links = tuple((folder.name, folder) for folder in cost.folders)
    return (
        Cell(duration(cost.seconds), folders=links),
        Cell(amount(cost.flops / 1e15)),
        Cell(amount(cost.memory_mib / 1024)),
    )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is readable."""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.1f} s"
    return f"{minutes:.1f} min" if minutes < 60 * SHORT_HOURS else f"{minutes / 60:,.1f} h"


def amount(value: float) -> str:
    """Three significant digits, no exponent for large numbers."""
    if math.isnan(value):
        return NOTHING
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
