"""The tables of a comparison as files for programs: Dice from 0 to 1, empty cells where there is no number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from s3d.csv_table import csv_text
from s3d.segmentation.comparison import Interval, mean_score
from s3d.segmentation.scores import number

from .results import Results
from .standings import Against, LabelStanding, Standing, Standings, Task

AVERAGE = "average"
SCORE_COLUMNS = ("method", "dataset", "labels", "seeds", "all_seeds", "dice", "dice_low", "dice_high")
AGAINST_COLUMNS = ("difference", "difference_low", "difference_high", "cases", "p", "p_holm")
COST_COLUMNS = ("pretraining_seconds", "pretraining_pflop", "pretraining_memory_mib")


def standings_csv(found: Standings) -> str:
    """One row for each method and task, and one for its average, with the columns that only it has."""
    header = (*SCORE_COLUMNS, "rank", *AGAINST_COLUMNS, *COST_COLUMNS)
    return csv_text(header, (line for row in found.rows for line in _standing_lines(row, found)))


def _standing_lines(row: Standing, found: Standings) -> Iterable[tuple[object, ...]]:
    seeds = len(found.seeds)
    empty = [""] * (len(AGAINST_COLUMNS) + len(COST_COLUMNS))
    for task in found.tasks:
        score = row.scores.get(task)
        dice = ("", "", "") if score is None else _interval_cells(score.dice)
        rank = number(row.ranks[task]) if task in row.ranks else ""
        there = 0 if score is None else len(score.seeds)
        yield (row.method, task.dataset, task.labels_text, there, seeds, *dice, rank, *empty)
    average = ("", "", "") if row.average is None else _interval_cells(row.average)
    rank = "" if row.average_rank is None else number(row.average_rank)
    cost: tuple[str, ...] = ("", "", "")
    if row.cost is not None:
        cost = (number(row.cost.seconds), number(row.cost.flops / 1e15), number(row.cost.memory_mib))
    yield (row.method, AVERAGE, "", "", seeds, *average, rank, *_against_cells(row.against), *cost)


def labels_csv(found: Sequence[LabelStanding], seeds: int) -> str:
    """One row for each method and task."""
    header = (*SCORE_COLUMNS, *AGAINST_COLUMNS)
    return csv_text(
        header,
        (
            (
                *(row.method, task.dataset, task.labels_text, len(score.seeds), seeds),
                *_interval_cells(score.dice),
                *_against_cells(row.against.get(task)),
            )
            for row in found
            for task, score in row.scores.items()
        ),
    )


def _interval_cells(interval: Interval) -> tuple[str, str, str]:
    return number(interval.mean), number(interval.low), number(interval.high)


def _against_cells(against: Against | None) -> tuple[object, ...]:
    if against is None:
        return ("",) * len(AGAINST_COLUMNS)
    values = number(against.p_value), number(against.p_holm)
    return (*_interval_cells(against.difference), against.cases, *values)


def cells_csv(results: Results) -> str:
    """One row for each fine-tuned model: what every mean of the tables is made from."""
    classes = list(dict.fromkeys(name for cell in results.evaluated for name in cell.classes))
    rows = []
    for cell in results.evaluated:
        of_class = dict(zip(cell.classes, mean_score(cell.dice, axis=0).tolist()))
        labels = Task(cell.dataset, cell.labels).labels_text
        dice = float(mean_score(mean_score(cell.dice, axis=1), axis=0))
        rows.append(
            (
                *(cell.method, cell.dataset, labels, cell.seed, len(cell.cases), number(dice)),
                *(number(of_class.get(name, math.nan)) for name in classes),
                *(number(cell.seconds), cell.folder.as_posix()),
            )
        )
    header = ("method", "dataset", "labels", "seed", "cases", "dice", *(f"dice {name}" for name in classes))
    return csv_text((*header, "seconds", "folder"), rows)


def pretraining_csv(results: Results) -> str:
    """One row for each pre-trained model."""
    return csv_text(
        (
            *("method", "seed", "steps", "parameters", "seconds", "seconds_per_step", "step_flops", "pflop"),
            *("memory_mib", "validation_loss", "trivial_loss", "loss_label", "folder", "picture"),
        ),
        (
            (
                *(cell.method, cell.seed, cell.steps, cell.parameters, number(cell.seconds)),
                *(number(cell.seconds_per_step), number(cell.step_flops), number(cell.step_flops * cell.steps / 1e15)),
                number(cell.memory_mib),
                *(number(cell.losses[-1][1]) if cell.losses else "", number(cell.trivial_loss), cell.loss_label),
                *(cell.folder.as_posix(), "" if cell.picture is None else cell.picture.as_posix()),
            )
            for cell in results.pretrained
        ),
    )
