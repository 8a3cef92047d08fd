"""The scores of an evaluation, and their file `cases.csv`."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from s3d.csv_table import csv_text
from s3d.segmentation.comparison import mean_score

COLUMNS = ("run", "case", "class", "dice", "nsd")


@dataclass(frozen=True)
class Scores:
    """Dice and normalised surface distance (NSD) of each run, case and class; NaN where a class is in no class map.

    Attributes:
        runs, cases: their names.
        classes: names, without the background.
        dice, nsd: [runs, cases, classes].
    """

    runs: tuple[str, ...]
    cases: tuple[str, ...]
    classes: tuple[str, ...]
    dice: NDArray[np.float64]
    nsd: NDArray[np.float64]

    @property
    def case_dice(self) -> NDArray[np.float64]:
        """Mean over the classes of a case, [runs, cases]."""
        return mean_score(self.dice, axis=-1)

    @property
    def case_nsd(self) -> NDArray[np.float64]:
        """Mean over the classes of a case, [runs, cases]."""
        return mean_score(self.nsd, axis=-1)


def scores_csv(scores: Scores) -> str:
    """One row for each run, case and class; an empty cell where there is no score."""
    return csv_text(
        COLUMNS,
        (
            (run, case, name, number(scores.dice[i, j, k]), number(scores.nsd[i, j, k]))
            for i, run in enumerate(scores.runs)
            for j, case in enumerate(scores.cases)
            for k, name in enumerate(scores.classes)
        ),
    )


def number(value: float) -> str:
    """As a cell of a CSV file."""
    return "" if np.isnan(value) else f"{value:.6g}"


def read_scores(file: Path) -> Scores:
    """The scores of a file that holds `scores_csv`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or rows are missing or there twice.
    """
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{file}: has the columns {', '.join(reader.fieldnames or ())}, not {', '.join(COLUMNS)}; give the "
                "cases.csv of s3d evaluate"
            )
        rows = list(reader)
    runs, cases, classes = (tuple(dict.fromkeys(row[column] for row in rows)) for column in COLUMNS[:3])
    keys = {(row["run"], row["case"], row["class"]) for row in rows}
    if not rows or not len(rows) == len(keys) == len(runs) * len(cases) * len(classes):
        raise ValueError(
            f"{file}: has {len(rows)} rows where each of {len(runs)} runs, {len(cases)} cases and {len(classes)} "
            "classes needs one; evaluate again"
        )
    dice, nsd = (np.full((len(runs), len(cases), len(classes)), np.nan) for _ in range(2))
    index = {names: {name: place for place, name in enumerate(names)} for names in (runs, cases, classes)}
    for line, row in enumerate(rows, start=2):
        place = index[runs][row["run"]], index[cases][row["case"]], index[classes][row["class"]]
        try:
            dice[place], nsd[place] = _score(row["dice"]), _score(row["nsd"])
        except (TypeError, ValueError) as error:  # TypeError: there is no such cell
            raise ValueError(
                f"{file}: row {line} has dice {row['dice']!r} and nsd {row['nsd']!r}; each must be 0 to 1 or empty, "
                "evaluate again"
            ) from error
    return Scores(runs, cases, classes, dice, nsd)


def _score(cell: str | None) -> float:
    """Of a cell of `scores_csv`; ValueError or TypeError if it is none."""
    if cell == "":
        return float("nan")
    score = float(cell)  # type: ignore[arg-type]
    if not 0 <= score <= 1:
        raise ValueError
    return score
