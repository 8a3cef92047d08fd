"""Pictures and plots of a run."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .data.store import write_atomically
from .training_log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from s3d_kernels import BlockMask

# Volumes are stored (superior, anterior, right), so slices along the three array axes are these.
PLANES = ("axial", "coronal", "sagittal")


def reconstruction_figure(
    target: Tensor,  # [N, 1, D, H, W]
    reconstruction: Tensor,  # [N, 1, D, H, W]
    mask: BlockMask,
    sample: int = 0,
    title: str = "",
) -> Figure:
    """Three planes through the middle of a volume: target, what the network sees, its reconstruction, the error.

    The reconstruction shows the network's output at masked voxels and the target elsewhere; both share one grey scale,
    and the title of the error column gives the mean squared error over the masked voxels of the volume.
    """
    from matplotlib.figure import Figure

    truth = target[sample, 0].detach().float().cpu().numpy()
    guess = reconstruction[sample, 0].detach().float().cpu().numpy()
    visible = mask.to_dense()[sample, 0].cpu().numpy()
    completed = np.where(visible, truth, guess)
    error = np.where(visible, 0.0, guess - truth)
    mse = float((error**2).sum() / max(1, (~visible).sum()))
    low, high = np.percentile(truth, [0.5, 99.5])
    limit = max(1e-6, float(np.percentile(np.abs(truth - truth.mean()), 99.5)))

    figure = Figure(figsize=(10.5, 8.2), layout="constrained")
    axes = figure.subplots(3, 4)
    for row, plane in enumerate(PLANES):
        middle = truth.shape[row] // 2
        # Flipped, so that superior (or anterior) points up.
        slices = [np.take(v, middle, axis=row)[::-1] for v in (truth, visible, completed, error)]
        truth_slice, visible_slice, completed_slice, error_slice = slices
        axes[row, 0].imshow(truth_slice, cmap="gray", vmin=low, vmax=high)
        axes[row, 1].imshow(_with_masked_blue(truth_slice, visible_slice, low, high))
        axes[row, 2].imshow(completed_slice, cmap="gray", vmin=low, vmax=high)
        axes[row, 3].imshow(error_slice, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes[row, 0].set_ylabel(plane)
    for axis, name in zip(axes[0], ("target", "masked input", "reconstruction", f"error (MSE {mse:.3f})"), strict=True):
        axis.set_title(name)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    if title:
        figure.suptitle(title)
    return figure


def _with_masked_blue(
    values: np.ndarray,  # [H, W]
    visible: np.ndarray,  # [H, W] bool
    low: float,
    high: float,
) -> np.ndarray:
    """[H, W, 3] in [0, 1]: grey where visible, blue where masked, so that masked is not taken for dark."""
    grey = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    return np.where(visible[..., None], grey[..., None], np.array([0.16, 0.23, 0.42]))


def loss_figure(log: Path, label: str, baseline: float, baseline_label: str) -> Figure:
    """Training and validation loss against the step, from ``log.csv``.

    Args:
        log: the file.
        label: of the loss.
        baseline: validation loss to be beaten, drawn as a line; NaN: none.
        baseline_label: of the line.
    """
    from matplotlib.figure import Figure

    rows = read_log(log)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    plot_training_loss(axes, rows)
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label="validation")
    if not math.isnan(baseline):
        axes.axhline(baseline, color="0.3", linestyle="--", label=baseline_label)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend()
    return figure


def plot_training_loss(axes: Axes, rows: list[dict[str, float]]) -> None:
    """The loss of each step, and its running mean."""
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    if training:
        axes.plot(*zip(*training, strict=True), color="0.7", linewidth=0.8, label="training")
        steps, losses = (np.array(column) for column in zip(*training, strict=True))
        window = max(1, len(losses) // 30)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"training, mean of {window}")


def memory_figure(
    milliseconds: list[float],  # since the beginning of the step
    present: dict[str, list[int]],  # bytes by kind, one for each time
    phases: list[tuple[str, float, float]],  # name, begin and end in milliseconds
) -> Figure:
    """Memory over a step, stacked by the kind of operator that took it, with the phases named above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = ["0.8"] * ("before" in present) + [f"C{number}" for number in range(10)] * 2
    sizes = np.array([present[kind] for kind in present], dtype=float).reshape(len(present), len(milliseconds)) / 2**20
    if sizes.size:
        # Columns of pixels, each at the moment of its peak: a step has a hundred thousand moments.
        column = np.digitize(milliseconds, np.linspace(0, max(milliseconds), 1500))
        order = np.lexsort((sizes.sum(0), column))
        chosen = np.sort(order[np.append(np.diff(column[order]) > 0, True)])
        labels = {"before": "taken before, given back here"}
        axes.stackplot(
            np.array(milliseconds)[chosen],
            sizes[:, chosen],
            labels=[labels.get(kind, kind) for kind in present],
            colors=colours[: len(present)],
            step="post",
        )
        handles, names = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
    for name, begin, end in phases:
        axes.axvline(end, color="0.3", linewidth=0.8, linestyle="--")
        axes.text((begin + end) / 2, 1.01, name, transform=axes.get_xaxis_transform(), ha="center")
    axes.set_xlabel("ms since the step began")
    axes.set_ylabel("MiB, by who took it")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.set_xlim(left=0)  # as without anything to plot there are only the ends of phases
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG of 110 dots per inch; the file is as it was before or complete.

    Raises:
        OSError: it could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_atomically(path, content.getvalue())
