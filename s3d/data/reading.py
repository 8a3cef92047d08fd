"""One image file (NIfTI, MGH) -> intensities in canonical orientation, or an error that says what is wrong with it."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHError
from numpy.typing import NDArray

from s3d.data.source import ImageSource

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".mgh", ".mgz")
GZIPPED_SUFFIXES = (".gz", ".mgz")

READ_ERRORS = (
    OSError,  # gzip.BadGzipFile too
    EOFError,
    zlib.error,
    ValueError,
    KeyError,  # an MGH voxel type that there is not
    OverflowError,
    MemoryError,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.spatialimages.HeaderTypeError,
    MGHError,
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
class RawImage:
    """An image as its file has it, in canonical orientation (RAS), the array's axes reversed."""

    intensities: NDArray[np.float32]  # [D, H, W] = (inferior -> superior, posterior -> anterior, left -> right)
    affine: NDArray[np.float64]  # [4, 4], (width, height, depth, 1) of a voxel -> RAS+ millimetres


def is_image(path: str | Path) -> bool:
    """Whether the file name is that of a NIfTI or MGH image."""
    return str(path).lower().endswith(IMAGE_SUFFIXES)


def stem(path: Path) -> str:
    """The name of an image file without the suffix of its format."""
    lengths = [len(suffix) for suffix in IMAGE_SUFFIXES if path.name.lower().endswith(suffix)]
    return path.name[: -max(lengths)] if lengths else path.name


def read_image(source: ImageSource) -> RawImage:
    """Reads an image.

    Raises:
        BadImageError: the file is missing, corrupt, truncated, not three-dimensional, not finite, not made of real
            numbers, or has no sensible affine.
    """
    if source.series is not None:
        from s3d.data.dicom import read_series

        stored, affine = read_series(source.path, source.series)
        return canonical(source.path, stored, affine)
    image = _open(source.path)
    try:
        stored = np.asanyarray(image.dataobj)
    except READ_ERRORS as error:
        raise BadImageError(source.path, f"cannot be read to its end (truncated?): {one_line(error)}") from error
    return canonical(source.path, stored.reshape(stored.shape[:3]), image.affine)


def read_mask(path: Path, image: RawImage) -> NDArray[np.bool_]:
    """Where a mask is not zero, [D, H, W] on the grid of the image.

    Raises:
        BadImageError: as `read_image` does, or the mask is on another grid than the image.
    """
    mask = read_image(ImageSource(path))
    difference = grid_difference(mask, image)
    if difference is not None:
        raise BadImageError(path, f"is a mask on another grid than its image: {difference}; both must share one grid")
    return mask.intensities != 0


def grid_difference(image: RawImage, other: RawImage) -> str | None:
    """How the grid of an image differs from another's, in words; None where they are the same.

    Two files may be rounded differently, but their voxels not be apart by half a voxel anywhere.
    """
    if image.intensities.shape != other.intensities.shape:
        return f"{by(image.intensities.shape)} voxels, not {by(other.intensities.shape)}"
    corners = np.array(np.meshgrid(*[(0, side - 1) for side in reversed(image.intensities.shape)])).reshape(3, -1)
    apart = (image.affine - other.affine) @ np.vstack([corners, np.ones(8)])
    farthest = float(np.abs(apart).max())
    return f"{farthest:.3g} mm apart" if farthest > min(spacing_of(other.affine)) / 2 else None


def spacing_of(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Voxel size in mm, (depth, height, width)."""
    width, height, depth = nib.affines.voxel_sizes(affine).tolist()
    return depth, height, width


def by(shape: Sequence[int]) -> str:
    """A shape in words."""
    return " x ".join(str(side) for side in shape)


def one_line(error: BaseException) -> str:
    """What an error of a library says, fit for a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def canonical(
    path: Path,
    stored: NDArray[np.generic],  # [i, j, k]
    affine: NDArray[np.float64],  # (i, j, k, 1) -> RAS+ millimetres
) -> RawImage:
    """Brings voxels of any orientation into the canonical one.

    Raises:
        BadImageError: voxels are not finite or too large to compute with, or the affine makes no sense.
    """
    _check_affine(path, affine)
    if not np.isfinite(stored).all():
        bad = int(stored.size - np.count_nonzero(np.isfinite(stored)))
        raise BadImageError(path, f"{bad} of {stored.size} voxels are NaN or infinite")
    if max(abs(float(stored.min())), abs(float(stored.max()))) > 1e30:  # their squares must fit float64 comfortably
        raise BadImageError(path, "intensities beyond 1e30; their statistics would overflow")
    flips = nib.io_orientation(affine)
    intensities = nib.apply_orientation(stored, flips).astype(np.float32)
    return RawImage(np.ascontiguousarray(intensities.T), affine @ nib.orientations.inv_ornt_aff(flips, stored.shape))


def _open(path: Path) -> nib.spatialimages.SpatialImage:
    if not path.is_file():
        raise BadImageError(path, "no such file")
    if path.stat().st_size == 0:
        raise BadImageError(path, "the file is empty (0 bytes)")
    kind = "MGH" if path.suffix.lower() in (".mgh", ".mgz") else "NIfTI"
    try:
        if path.suffix.lower() in GZIPPED_SUFFIXES:
            _check_gzip(path)
        image = nib.load(path)
    except READ_ERRORS as error:
        raise BadImageError(path, f"cannot be read as {kind} (corrupt or truncated?): {one_line(error)}") from error
    if not isinstance(image, (nib.Nifti1Image, nib.MGHImage)):  # Nifti2Image is a subclass of Nifti1Image
        raise BadImageError(path, f"is a {type(image).__name__}, not NIfTI or MGH")
    _check_header(path, image)
    return image


def _check_gzip(path: Path) -> None:
    # nibabel stops at the last voxel, before the checksum that tells a damaged file: read to the end once.
    with gzip.open(path) as stream:
        while stream.read(1 << 22):
            continue


def _check_header(path: Path, image: nib.spatialimages.SpatialImage) -> None:
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        kind = {"V": "colour (RGB)", "c": "complex"}.get(dtype.kind, "not numeric")
        raise BadImageError(path, f"unsupported voxel type {dtype}: {kind}; only real numbers can be used")

    shape = image.shape
    if 0 in shape:
        raise BadImageError(path, f"empty: its shape is {by(shape)}")
    if len(shape) < 3 or any(side > 1 for side in shape[3:]):
        raise BadImageError(path, f"has {len(shape)} axes ({by(shape)}); a volume with 3 is needed")
    if 1 in shape[:3]:
        raise BadImageError(path, f"is a single slice ({by(shape)}); a volume with 3 axes is needed")

    # Without an sform the voxel size comes from pixdim, whose zeros nibabel silently replaces by ones.
    if isinstance(image, nib.Nifti1Image) and int(image.header["sform_code"]) == 0:
        with nib.openers.ImageOpener(str(path)) as stream:
            pixdim = type(image.header).from_fileobj(stream, check=False)["pixdim"][1:4]
        if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
            raise BadImageError(path, f"voxel size {pixdim.tolist()} mm in its header; sizes must be positive")


def _check_affine(path: Path, affine: NDArray[np.float64] | None) -> None:
    if affine is None or not np.isfinite(affine).all():
        raise BadImageError(path, "its affine has entries that are not finite")
    spacing = nib.affines.voxel_sizes(affine)
    if not (spacing > 0).all():
        raise BadImageError(path, f"degenerate affine: voxel size {spacing.tolist()} mm; sizes must be positive")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise BadImageError(path, "degenerate affine: its axes do not span space")
