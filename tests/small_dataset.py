"""A small labelled data set in the raw layout of nnU-Net."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

CLASSES = ("background", "shell", "core")


def ball(shape: Sequence[int], seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Image and label of a core in a shell in noise that is zero at the border, [x, y, z]; no axis is like another."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    radius = np.sqrt(sum((axis - shift) ** 2 for axis, shift in zip(axes, (0.2, -0.1, 0.0))))
    label = (radius < 0.6).astype(np.uint8) + (radius < 0.3).astype(np.uint8)
    image = 20 + 30.0 * label + rng.normal(0, 3, size=shape).clip(-9, 9)
    image[0] = image[:, -2:] = 0  # so that there is something to crop
    return image.astype(np.float32), label


def save(path: Path, values: NDArray[np.generic], affine: NDArray[np.float64]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def write_dataset(
    folder: Path,
    cases: int = 3,
    shape: Sequence[int] = (16, 20, 12),  # (x, y, z)
    channels: Sequence[str] = ("MRI",),
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),  # (x, y, z)
) -> Path:
    """Writes `cases` cases `case_0`, ... of channels of the same shape and another contrast."""
    affine = np.diag([*spacing_mm, 1.0])
    for number in range(cases):
        image, label = ball(shape, number)
        for channel in range(len(channels)):
            save(folder / "imagesTr" / f"case_{number}_{channel:04d}.nii.gz", image ** (1 + channel / 2), affine)
        save(folder / "labelsTr" / f"case_{number}.nii.gz", label, affine)
    describe(folder, channel_names={str(number): name for number, name in enumerate(channels)}, numTraining=cases)
    return folder


def describe(folder: Path, **changes: object) -> None:
    """Writes dataset.json, or some entries of it anew."""
    file = folder / "dataset.json"
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {name: value for value, name in enumerate(CLASSES)},
        "file_ending": ".nii.gz",
    }
    if file.is_file():
        description = json.loads(file.read_text())
    file.write_text(json.dumps({**description, **changes}))
