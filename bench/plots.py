"""Plots of measured rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import AXES, Row, curve_points, of_case, setting_of, speed_up

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Row]


def draw(rows: dict[str, list[Row]], machine: dict[str, Any], folder: Path) -> None:
    """Every plot that the rows give, as PNG files in a folder."""
    if rows["encoder"]:
        _save(_encoder(_first_setting(rows["encoder"]), machine), folder / "encoder.png")
    points = curve_points(rows["curve"])
    if points:
        _save(_curve(points, machine), folder / "curve.png")
    convolutions = [row for row in rows["layer"] if row.multiplies]
    if convolutions:
        _save(_roofline(convolutions, machine), folder / "roofline.png")


def _new_figure(width: float, height: float) -> Figure:
    # Not at the head of the file: who measures without drawing needs no matplotlib.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib, so that the same results give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _first_setting(rows: Rows) -> list[Row]:
    """Rows that differ from the first in nothing but mask ratio, layer and contender."""
    same = [row for row in rows if setting_of(row.case) == setting_of(rows[0].case)]
    return sorted(same, key=lambda row: row.case.mask_ratio)


def _encoder(rows: Rows, machine: dict[str, Any]) -> Figure:
    """Speed-up against the masked share with the ideal, time per visible voxel, and peak memory."""
    figure = _new_figure(14, 4.2)
    faster, per_voxel, memory = figure.subplots(1, 3)

    def against_dense_masked(row: Row) -> float | None:
        return speed_up(of_case(rows, row.case).get("dense masked"), row)

    _lines(faster, rows, against_dense_masked)
    shares = sorted({row.masked for row in rows})
    faster.plot([100 * s for s in shares], [1 / (1 - s) for s in shares], "k--", label="1 / visible share")
    faster.set(ylabel="times faster than dense masked", yscale="log")
    _lines(per_voxel, rows, lambda row: 1e9 * row.median["both"] / row.figures["visible_voxels"])
    per_voxel.set(ylabel="ns per visible voxel, forward and backward", yscale="log")
    _lines(memory, rows, lambda row: row.peak_mebibytes)
    memory.set(ylabel="peak memory of the step, MiB", ylim=(0, None))
    for axes in (faster, per_voxel, memory):
        axes.set_xlabel("masked, %")
        axes.grid(alpha=0.3)
    faster.legend()
    case = rows[0].case
    figure.suptitle(
        f"encoder of {case.preset}, {case.batch_size} x {case.patch_size}^3, {case.dtype}, {machine['device']}"
    )
    return figure


def _lines(axes: Axes, rows: Rows, value: Callable[[Row], float | None]) -> None:
    """A line for each contender."""
    for name in dict.fromkeys(row.contender for row in rows):
        points = [(100 * row.masked, value(row)) for row in rows if row.contender == name]
        known = [(x, y) for x, y in points if y is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", label=name)


def _curve(points: dict[str, list[Row]], machine: dict[str, Any]) -> Figure:
    """Time and memory of a training step against each thing that is varied, on logarithmic axes."""
    figure = _new_figure(3.6 * len(points), 4)
    for axes, (name, along) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        at = [AXES[name](row) for row in along]
        axes.plot(at, [row.median["both"] for row in along], "o-", color="C0")
        axes.set(xlabel=name, xscale="log", yscale="log")
        axes.set_ylabel("step, s", color="C0")
        axes.grid(alpha=0.3)
        memory = axes.twinx()
        memory.plot(at, [row.peak_mebibytes for row in along], "s--", color="C1")
        memory.set_yscale("log")
        memory.set_ylabel("peak memory, MiB", color="C1")
    case = next(iter(points.values()))[0].case
    figure.suptitle(f"training step of S3D, {case.preset}, {case.dtype}, {machine['device']}")
    return figure


def _roofline(rows: Rows, machine: dict[str, Any]) -> Figure:
    """Achieved GFLOP/s of convolutions, forward, against FLOP per byte, under what the machine can do."""
    case = rows[0].case
    mine = [row for row in _first_setting(rows) if row.case.mask_ratio == case.mask_ratio]
    figure = _new_figure(7, 5)
    axes = figure.subplots()
    for name in dict.fromkeys(row.contender for row in mine):
        if name.startswith("dense"):
            continue  # it multiplies by zeros: its pairs are others
        points = [(_intensity(row), row.rate / 1e9) for row in mine if row.contender == name]
        axes.plot(*zip(*points, strict=True), "o", label=name)
    peak = max(row.figures["multiplication_flop_per_second"] for row in mine)
    copy = max(row.figures["copy_bytes_per_second"] for row in mine)
    intensities = [_intensity(row) for row in mine]
    edges = sorted({min(intensities) / 2, peak / copy, 2 * max(intensities)})
    axes.plot(edges, [min(peak, copy * x) / 1e9 for x in edges], "k-", label="matrix product, copy")
    axes.set(xscale="log", yscale="log", xlabel="FLOP of visible pairs per byte of visible voxels", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"convolutions, forward, {100 * mine[0].masked:.0f} % masked, {case.dtype}\n{machine['device']}")
    return figure


def _intensity(row: Row) -> float:
    """FLOP of visible pairs per byte of visible inputs and outputs, forward."""
    return float(row.figures["flop"] / row.figures["forward_bytes"])
