"""Pictures and plots of a run."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .data.store import write_atomically
from .training_log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from s3d_kernels import BlockMask

# Volumes are stored (superior, anterior, right), so slices along the three array axes are these.
PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Column:
    """Three planes of a volume, one below the other.

    Attributes:
        name: above them.
        planes: see :func:`middle_planes`; [height, width] values, or [height, width, 3] colours in [0, 1].
        low: value of the first colour.
        high: value of the last colour.
        colours: colour map of the values.
    """

    name: str
    planes: Sequence[NDArray[Any]]
    low: float = 0.0
    high: float = 1.0
    colours: str = "gray"


def middle_planes(volume: NDArray[Any]) -> list[NDArray[Any]]:
    """Axial, coronal and sagittal plane through the middle of a volume [D, H, W], superior (or anterior) up."""
    return [np.take(volume, side // 2, axis=axis)[::-1] for axis, side in enumerate(volume.shape)]


def planes_figure(columns: Sequence[Column], title: str = "") -> Figure:
    """Three planes through the middle of some volumes beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.625 * len(columns), 8.2), layout="constrained")
    axes = figure.subplots(len(PLANES), len(columns), squeeze=False)
    for number, column in enumerate(columns):
        for axis, plane in zip(axes[:, number], column.planes, strict=True):
            axis.imshow(plane, cmap=column.colours, vmin=column.low, vmax=column.high)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0, number].set_title(column.name)
    for axis, name in zip(axes[:, 0], PLANES, strict=True):
        axis.set_ylabel(name)
    if title:
        figure.suptitle(title)
    return figure


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
    truth = target[sample, 0].detach().float().cpu().numpy()
    guess = reconstruction[sample, 0].detach().float().cpu().numpy()
    visible = mask.to_dense()[sample, 0].cpu().numpy()
    completed = np.where(visible, truth, guess)
    error = np.where(visible, 0.0, guess - truth)
    mse = float((error**2).sum() / max(1, (~visible).sum()))
    low, high = np.percentile(truth, [0.5, 99.5])
    limit = max(1e-6, float(np.percentile(np.abs(truth - truth.mean()), 99.5)))

    seen = [
        _with_masked_blue(values, shown, low, high)
        for values, shown in zip(middle_planes(truth), middle_planes(visible), strict=True)
    ]
    return planes_figure(
        [
            Column("target", middle_planes(truth), low, high),
            Column("masked input", seen),
            Column("reconstruction", middle_planes(completed), low, high),
            error_column(middle_planes(error), mse, limit),
        ],
        title,
    )


def error_column(planes: Sequence[NDArray[Any]], mse: float, limit: float) -> Column:
    """The column of a figure that shows an error: red where too high, blue where too low; saturated at the limit."""
    return Column(f"error (MSE {mse:.3f})", planes, -limit, limit, "RdBu_r")


def _with_masked_blue(
    values: NDArray[Any],  # [H, W]
    visible: NDArray[Any],  # [H, W] bool
    low: float,
    high: float,
) -> NDArray[Any]:
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
