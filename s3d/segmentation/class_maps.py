"""Files that go together: class maps, and images on the same grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from s3d.data.reading import BadImageError, RawImage, grid_difference, read_image
from s3d.data.source import ImageSource

MOST_NAMED = 8  # values of a file that an error lists


def read_on_grid(path: Path, first_path: Path, first: RawImage) -> RawImage:
    """Reads a file that must lie on the grid of another; BadImageError otherwise."""
    image = read_image(ImageSource(path))
    difference = grid_difference(image, first)
    if difference is not None:
        raise BadImageError(
            path,
            f"lies on another grid than {first_path}: {difference}; all files of a case must share one grid, resample "
            "it",
        )
    return image


def class_map(path: Path, image: RawImage, class_names: Sequence[str]) -> NDArray[np.uint8]:
    """The values of an image as classes, [D, H, W]; BadImageError where they are none."""
    found = np.unique(image.intensities)
    unknown = found[(found != np.round(found)) | (found < 0) | (found >= len(class_names))]
    if len(unknown):
        named = ", ".join(f"{value:g}" for value in unknown[:MOST_NAMED]) + ", ..." * (len(unknown) > MOST_NAMED)
        raise BadImageError(
            path,
            f"holds values that dataset.json does not name: {named} (it names 0 to {len(class_names) - 1}); correct "
            "the file or dataset.json",
        )
    return image.intensities.astype(np.uint8)
