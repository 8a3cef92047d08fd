"""Logits of a prepared case -> a segmentation on the grid of the case's own file."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from s3d.data.reading import GZIPPED_SUFFIXES
from s3d.data.store import write_atomically
from s3d.data.volume import resample_to
from s3d.segmentation.prepared_case import CaseGrid

# What a NIfTI header says of the grid; affine and shape follow from it.
NIFTI_GRID = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)
RAS = np.array([[0, 1], [1, 1], [2, 1]])  # the canonical orientation, as nibabel writes it
COMPRESSION_LEVEL = 1  # nibabel's own; class maps compress well at any


def restore(
    logits: Tensor,  # [K, D, H, W] float32, on the CPU
    grid: CaseGrid,
    reference: Path,
) -> NDArray[np.uint8]:
    """The class of each voxel of the file that a case was made from.

    Logits are brought back to the crop's own voxels linearly, as volumes are resampled (nnU-Net's order 1 too); the
    class with the largest one wins, the first among equals; outside of the crop is background. It goes class by class:
    of the maps on the file's grid, which can be many times larger than the network's, a few exist at a time.

    Args:
        logits: of the prepared case.
        grid: of the same.
        reference: one of the files of the case.
    Returns: uint8 [i, j, k], as the file stores its voxels.
    """
    depth, height, width = (stop - start for start, stop in grid.box)
    largest = resample_to(logits[0].numpy(), (depth, height, width)).copy()
    crop = np.zeros((depth, height, width), np.uint8)
    for value in range(1, len(logits)):
        other = resample_to(logits[value].numpy(), (depth, height, width))
        larger = other > largest
        crop[larger] = value
        np.copyto(largest, other, where=larger)
    canonical = np.zeros(grid.source_shape, np.uint8)
    canonical[tuple(slice(start, stop) for start, stop in grid.box)] = crop
    image: Any = nib.load(reference)
    own = nib.io_orientation(image.affine)
    stored: NDArray[np.uint8] = nib.apply_orientation(canonical.T, nib.orientations.ornt_transform(RAS, own))
    return stored


def write_segmentation(
    path: Path,
    classes: NDArray[np.uint8],  # [i, j, k], as `reference` stores its voxels
    reference: Path,
) -> None:
    """Write a class map as an image on the grid of another, whole or not at all.

    It has the reference's format (NIfTI or MGH), affine, their codes and units. Its data type is the reference's where
    that is an integer type that holds all classes, otherwise uint8; intensities are never scaled.

    Args:
        path: of the file; its name has the reference's ending.
        classes: the class map.
        reference: the image that was segmented.
    Raises:
        OSError: it could not be written.
    """
    image: Any = nib.load(reference)
    dtype = image.get_data_dtype().newbyteorder("=")
    if dtype.kind not in "iu" or np.iinfo(dtype).max < classes.max():
        dtype = np.dtype(np.uint8)
    if isinstance(image, nib.MGHImage):
        header = image.header.copy()
        header.set_data_dtype(dtype)
        segmentation = nib.MGHImage(classes.astype(dtype), image.affine, header)
    else:
        # A new one: descriptions, intents, scalings and extensions of the reference are not those of a class map.
        header = type(image.header)()
        for field in NIFTI_GRID:
            header[field] = image.header[field]
        header["pixdim"][:4] = image.header["pixdim"][:4]  # the first tells left from right
        header.set_xyzt_units(image.header.get_xyzt_units()[0])
        segmentation = type(image)(classes.astype(dtype), image.affine, header, dtype=dtype)
    content = segmentation.to_bytes()
    if path.suffix.lower() in GZIPPED_SUFFIXES:
        content = gzip.compress(content, COMPRESSION_LEVEL, mtime=0)  # without the time, so that equal maps are equal
    write_atomically(path, content)
