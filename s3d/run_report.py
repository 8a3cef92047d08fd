"""A page about a run: curves, the last picture, settings."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .data.store import write_atomically
from .html_page import html_code, html_figure, html_heading, html_page, html_picture, html_table
from .pretext.method import Pretext
from .pretrain_config import PretrainConfig
from .report import loss_figure, save_figure
from .training_log import read_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"


def write_run_report(config: PretrainConfig, pretext: Pretext[Any], baseline: float) -> None:
    """Write ``report.html`` and ``loss.png`` from ``log.csv`` of a run's folder.

    Args:
        config: of the run.
        pretext: its method.
        baseline: validation loss of an answer without a network, NaN where there is none.
    """
    folder = config.output_dir
    rows = read_log(folder / "log.csv")
    loss = loss_figure(folder / "log.csv", pretext.loss_label, baseline, pretext.trivial_label)
    save_figure(loss, folder / "loss.png")
    parts = [html_table(("", ""), _summary(config, rows, baseline, pretext.trivial_label)), html_figure(loss, "Loss")]
    parts += [html_heading("Training"), html_figure(curves_figure(rows), "Learning rate, speed, waiting and memory")]
    ratios = mask_ratio_figure(rows)
    if ratios is not None:
        parts.append(html_figure(ratios, "Loss against the masked share"))
    pictures = sorted(folder.glob("reconstruction_*.png"))
    if pictures:
        parts += [html_heading("Reconstruction"), html_picture(pictures[-1], pictures[-1].stem)]
    parts += [html_heading("Settings"), html_code(json.dumps(config.plain(), indent=2))]
    write_atomically(folder / REPORT, html_page(f"Pre-training: {folder.name}", parts).encode())


def _summary(
    config: PretrainConfig, rows: list[dict[str, float]], baseline: float, baseline_label: str
) -> list[tuple[str, str]]:
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    summary = [("steps", f"{max((row['step'] for row in rows), default=0)} of {config.steps}")]
    if validation:
        summary.append(("validation loss", f"{validation[0]:.4f} -> {validation[-1]:.4f}"))
        if not math.isnan(baseline):
            summary.append((f"of {baseline_label}", f"{validation[-1] / baseline:.3f} (that is {baseline:.4f})"))
    return summary + training_summary(rows)


def training_summary(rows: list[dict[str, float]]) -> list[tuple[str, str]]:
    """Speed, waiting and memory of a run, from the rows of its log."""
    training = [row for row in rows if "loss" in row]
    if not training:
        return []
    speed = float(np.median([row["samples_per_second"] for row in training]))
    waited = float(np.mean([row["data_share"] for row in training if "data_share" in row] or [0.0]))
    memory = max(row.get("memory_mib", 0.0) for row in training)
    return [
        ("samples per second, median", f"{speed:.2f}"),
        ("waiting for patches", f"{waited:.0%} of the time"),
        ("memory, highest", f"{memory / 1024:.2f} GiB"),
    ]


def curves_figure(rows: list[dict[str, float]]) -> Figure:
    """Learning rate, gradient norm, samples per second, waiting for data and memory against the step."""
    from matplotlib.figure import Figure

    columns = {
        "learning_rate": "learning rate",
        "gradient_norm": "gradient norm",
        "samples_per_second": "samples / s",
        "data_share": "share of waiting for patches",
        "memory_mib": "memory, MiB",
    }
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (column, label) in zip(axes.flat, columns.items(), strict=False):
        points = [(row["step"], row[column]) for row in rows if column in row]
        if points:
            axis.plot(*zip(*points, strict=True), linewidth=0.8)
            axis.set_ylim(0, 1.05 * max(value for _, value in points) or 1)
        axis.set_title(label)
        axis.set_xlabel("step")
    axes.flat[-1].axis("off")
    return figure


def mask_ratio_figure(rows: list[dict[str, float]]) -> Figure | None:
    """The loss of each step against its masked share; None unless shares differ."""
    from matplotlib.figure import Figure

    points = [(row["mask_ratio"], row["loss"], row["step"]) for row in rows if "loss" in row and "mask_ratio" in row]
    if len({ratio for ratio, _, _ in points}) < 2:
        return None
    ratio, loss, step = (np.array(column) for column in zip(*points, strict=True))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    dots = axes.scatter(ratio, loss, c=step, s=8, cmap="viridis")
    figure.colorbar(dots, label="step")
    axes.set_xlabel("masked share of the voxels")
    axes.set_ylabel("loss of the step")
    return figure
