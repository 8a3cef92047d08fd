"""The page of an evaluation: tables, box plots, and each run's best, median and worst case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from s3d.data.reading import read_image, spacing_of
from s3d.data.source import ImageSource
from s3d.html_page import html_figure, html_heading, html_page, html_table, html_text
from s3d.segmentation.case_scores import CaseTask
from s3d.segmentation.class_maps import class_map, read_on_grid
from s3d.segmentation.pictures import segmentation_figure
from s3d.segmentation.scores import Scores
from s3d.segmentation.summary import MEAN, Summary, notes, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BOXED_CLASSES = 15  # the others are in the tables
MOST_NAMED = 5  # classes in the title of a picture


def evaluation_report(
    scores: Scores,
    summary: Summary,
    tasks: Sequence[CaseTask],
    images: Mapping[str, Path] | None,
    tolerance_mm: float,
) -> str:
    """The page.

    Args:
        scores: of all runs.
        summary: of the same.
        tasks: the files of the cases, in the order of the scores.
        images: case -> its image, to draw on; None draws on black.
        tolerance_mm: of the surface distance.
    Raises:
        BadImageError: an image cannot be read or lies on another grid than its case's truth.
    """
    parts = []
    for table in tables(summary):
        parts += [html_heading(table.title), html_table(table.header, table.rows)]
    parts += [html_text(note) for note in notes(tolerance_mm)]
    parts += [html_heading("Cases"), html_figure(box_figure(scores), "A point is a case; the box is its quartiles")]
    for i, run in enumerate(scores.runs):
        parts.append(html_heading(f"{run}: best, median and worst case"))
        for which, j in _chosen(scores.case_dice[i]):
            parts.append(html_figure(_picture(scores, tasks[j], images, i, j, which)))
    return html_page("Evaluation", parts)


def box_figure(scores: Scores) -> Figure:
    """Scores of all cases: a row of plots a metric, a box a run, for the mean of the classes and each of them."""
    from matplotlib.figure import Figure

    shown = min(len(scores.classes), MOST_BOXED_CLASSES)
    names = [MEAN, *scores.classes[:shown]]
    figure = Figure(figsize=(max(6, 0.7 * len(names) * (1 + len(scores.runs))), 7), layout="constrained")
    metrics = (("Dice", scores.case_dice, scores.dice), ("NSD", scores.case_nsd, scores.nsd))
    for row, (axes_of_row, (metric, means, of_classes)) in enumerate(
        zip(figure.subplots(2, len(names), squeeze=False, sharey="row"), metrics)
    ):
        values = np.concatenate([means[..., None], of_classes[..., :shown]], axis=-1)  # [runs, cases, names]
        axes_of_row[0].set_ylabel(metric)
        for column, axes in enumerate(axes_of_row):
            for i in range(len(scores.runs)):
                there = values[i, :, column]
                there = there[~np.isnan(there)]
                colour = f"C{i % 10}"
                axes.boxplot([there], positions=[i], widths=0.6, showfliers=False, medianprops={"color": colour})
                # Side by side, in the order of the cases: nothing is drawn at random.
                beside = i + np.linspace(-0.2, 0.2, len(there))
                axes.plot(beside, there, ".", color=colour, alpha=0.5, markersize=4)
            axes.set_xticks(range(len(scores.runs)), scores.runs if row else [], rotation=30, ha="right")
            axes.grid(axis="y", color="0.9")
            if row == 0:
                axes.set_title(names[column], fontsize=10)
    return figure


def _chosen(
    case_dice: NDArray[np.float64],  # [cases]
) -> list[tuple[str, int]]:
    """Which cases are pictured, and why; each once where there are few."""
    order = np.argsort(-case_dice, kind="stable")  # NaN last
    order = order[: np.count_nonzero(~np.isnan(case_dice))]
    places = {"best": order[0], "worst": order[-1], "median": order[len(order) // 2]}
    names: dict[int, str] = {}
    for which in ("best", "median", "worst"):
        place = int(places[which])
        names[place] = f"{names[place]}, {which}" if place in names else which
    return [(which, place) for place, which in names.items()]


def _picture(
    scores: Scores, task: CaseTask, images: Mapping[str, Path] | None, run: int, case: int, which: str
) -> Figure:
    grid = read_image(ImageSource(task.truth))
    path = task.predictions[run]
    prediction = class_map(path, read_on_grid(path, task.truth, grid), task.class_names)
    if images is None:
        image = np.zeros_like(grid.intensities)
    else:
        image = read_on_grid(images[task.name], task.truth, grid).intensities
    each = [f"{name} {dice:.3f}" for name, dice in zip(scores.classes, scores.dice[run, case])]
    more = ", ..." if len(each) > MOST_NAMED else ""
    return segmentation_figure(
        image,
        class_map(task.truth, grid, task.class_names),
        prediction,
        task.class_names,
        f"{which}: {task.name}, mean Dice {scores.case_dice[run, case]:.3f} ({', '.join(each[:MOST_NAMED])}{more})",
        spacing_of(grid.affine),
    )
