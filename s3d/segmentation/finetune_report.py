"""A page about a fine-tuning run: curves, the last picture, Dice of the validation cases, what was transferred."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from s3d.csv_table import read_table
from s3d.data.store import write_atomically
from s3d.html_page import html_code, html_figure, html_heading, html_page, html_picture, html_table
from s3d.report import plot_training_loss, save_figure
from s3d.run_report import REPORT, curves_figure, training_summary
from s3d.training_log import read_log

from .finetune_config import FinetuneConfig
from .plan import SegmentationPlan
from .segmentation_validation import VALIDATION, dice_column

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRANSFER = "transfer.csv"


def write_finetune_report(config: FinetuneConfig, plan: SegmentationPlan) -> None:
    """Write ``report.html`` and ``training.png`` from the files of a run's folder."""
    folder = config.output_dir
    rows = read_log(folder / "log.csv")
    curves = training_figure(rows, plan.class_names)
    save_figure(curves, folder / "training.png")
    parts = [html_table(("", ""), _summary(config, plan, rows)), html_figure(curves, "Loss and validation Dice")]
    parts += [html_heading("Training"), html_figure(curves_figure(rows), "Learning rate, speed, waiting and memory")]
    pictures = sorted(folder.glob("segmentation_*.png"))
    if pictures:
        parts += [html_heading("Segmentation"), html_picture(pictures[-1], pictures[-1].stem)]
    header, cases = read_table(folder / VALIDATION)
    if cases:
        parts += [html_heading("Dice of the validation cases, on the grid of the plan"), html_table(header, cases)]
    parts += [html_heading("Plan"), html_code(json.dumps(plan.plain(), indent=2))]
    names, tensors = read_table(folder / TRANSFER)
    if tensors:
        parts += [html_heading("Transferred weights"), html_table(names, tensors)]
    parts += [html_heading("Settings"), html_code(json.dumps(config.plain(), indent=2))]
    write_atomically(folder / REPORT, html_page(f"Fine-tuning: {folder.name}", parts).encode())


def _summary(config: FinetuneConfig, plan: SegmentationPlan, rows: list[dict[str, float]]) -> list[tuple[str, str]]:
    validation = [row["validation_dice"] for row in rows if "validation_dice" in row]
    summary = [
        ("data set", f"{plan.dataset}, fold {config.fold}"),
        ("weights", "from scratch" if config.checkpoint is None else f"{config.scope} of {config.checkpoint}"),
        ("schedule", config.schedule_name),
        ("steps", f"{max((row['step'] for row in rows), default=0)} of {config.steps}"),
    ]
    if validation:
        summary.append(("validation Dice, mean over classes and cases", f"{validation[-1]:.4f}"))
    return summary + training_summary(rows)


def training_figure(rows: list[dict[str, float]], class_names: tuple[str, ...]) -> Figure:
    """Training loss and validation Dice against the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, dice = figure.subplots(1, 2)
    plot_training_loss(loss, rows)
    if loss.lines:
        loss.legend()
    loss.set_xlabel("step")
    loss.set_ylabel("Dice loss + cross-entropy")
    for column, label in (("validation_dice", "mean"), *((dice_column(name), name) for name in class_names[1:])):
        points = [(row["step"], row[column]) for row in rows if column in row]
        if points:
            style = {"color": "black", "linewidth": 2} if label == "mean" else {"linewidth": 1}
            dice.plot(*zip(*points, strict=True), "o-", markersize=3, label=label, **style)
    if dice.lines:
        dice.legend()
    dice.set_xlabel("step")
    dice.set_ylabel("validation Dice")
    dice.set_ylim(0, 1)
    dice.grid(alpha=0.3)
    return figure
