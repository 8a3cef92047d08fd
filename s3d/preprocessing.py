"""s3d preprocess: bring images into a store of volumes that training reads patches from, and report on it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .data import PreprocessSummary, VolumeStore, find_images, loader_speed, preprocess
from .data.store import write_atomically
from .data.workers import available_cores
from .store_report import store_report

log = logging.getLogger(__name__)

REPORT = "report.html"
MEASURED_PATCH_SIDES = (96, 160)


@dataclass(frozen=True)
class PreprocessConfig:
    """Bring images into a store of volumes that `s3d pretrain` reads patches from, and report on it."""

    images: tuple[str, ...]
    """Folders (BIDS and DICOM too), NIfTI or MGH files, glob patterns, .csv or .json lists."""
    output_dir: Path
    """Folder of the store. What is there already is not done again."""
    spacing: Literal["1mm", "native"] | float | tuple[float, float, float] = "1mm"
    """Voxel size: 1mm, native (each image's own), mm, or mm along the superior, the anterior and the right axis."""
    skip_bad: bool = False
    """Record and skip images that cannot be used, instead of stopping at the first."""
    workers: int | None = None
    """Processes; default: one for each core. 0: none beside the main one."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")

    @property
    def spacing_mm(self) -> float | tuple[float, float, float] | None:
        """As `s3d.data.preprocess` takes it."""
        if isinstance(self.spacing, str):
            return {"1mm": 1.0, "native": None}[self.spacing]
        return self.spacing


def preprocess_images(config: PreprocessConfig) -> PreprocessSummary:
    """Fill or complete a store, write ``report.html`` beside it, and print what was done.

    Raises: as `s3d.data.find_images` and `s3d.data.preprocess` do.
    """
    images = find_images(config.images)
    workers = available_cores() if config.workers is None else config.workers
    log.info("%d images, %d workers", len(images), workers)
    begin = time.perf_counter()
    summary = preprocess(
        images, config.output_dir, spacing_mm=config.spacing_mm, skip_bad=config.skip_bad, workers=workers
    )
    seconds = time.perf_counter() - begin
    log.info("measuring how fast patches are read")
    speeds = [
        loader_speed(config.output_dir, (side, side, side), augmented=augmented)
        for side in MEASURED_PATCH_SIDES
        for augmented in (False, True)
    ]
    report = config.output_dir / REPORT
    page = store_report(VolumeStore(config.output_dir), summary, config.spacing, workers, seconds, speeds)
    write_atomically(report, page.encode())
    print(summary)
    print(f"report: {report}")
    return summary
