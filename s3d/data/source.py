"""What is known of an image before it is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageSource(os.PathLike[str]):
    """An image, whose it is, and the masks that come with it. Stands for its path wherever a path is expected.

    Masks are images of their own on the grid of the image: 0 or not.
    """

    path: Path  # absolute: a file, or the folder of a DICOM series
    series: str | None = None  # SeriesInstanceUID, where `path` is a folder
    subject: str | None = None  # images of one subject are never on both sides of a split
    session: str | None = None
    anatomy_mask: Path | None = None  # non-zero: the part of the body that matters; the volume is cropped to it
    anonymisation_mask: Path | None = None  # non-zero: made unrecognisable (a removed face), to be kept out of the loss

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path) if self.series is None else f"{self.path} (series {self.series})"

    @property
    def files(self) -> list[Path]:
        """Everything the volume is made from."""
        return [self.path, *(mask for mask in (self.anatomy_mask, self.anonymisation_mask) if mask is not None)]
