"""The figures of a comparison.

Lines of many methods in one plot cannot be told apart, so methods are spread over panels of a few beside each other,
with the reference, black, in each. A method has the same colour in all figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .results import PretrainedCell, Results
from .standings import LabelStanding, Scoreboard, Standing, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OTHERS_PER_PANEL = 5  # methods beside the reference
COLOURS = 10
MARKERS = "osD^vP"
COLUMNS = 4  # of small panels
PICTURE_COLUMNS = 3


def colours_of(methods: Sequence[str], reference: str) -> dict[str, str]:
    """Black for the reference; the others repeat after ten, which never share a panel of lines."""
    others = [method for method in methods if method != reference]
    return {reference: "black", **{method: f"C{i % COLOURS}" for i, method in enumerate(others)}}


def _panels_of(methods: Sequence[str], reference: str) -> list[list[str]]:
    """Which methods are drawn together."""
    others = [method for method in methods if method != reference]
    first = [reference] if reference in methods else []
    starts = range(0, max(1, len(others)), OTHERS_PER_PANEL)
    return [first + others[start : start + OTHERS_PER_PANEL] for start in starts]


def learning_curves_figure(scoreboard: Scoreboard, methods: Sequence[str]) -> Figure:
    """Validation Dice against the step of fine-tuning: mean and range over seeds; a row of panels for each task.

    Args:
        scoreboard: of all results; runs without a curve are left out.
        methods: that are drawn.
    """
    from matplotlib.figure import Figure

    tasks = [task for task in scoreboard.tasks if any(_curves(scoreboard, method, task) for method in methods)]
    panels = _panels_of(methods, scoreboard.reference)
    colours = colours_of(scoreboard.results.methods, scoreboard.reference)
    figure = Figure(figsize=(1 + 4.2 * len(panels), 1 + 2.8 * max(1, len(tasks))), layout="constrained")
    grid = figure.subplots(max(1, len(tasks)), len(panels), squeeze=False, sharex="row", sharey="row")
    for axes_of_row, task in zip(grid, tasks):
        axes_of_row[0].set_ylabel(f"{task}\nvalidation Dice")
        for axes, together in zip(axes_of_row, panels):
            for method in together:
                curves = _curves(scoreboard, method, task)
                if not curves:
                    continue
                steps, values = _common(curves)
                seeds = "" if len(curves) == len(scoreboard.seeds) else f" ({len(curves)} of {len(scoreboard.seeds)})"
                axes.plot(steps, values.mean(axis=0), color=colours[method], linewidth=1.6, label=method + seeds)
                axes.fill_between(
                    steps, values.min(axis=0), values.max(axis=0), color=colours[method], alpha=0.12, linewidth=0
                )
            if axes.lines:
                axes.legend(fontsize=7, loc="lower right")
            axes.grid(color="0.92")
    for axes in grid[-1]:
        axes.set_xlabel("step of fine-tuning")
    if not tasks:
        _say(grid[0, 0], "no run has validation cases")
    return figure


def _curves(scoreboard: Scoreboard, method: str, task: Task) -> list[dict[int, float]]:
    """Of each seed that has one: step -> Dice."""
    return [dict(cell.curve) for cell in scoreboard.cells(method, task) if cell.curve]


def _common(curves: list[dict[int, float]]) -> tuple[list[int], np.ndarray]:
    """The steps that all have, and the values at them, [seeds, steps]."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, np.array([[curve[step] for step in steps] for curve in curves])


