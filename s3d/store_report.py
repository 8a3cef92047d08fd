"""What is in a store of preprocessed volumes: one HTML page with pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .data import LoaderSpeed, PreprocessSummary, StoredCase, VolumeStore
from .html_page import html_figure, html_heading, html_page, html_table, html_text
from .report import PLANES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURED_CASES = 6
HISTOGRAM_CASES = 50
LISTED = 200  # rows of a table of cases: a page of 100,000 is of no use
AXES = ("superior-inferior", "anterior-posterior", "left-right")


def store_report(
    store: VolumeStore,
    summary: PreprocessSummary,
    spacing: object,
    workers: int,
    seconds: float,
    speeds: Sequence[LoaderSpeed],
) -> str:
    """The page.

    Args:
        store: filled.
        summary: of the run that filled it last.
        spacing: as the user asked for it.
        workers: processes of that run.
        seconds: that the run took.
        speeds: measured on the store.
    """
    parts = [
        html_heading("Overview"),
        html_table(("what", ""), _overview(store, summary, spacing, workers, seconds)),
        html_heading("Left out"),
        *_left_out(store),
        html_heading("Pictures"),
        html_figure(slices_figure(store), "Slices through the middle; grey values from 0.5 to 99.5 %, anonymised red"),
        html_heading("Distributions"),
        html_figure(distributions_figure(store), "Whole volumes; intensities of up to 50 of them, each a grey line"),
        html_heading("Reading patches"),
        *_reading(speeds),
        html_heading("Volumes"),
        *_cases(store.cases),
    ]
    return html_page("Preprocessed volumes", parts)


def _overview(
    store: VolumeStore, summary: PreprocessSummary, spacing: object, workers: int, seconds: float
) -> list[tuple[str, object]]:
    voxels = sum(math.prod(case.shape) for case in store.cases)
    files = [name for case in store.cases for name in (case.file, case.anonymised_file) if name is not None]
    stored = sum((store.folder / name).stat().st_size for name in files)
    known = [case for case in store.cases if case.subject is not None]
    return [
        ("volumes", len(store)),
        ("written / kept from before / left out", f"{summary.written} / {summary.reused} / {summary.skipped}"),
        ("subjects", f"{len({case.subject for case in known})}, of {len(known)} volumes" if known else "not known"),
        ("sessions", len({(case.subject, case.session) for case in known if case.session is not None})),
        ("DICOM series", sum(case.series is not None for case in store.cases)),
        ("volumes with anonymised regions", sum(case.anonymised_file is not None for case in store.cases)),
        ("spacing asked for", spacing if isinstance(spacing, str) else f"{spacing} mm"),
        ("time of this run", f"{seconds:.1f} s with {workers} workers"),
        ("voxels", f"{voxels / 1e6:,.1f} million"),
        ("size of the images' files", _megabytes(sum(case.source_bytes for case in store.cases))),
        ("size of the store", f"{_megabytes(stored)}, {voxels * 4 / stored:.1f} times smaller than float32"),
    ]


def _left_out(store: VolumeStore) -> list[str]:
    if not store.skipped:
        return [html_text("Nothing.")]
    rows = [(error.path, error.reason) for error in store.skipped[:LISTED]]
    return [html_table(("image", "why"), rows), *_unlisted(len(store.skipped))]


def _reading(speeds: Sequence[LoaderSpeed]) -> list[str]:
    rows = [
        (
            f"{speed.patch_size[0]}^3",
            "augmented" if speed.augmented else "plain",
            f"{speed.patches_per_second:.1f}",
            f"{speed.voxels_per_second / 1e6:.1f}",
            f"{speed.read_amplification:.2f}",
        )
        for speed in speeds
    ]
    text = (
        "Measured on this machine with one worker. A training step with a batch of B patches that takes t seconds "
        "consumes B / t patches a second; that number divided by the patches a second below is how many workers it "
        "needs. Read amplification is voxels decompressed / voxels of the volume under the patch."
    )
    header = ("patch", "", "patches/s", "million voxels/s", "read amplification")
    return [html_text(text), html_table(header, rows)]


def _cases(cases: Sequence[StoredCase]) -> list[str]:
    rows = [
        (
            case.name,
            case.subject or "",
            case.session or "",
            _by(case.source_shape),
            " x ".join(f"{side:.3g}" for side in case.source_spacing_mm),
            _by(case.shape),
            f"{case.mean:.4g} +- {case.std:.4g}",
        )
        for case in cases[:LISTED]
    ]
    header = ("volume", "subject", "session", "image, voxels", "image, mm", "stored, voxels", "intensity")
    return [html_table(header, rows), *_unlisted(len(cases))]


def _unlisted(total: int) -> list[str]:
    return [html_text(f"... and {total - LISTED} more: see index.json")] if total > LISTED else []


def slices_figure(store: VolumeStore) -> Figure:
    """Three planes through the middle of some volumes, a column each."""
    from matplotlib.figure import Figure

    chosen = _evenly(len(store), PICTURED_CASES)
    figure = Figure(figsize=(1.9 * len(chosen), 6), layout="constrained")
    axes = figure.subplots(len(PLANES), len(chosen), squeeze=False)
    for column, case in enumerate(chosen):
        record, voxels = store.cases[case], store.read(case)
        anonymised = store.read_anonymised(case)
        low, high = np.percentile(voxels[::2, ::2, ::2], [0.5, 99.5])
        for row, plane in enumerate(PLANES):
            height_mm, width_mm = (side for axis, side in enumerate(record.spacing_mm) if axis != row)
            axis = axes[row, column]
            show = {"origin": "lower", "aspect": height_mm / width_mm}  # superior, or anterior, is up
            axis.imshow(_middle(voxels, row), cmap="gray", vmin=low, vmax=high, **show)
            if anonymised is not None:
                hidden = _middle(anonymised, row)
                axis.imshow(np.ma.masked_equal(hidden, False), cmap="autumn", alpha=0.6, **show)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(plane)
        axes[0, column].set_title(_shortened(record.name), fontsize=8)
    return figure


def distributions_figure(store: VolumeStore) -> Figure:
    """Histograms of voxel sizes before and shapes after preprocessing, and of intensities."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    spacing, shape, intensity = figure.subplots(1, 3)
    for axes, label, margin, values in (
        (spacing, "mm, voxel size of the images", 0.1, [case.source_spacing_mm for case in store.cases]),
        (shape, "voxels, side of the stored volumes", 8, [case.shape for case in store.cases]),
    ):
        # A margin, so that rounding does not fill the axis where all are alike.
        axes.hist(np.array(values), bins=20, range=(np.min(values) - margin, np.max(values) + margin), label=AXES)
        axes.set_xlabel(label)
        axes.set_ylabel("volumes")
    spacing.legend()

    edges = np.linspace(-4, 8, 121)
    shares = []
    for case in _evenly(len(store), HISTOGRAM_CASES):
        some = store.read(case)[::2, ::2, ::2]
        shares.append(np.histogram(some, edges)[0] / some.size)
        intensity.stairs(shares[-1], edges, color="0.8", linewidth=0.6)
    intensity.stairs(np.mean(shares, axis=0), edges, color="tab:blue", label="mean")
    intensity.set_yscale("log")
    intensity.set_xlabel("intensity after z-scoring")
    intensity.set_ylabel("share of the voxels")
    intensity.legend()
    return figure


def _evenly(total: int, most: int) -> list[int]:
    return sorted(set(np.linspace(0, total - 1, min(total, most)).round().astype(int).tolist()))


def _middle(volume: NDArray[np.generic], axis: int) -> NDArray[np.generic]:
    return np.take(volume, volume.shape[axis] // 2, axis=axis)


def _shortened(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:10]}...{name[-10:]}"


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
