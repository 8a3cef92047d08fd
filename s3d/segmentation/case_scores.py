"""One case: its class maps are read, checked and scored. Runs in worker processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from s3d.data.reading import read_image, spacing_of
from s3d.data.source import ImageSource
from s3d.segmentation.class_maps import class_map, read_on_grid
from s3d.segmentation.metrics import dice, surface_dice


@dataclass(frozen=True)
class CaseTask:
    """The files of a case.

    Attributes:
        name: of the case.
        truth: its class map.
        predictions: of the runs, in their order.
        class_names: of the values, the background first.
        tolerance_mm: of the surface distance.
    """

    name: str
    truth: Path
    predictions: tuple[Path, ...]
    class_names: tuple[str, ...]
    tolerance_mm: float


def score_case(task: CaseTask) -> NDArray[np.float64]:
    """Dice and normalised surface distance of each run and class, [2, runs, classes without the background].

    Raises:
        BadImageError: a file cannot be read, holds values that are no class, or a prediction lies on another grid than
            the truth.
    """
    grid = read_image(ImageSource(task.truth))
    truth = class_map(task.truth, grid, task.class_names)
    classes = len(task.class_names)
    scores = []
    for path in task.predictions:
        prediction = class_map(path, read_on_grid(path, task.truth, grid), task.class_names)
        scores.append(
            (
                dice(prediction, truth, classes),
                surface_dice(prediction, truth, classes, spacing_of(grid.affine), task.tolerance_mm),
            )
        )
    return np.array(scores).swapaxes(0, 1)
