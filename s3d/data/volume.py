"""One image -> one volume that a network can be trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from s3d.data.reading import BadImageError, by, read_image, read_mask, spacing_of
from s3d.data.source import ImageSource

MIN_SIDE = 8
"""Shortest side, in voxels, that a volume may have after cropping and resampling."""

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Volume:
    """A preprocessed volume.

    Axes are (depth, height, width) = (inferior -> superior, posterior -> anterior, left -> right): nibabel's closest
    canonical orientation (RAS) with the axes reversed, which is the order in which nnU-Net sees a volume.
    """

    voxels: NDArray[np.float32]  # [D, H, W], mean 0, standard deviation 1
    spacing_mm: tuple[float, float, float]  # (depth, height, width)
    affine: NDArray[np.float64]  # [4, 4], (width, height, depth, 1) of a voxel -> RAS+ millimetres
    mean: float  # of the intensities before they were normalised
    std: float
    source: Path
    source_shape: tuple[int, int, int]  # of the image in canonical orientation, (depth, height, width)
    source_spacing_mm: tuple[float, float, float]
    foreground: NDArray[np.bool_]  # [D, H, W], the anatomy mask; without one, what is brighter than the mean
    anonymised: NDArray[np.bool_] | None  # [D, H, W], None where nothing is

    @property
    def background(self) -> float:
        """The value that stands for "nothing there": the minimum."""
        return float(self.voxels.min())


def load_volume(image: str | os.PathLike[str], spacing_mm: float | Sequence[float] | None = 1.0) -> Volume:
    """Reads an image and brings it into the form that pre-training works on.

    Canonical orientation (RAS; the array's axes are its reverse, see `Volume`) -> crop -> resample -> z-score.

    - The crop is the bounding box of the anatomy mask where the image has one, otherwise of the non-zero voxels. It
      comes before resampling, as in nnU-Net: it is cheaper, and interpolation cannot blur the box.
    - Resampling is linear along each axis, voxel edges (not centres) aligned. Where an axis gets coarser the
      triangle filter is widened with the step, which prevents aliasing. Oblique volumes stay oblique: only the order
      and direction of the axes change. An axis has a whole number of voxels, so its spacing may come out slightly
      different from what was asked for; `Volume.spacing_mm` and `Volume.affine` say what it is. The anatomy mask
      takes the nearest voxel; anonymised is what any anonymised voxel is interpolated into.
    - Mean and standard deviation are taken over the whole crop, background included, and background is normalised
      like everything else: nnU-Net's `ZScoreNormalization` with its default `use_mask_for_norm=False`. A foreground
      mask would be a guess for images that are not skull-stripped, and downstream fine-tuning, which has no masks,
      sees the same values. So the masks of an image play no part in it.

    Args:
        image: a .nii, .nii.gz, .mgh or .mgz file of real numbers, three axes (further axes of length 1 are dropped),
            or an `ImageSource`, which may also be a DICOM series and have masks.
        spacing_mm: wanted voxel size in mm, one number or (depth, height, width); None keeps the image's own.
    Returns: the volume, float32 [D, H, W].
    Raises:
        BadImageError: the file or one of its masks is missing, corrupt, truncated, not three-dimensional, empty,
            constant, not finite, not made of real numbers, has no sensible affine, or is too small; or a mask is not
            on the grid of the image.
        ValueError: `spacing_mm` is not one or three positive numbers.
    """
    source = image if isinstance(image, ImageSource) else ImageSource(Path(image))
    path = source.path
    wanted_mm = check_spacing(spacing_mm)
    raw = read_image(source)
    anatomy, anonymised = (
        None if mask is None else read_mask(mask, raw) for mask in (source.anatomy_mask, source.anonymisation_mask)
    )
    if anatomy is None:
        box = bounding_box(path, raw.intensities != 0, "every voxel is zero")
    else:
        box = bounding_box(source.anatomy_mask or path, anatomy, "every voxel of the anatomy mask is zero")
    intensities = raw.intensities[box]
    affine = raw.affine @ _shift_and_scale([side.start for side in box], (1.0, 1.0, 1.0))
    if anonymised is not None:
        anonymised = anonymised[box]
    if wanted_mm is not None:
        if anonymised is not None:
            # By the filter of the image: a voxel is anonymised if any that it is made from is.
            anonymised = resample(anonymised.astype(np.float32), affine, wanted_mm)[0] > 1e-4
        intensities, affine = resample(intensities, affine, wanted_mm)
    if min(intensities.shape) < MIN_SIDE:
        given = f"{by(intensities.shape)} voxels are left after cropping and resampling"
        raise BadImageError(path, f"too small: {given}; every side needs at least {MIN_SIDE}")
    mean, std = mean_and_std(path, intensities)
    depth, height, width = raw.intensities.shape
    return Volume(
        voxels=((intensities - mean) / std).astype(np.float32),
        spacing_mm=spacing_of(affine),
        affine=affine,
        mean=mean,
        std=std,
        source=path,
        source_shape=(depth, height, width),
        source_spacing_mm=spacing_of(raw.affine),
        # Brighter than the mean is body and not air in MRI and CT alike, and takes no choice.
        foreground=intensities > mean if anatomy is None else _nearest(anatomy[box], intensities.shape),
        anonymised=anonymised if anonymised is not None and anonymised.any() else None,
    )


def check_spacing(spacing_mm: float | Sequence[float] | None) -> tuple[float, float, float] | None:
    """`spacing_mm` as (depth, height, width) in mm, or None; ValueError unless it is one or three positive numbers."""
    if spacing_mm is None:
        return None
    numbers = np.asarray(spacing_mm, dtype=np.float64)
    if numbers.shape not in ((), (3,)) or not np.isfinite(numbers).all() or not (numbers > 0).all():
        raise ValueError(f"spacing_mm must be one positive number, three of them or None, got {spacing_mm!r}")
    depth, height, width = np.broadcast_to(numbers, 3).tolist()
    return depth, height, width


def mean_and_std(path: Path, intensities: NDArray[np.float32]) -> tuple[float, float]:
    """Of the cropped volume, in float64; BadImageError of `path` if it is constant."""
    mean, std = float(intensities.mean(dtype=np.float64)), float(intensities.std(dtype=np.float64))
    # Rounding leaves a tiny spread in a constant volume, relative to its level.
    if not std > 1e-6 * abs(mean):
        raise BadImageError(path, f"constant: every voxel of the cropped part is {mean:g}")
    return mean, std


def bounding_box(path: Path, occupied: NDArray[np.bool_], otherwise: str) -> Box:
    """The smallest box that holds every occupied voxel; BadImageError of `path` if there is none."""
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        places = np.flatnonzero(occupied.any(axis=others))
        if not len(places):
            raise BadImageError(path, f"empty: {otherwise}")
        box.append(slice(int(places[0]), int(places[-1]) + 1))
    depth, height, width = box
    return depth, height, width


def resample(
    intensities: NDArray[np.float32],  # [D, H, W]
    affine: NDArray[np.float64],
    wanted_mm: tuple[float, float, float],
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The volume on voxels of (about) another size and their affine, see `load_volume`; itself if the grid stays."""
    spacing = spacing_of(affine)
    old = intensities.shape
    depth, height, width = (max(1, round(side * have / want)) for side, have, want in zip(old, spacing, wanted_mm))
    if (depth, height, width) == old:
        return intensities, affine
    resampled = resample_to(intensities, (depth, height, width))
    step = [before / after for before, after in zip(old, (depth, height, width))]  # new voxel size in old voxels
    start = [(size - 1) / 2 for size in step]  # centre of the first new voxel in old voxel coordinates
    return resampled, affine @ _shift_and_scale(start, step)


def resample_to(intensities: NDArray[np.float32], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """The volume [D, H, W] on another number of voxels, see `load_volume`; itself if the number stays."""
    depth, height, width = shape
    if intensities.shape == shape:
        return intensities
    # torch filters two axes at a time against aliasing (there is no three-dimensional form): (H, W), then D.
    slices = torch.from_numpy(np.ascontiguousarray(intensities))[None]  # [1, D, H, W]
    slices = torch.nn.functional.interpolate(
        slices, size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )
    if depth != len(intensities):
        slices = torch.nn.functional.interpolate(
            slices.transpose(1, 2), size=(depth, width), mode="bilinear", align_corners=False, antialias=True
        ).transpose(1, 2)
    return slices[0].contiguous().numpy()


def _nearest(mask: NDArray[np.bool_], shape: Sequence[int]) -> NDArray[np.bool_]:
    """The mask on the grid that `resample` makes: each new voxel has the value of the old one at its centre."""
    places = [((np.arange(new) + 0.5) * (old / new)).astype(int) for old, new in zip(mask.shape, shape)]
    return mask[np.ix_(*places)]


def _shift_and_scale(start: Sequence[float], step: Sequence[float]) -> NDArray[np.float64]:
    """The matrix from new to old voxel coordinates; arguments in array order (depth first), the matrix width first."""
    matrix = np.diag([*reversed(step), 1.0])
    matrix[:3, 3] = list(reversed(start))
    return matrix