def labels_figure(found: dict[str, list[LabelStanding]], methods: Sequence[str], reference: str) -> Figure:
    """Dice of the test cases against the number of labels, with intervals; a row of panels for each data set.

    Args:
        found: for each data set its methods.
        methods: all of the comparison, which fixes the colours.
        reference: is drawn in every panel.
    """
    from matplotlib.figure import Figure

    colours = colours_of(methods, reference)
    panels = _panels_of([row.method for row in next(iter(found.values()))], reference)
    figure = Figure(figsize=(1 + 4.2 * len(panels), 1 + 2.8 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(panels), squeeze=False, sharey="row")
    for axes_of_row, (dataset, rows) in zip(grid, found.items()):
        tasks = sorted(
            {task for row in rows for task in row.scores},
            key=lambda task: math.inf if task.labels is None else task.labels,
        )
        axes_of_row[0].set_ylabel(f"{dataset}\nDice of the test cases")
        for axes, together in zip(axes_of_row, panels):
            shown = [row for row in rows if row.method in together]
            for i, row in enumerate(shown):
                places = [j + 0.06 * (i - (len(shown) - 1) / 2) for j, task in enumerate(tasks) if task in row.scores]
                dice = [row.scores[task].dice for task in tasks if task in row.scores]
                means = [score.mean for score in dice]
                # A single score has no interval.
                below = [0 if math.isnan(score.low) else score.mean - score.low for score in dice]
                above = [0 if math.isnan(score.high) else score.high - score.mean for score in dice]
                axes.errorbar(
                    places,
                    means,
                    yerr=[below, above],
                    marker="o",
                    markersize=4,
                    capsize=2,
                    color=colours[row.method],
                    label=row.method,
                )
            axes.set_xticks(range(len(tasks)), [task.labels_text for task in tasks])
            axes.grid(axis="y", color="0.92")
            axes.legend(fontsize=7, loc="lower right")
    for axes in grid[-1]:
        axes.set_xlabel("labelled training cases")
    return figure


def cost_figure(rows: Sequence[Standing], methods: Sequence[str], reference: str) -> Figure:
    """Average Dice against what the pre-training took, in time and in operations.

    Methods without pre-training are lines. Methods that lack runs have no average and are not drawn.

    Args:
        rows: the methods.
        methods: all of the comparison, which fixes the colours.
        reference: is black.
    """
    from matplotlib.figure import Figure

    colours = colours_of(methods, reference)
    markers = {method: MARKERS[i // COLOURS % len(MARKERS)] for i, method in enumerate(methods)}
    figure = Figure(figsize=(12, 5), layout="constrained")
    time, operations = figure.subplots(1, 2, sharey=True)
    drawn = [row for row in rows if row.average is not None]
    for axes, label, per_unit in ((time, "minutes", 60.0), (operations, "PFLOP", 1e15)):
        amounts = []
        for row in drawn:
            assert row.average is not None
            colour, mean = colours[row.method], row.average.mean
            if row.cost is None:
                style = {"linestyle": "--", "linewidth": 1.2}
                axes.axhline(mean, color=colour, label=f"{row.method} (no pre-training)", **style)
                continue
            amount = (row.cost.seconds if axes is time else row.cost.flops) / per_unit
            amounts.append(amount)
            low, high = (mean if math.isnan(end) else end for end in (row.average.low, row.average.high))
            axes.errorbar(
                [amount],
                [mean],
                yerr=[[mean - low], [high - mean]],
                marker=markers[row.method],
                color=colour,
                elinewidth=0.6,
                capsize=2,
                linestyle="none",
                label=row.method,
            )
        if amounts and min(amounts) > 0 and max(amounts) > 10 * min(amounts):
            axes.set_xscale("log")
        axes.set_xlabel(f"{label} of pre-training")
        axes.grid(color="0.92")
    time.set_ylabel("average Dice")
    if drawn:
        handles, names = operations.get_legend_handles_labels()
        operations.legend(handles, names, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        _say(time, "no method has all its runs")
    return figure


def pretraining_losses_figure(results: Results, methods: Sequence[str]) -> Figure:
    """Validation loss against the step of pre-training, a line for each seed.

    A panel for each method with its own axis: their losses are not comparable. Dashed is what the loss is where nothing
    is learned.
    """
    from matplotlib.figure import Figure

    shown = [(method, cells) for method in methods if (cells := _pretrained(results, method))]
    columns = min(COLUMNS, max(1, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(1 + 3.2 * columns, 0.5 + 2.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (method, cells) in zip(grid, shown):
        for cell in cells:
            if cell.losses:
                marker = "o" if len(cell.losses) < 3 else ""
                axes.plot(*zip(*cell.losses, strict=True), marker=marker, label=f"seed {cell.seed}")
            if not math.isnan(cell.trivial_loss):
                axes.axhline(cell.trivial_loss, color="0.3", linestyle="--", linewidth=1)
        axes.set_title(method, fontsize=10)
        axes.set_ylabel(cells[0].loss_label, fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(color="0.92")
        if len(cells) > 1:
            axes.legend(fontsize=7)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(shown) - columns) : len(shown)]:
        axes.set_xlabel("step of pre-training", fontsize=8)
    if not shown:
        _say(grid[0], "no pre-training is finished")
    return figure


def pretext_figure(results: Results, methods: Sequence[str], output_dir: Path) -> Figure:
    """The last picture of each method's task, beside each other.

    Args:
        results: of all methods.
        methods: that are wanted; those without a picture are left out.
        output_dir: folder of the comparison.
    """
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    shown = [
        (method, cell.picture)
        for method in methods
        for cell in _pretrained(results, method)[:1]
        if cell.picture is not None
    ]
    columns = min(PICTURE_COLUMNS, max(1, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(5.5 * columns, 4.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (method, picture) in zip(grid, shown):
        axes.set_title(method)
        if (output_dir / picture).is_file():
            axes.imshow(imread(output_dir / picture))
        else:
            _say(axes, f"{picture} is gone")
    if not shown:
        _say(grid[0], "no pre-training has a picture")
    return figure


def _pretrained(results: Results, method: str) -> list[PretrainedCell]:
    """By seed."""
    return sorted((cell for cell in results.pretrained if cell.method == method), key=lambda cell: cell.seed)


def _say(axes: Axes, text: str) -> None:
    """Text where there is nothing to draw."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
