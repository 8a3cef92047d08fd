"""One image file -> one volume that a network can be trained on."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

MIN_SIDE = 8
"""Shortest side, in voxels, that a volume may have after cropping and resampling."""

READ_ERRORS = (
    OSError,  # gzip.BadGzipFile too
    EOFError,
    zlib.error,
    ValueError,
    OverflowError,
    MemoryError,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.spatialimages.HeaderTypeError,
)
"""What nibabel and gzip raise on files that are not what their name says."""


class BadImageError(ValueError):
    """An image file that cannot be used; the message names the file and says what is wrong with it.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # both in args, so that the error survives pickling between processes
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


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

    @property
    def background(self) -> float:
        """The value that stands for "nothing there": the minimum."""
        return float(self.voxels.min())


def load_volume(path: str | Path, spacing_mm: float | Sequence[float] | None = 1.0) -> Volume:
    """Reads an image and brings it into the form that pre-training works on.

    Canonical orientation (RAS; the array's axes are its reverse, see `Volume`) -> crop to the bounding box of the
    non-zero voxels -> resample -> z-score.

    - Cropping comes before resampling, as in nnU-Net: it is cheaper, and interpolation cannot blur the box.
    - Resampling is linear along each axis, voxel edges (not centres) aligned. Where an axis gets coarser the
      triangle filter is widened with the step, which prevents aliasing. Oblique volumes stay oblique: only the order
      and direction of the axes change. An axis has a whole number of voxels, so its spacing may come out slightly
      different from what was asked for; `Volume.spacing_mm` and `Volume.affine` say what it is.
    - Mean and standard deviation are taken over the whole crop, background included, and background is normalised
      like everything else: nnU-Net's `ZScoreNormalization` with its default `use_mask_for_norm=False`. A foreground
      mask would be a guess for images that are not skull-stripped, and downstream fine-tuning sees the same values.

    Args:
        path: a .nii or .nii.gz file of real numbers, three axes (further axes of length 1 are dropped).
        spacing_mm: wanted voxel size in mm, one number or (depth, height, width); None keeps the image's own.
    Returns: the volume, float32 [D, H, W].
    Raises:
        BadImageError: the file is missing, corrupt, truncated, not three-dimensional, empty, constant, not finite,
            not made of real numbers, has no sensible affine, or is too small.
        ValueError: `spacing_mm` is not one or three positive numbers.
    """
    path = Path(path)
    wanted_mm = check_spacing(spacing_mm)
    image = _open(path)
    intensities, affine = _canonical(path, image)
    intensities, affine = _crop_to_nonzero(path, intensities, affine)
    if wanted_mm is not None:
        intensities, affine = _resample(intensities, affine, wanted_mm)
    if min(intensities.shape) < MIN_SIDE:
        given = f"{_by(intensities.shape)} voxels are left after cropping to the non-zero part and resampling"
        raise BadImageError(path, f"too small: {given}; every side needs at least {MIN_SIDE}")
    mean, std = float(intensities.mean(dtype=np.float64)), float(intensities.std(dtype=np.float64))
    # Rounding leaves a tiny spread in a constant volume, relative to its level.
    if not std > 1e-6 * abs(mean):
        raise BadImageError(path, f"constant: every voxel of the non-zero part is {mean:g}")
    return Volume(
        voxels=((intensities - mean) / std).astype(np.float32),
        spacing_mm=_spacing(affine),
        affine=affine,
        mean=mean,
        std=std,
        source=path,
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


def _open(path: Path) -> nib.Nifti1Image:
    if not path.is_file():
        raise BadImageError(path, "no such file")
    if path.stat().st_size == 0:
        raise BadImageError(path, "the file is empty (0 bytes)")
    try:
        if path.suffix.lower() == ".gz":
            _check_gzip(path)
        image = nib.load(path)
    except READ_ERRORS as error:
        raise BadImageError(path, f"cannot be read as NIfTI (corrupt or truncated?): {_one_line(error)}") from error
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image is a subclass
        raise BadImageError(path, f"is a {type(image).__name__}, not NIfTI")
    _check_header(path, image)
    return image


def _check_gzip(path: Path) -> None:
    # nibabel stops at the last voxel, before the checksum that tells a damaged file: read to the end once.
    with gzip.open(path) as stream:
        while stream.read(1 << 22):
            continue


def _check_header(path: Path, image: nib.Nifti1Image) -> None:
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        kind = {"V": "colour (RGB)", "c": "complex"}.get(dtype.kind, "not numeric")
        raise BadImageError(path, f"unsupported voxel type {dtype}: {kind}; only real numbers can be used")

    shape = image.shape
    if 0 in shape:
        raise BadImageError(path, f"empty: its shape is {_by(shape)}")
    if len(shape) < 3 or any(side > 1 for side in shape[3:]):
        raise BadImageError(path, f"has {len(shape)} axes ({_by(shape)}); a volume with 3 is needed")
    if 1 in shape[:3]:
        raise BadImageError(path, f"is a single slice ({_by(shape)}); a volume with 3 axes is needed")

    affine = image.affine
    # Without an sform the voxel size comes from pixdim, whose zeros nibabel silently replaces by ones.
    if int(image.header["sform_code"]) == 0:
        with nib.openers.ImageOpener(str(path)) as stream:
            pixdim = type(image.header).from_fileobj(stream, check=False)["pixdim"][1:4]
        if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
            raise BadImageError(path, f"voxel size {pixdim.tolist()} mm in its header; sizes must be positive")
    if affine is None or not np.isfinite(affine).all():
        raise BadImageError(path, "its affine has entries that are not finite")
    spacing = nib.affines.voxel_sizes(affine)
    if not (spacing > 0).all():
        raise BadImageError(path, f"degenerate affine: voxel size {spacing.tolist()} mm; sizes must be positive")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise BadImageError(path, "degenerate affine: its axes do not span space")


def _canonical(path: Path, image: nib.Nifti1Image) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Intensities [D, H, W] in canonical orientation and their affine (which takes width first)."""
    try:
        stored = np.asanyarray(image.dataobj)
    except READ_ERRORS as error:
        raise BadImageError(path, f"cannot be read to its end (truncated?): {_one_line(error)}") from error
    stored = stored.reshape(stored.shape[:3])
    if not np.isfinite(stored).all():
        bad = int(stored.size - np.count_nonzero(np.isfinite(stored)))
        raise BadImageError(path, f"{bad} of {stored.size} voxels are NaN or infinite")
    if max(abs(float(stored.min())), abs(float(stored.max()))) > 1e30:  # their squares must fit float64 comfortably
        raise BadImageError(path, "intensities beyond 1e30; their statistics would overflow")
    flips = nib.io_orientation(image.affine)
    intensities = nib.apply_orientation(stored, flips).astype(np.float32)
    affine = image.affine @ nib.orientations.inv_ornt_aff(flips, stored.shape)
    return np.ascontiguousarray(intensities.T), affine


def _crop_to_nonzero(
    path: Path, intensities: NDArray[np.float32], affine: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    nonzero = intensities != 0
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        occupied = np.flatnonzero(nonzero.any(axis=others))
        if not len(occupied):
            raise BadImageError(path, "empty: every voxel is zero")
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    start = [side.start for side in box]
    return intensities[tuple(box)], affine @ _shift_and_scale(start, (1.0, 1.0, 1.0))


def _resample(
    intensities: NDArray[np.float32],  # [D, H, W]
    affine: NDArray[np.float64],
    wanted_mm: tuple[float, float, float],
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    spacing = _spacing(affine)
    old = intensities.shape
    depth, height, width = (max(1, round(side * have / want)) for side, have, want in zip(old, spacing, wanted_mm))
    if (depth, height, width) == old:
        return intensities, affine
    # torch filters two axes at a time against aliasing (there is no three-dimensional form): (H, W), then D.
    slices = torch.from_numpy(np.ascontiguousarray(intensities))[None]  # [1, D, H, W]
    slices = torch.nn.functional.interpolate(
        slices, size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )
    if depth != old[0]:
        slices = torch.nn.functional.interpolate(
            slices.transpose(1, 2), size=(depth, width), mode="bilinear", align_corners=False, antialias=True
        ).transpose(1, 2)
    step = [before / after for before, after in zip(old, (depth, height, width))]  # new voxel size in old voxels
    start = [(size - 1) / 2 for size in step]  # centre of the first new voxel in old voxel coordinates
    return slices[0].contiguous().numpy(), affine @ _shift_and_scale(start, step)


def _shift_and_scale(start: Sequence[float], step: Sequence[float]) -> NDArray[np.float64]:
    """The matrix from new to old voxel coordinates; arguments in array order (depth first), the matrix width first."""
    matrix = np.diag([*reversed(step), 1.0])
    matrix[:3, 3] = list(reversed(start))
    return matrix


def _spacing(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    width, height, depth = nib.affines.voxel_sizes(affine).tolist()
    return depth, height, width


def _by(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
