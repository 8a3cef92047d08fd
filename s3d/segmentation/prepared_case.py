"""The files of a case -> what the network is trained on or shown, with what it takes to bring a result back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from s3d.data.reading import BadImageError, read_image, spacing_of
from s3d.data.source import ImageSource
from s3d.data.volume import bounding_box, mean_and_std, resample
from s3d.segmentation.class_maps import class_map, read_on_grid
from s3d.segmentation.plan import Millimetres, Normalization, SegmentationPlan, Voxels
from s3d.segmentation.raw_dataset import RawCase


@dataclass(frozen=True)
class CaseGrid:
    """Where a prepared case lies in its file. Axes are those of `s3d.data.volume.Volume`.

    Attributes:
        source_shape: of the image in canonical orientation, before cropping.
        box: first voxel and the one behind the last of the crop, along each axis of the source.
        shape: of the prepared case, which is the crop resampled (voxel edges aligned).
    """

    source_shape: Voxels
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    shape: Voxels


@dataclass(frozen=True)
class CroppedCase:
    """A case as its files have it, cropped."""

    case: RawCase
    images: NDArray[np.float32]  # [C, D, H, W]
    labels: NDArray[np.uint8] | None  # [D, H, W]
    affine: NDArray[np.float64]  # [4, 4] of the images' own grid, before cropping
    source_shape: Voxels
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class PreparedCase:
    """A case that a network can be trained on or shown."""

    name: str
    voxels: NDArray[np.float32]  # [C, D, H, W], normalised
    labels: NDArray[np.uint8] | None  # [D, H, W]
    grid: CaseGrid
    spacing_mm: Millimetres


def prepare_case(case: RawCase, plan: SegmentationPlan) -> PreparedCase:
    """Reads a case and brings it into the form that a plan asks for.

    Canonical orientation (RAS, axes reversed) -> crop to the voxels that are not zero in some channel -> resample to
    the plan's spacing as in pre-training (`s3d.data.volume.load_volume`) -> normalise each channel. Labels are
    resampled class by class, linearly, and each voxel gets the class with the largest share, as nnU-Net's labels of
    order 1 do.

    Args:
        case: its files; one image for each channel of the plan.
        plan: spacing, normalisation and classes.
    Raises:
        BadImageError: a file is missing or damaged, channels or label lie on different grids, a channel is constant, or
            the label is empty or has values that the plan's classes do not name.
        ValueError: the case has another number of channels than the plan.
    """
    if len(case.images) != len(plan.channel_names):
        raise ValueError(
            f"case {case.name} has {len(case.images)} channels, but the plan has {len(plan.channel_names)} "
            f"({', '.join(plan.channel_names)}); give one image for each"
        )
    cropped = crop_case(case, plan.class_names)
    channels = []
    affine = cropped.affine
    for path, image, normalization in zip(case.images, cropped.images, plan.normalization, strict=True):
        channel, affine = resample(image, cropped.affine, plan.spacing_mm)
        channels.append(_normalised(path, channel, normalization))
    voxels = np.stack(channels)
    depth, height, width = voxels.shape[1:]
    labels = None
    if cropped.labels is not None:
        labels = _resampled_labels(cropped.labels, cropped.affine, plan)
    return PreparedCase(
        name=case.name,
        voxels=voxels,
        labels=labels,
        grid=CaseGrid(cropped.source_shape, cropped.box, (depth, height, width)),
        spacing_mm=spacing_of(affine),
    )


def crop_case(case: RawCase, class_names: Sequence[str]) -> CroppedCase:
    """Reads a case and checks and crops it; arguments and errors as for `prepare_case`."""
    first = case.images[0]
    raw = [read_image(ImageSource(first))]
    raw += [read_on_grid(path, first, raw[0]) for path in case.images[1:]]
    occupied = np.logical_or.reduce([image.intensities != 0 for image in raw])
    box = bounding_box(first, occupied, "every voxel is zero, of all channels")
    labels = None
    if case.label is not None:
        labels = class_map(case.label, read_on_grid(case.label, first, raw[0]), class_names)[box]
        if not labels.any():
            raise BadImageError(
                case.label,
                "is empty: every voxel is background, at least where the image is not zero; label it, or leave the "
                "case out (it can be skipped as bad)",
            )
    depth, height, width = raw[0].intensities.shape
    return CroppedCase(
        case=case,
        images=np.stack([image.intensities[box] for image in raw]),
        labels=labels,
        affine=raw[0].affine,
        source_shape=(depth, height, width),
        box=((box[0].start, box[0].stop), (box[1].start, box[1].stop), (box[2].start, box[2].stop)),
    )


def _normalised(path: Path, voxels: NDArray[np.float32], normalization: Normalization) -> NDArray[np.float32]:
    if normalization.scheme == "ct":
        assert normalization.mean is not None
        assert normalization.std is not None
        voxels = np.clip(voxels, normalization.low, normalization.high)
        return ((voxels - normalization.mean) / normalization.std).astype(np.float32)
    mean, std = mean_and_std(path, voxels)
    return ((voxels - mean) / std).astype(np.float32)


def _resampled_labels(
    labels: NDArray[np.uint8], affine: NDArray[np.float64], plan: SegmentationPlan
) -> NDArray[np.uint8]:
    share, _ = resample((labels == 0).astype(np.float32), affine, plan.spacing_mm)
    if share.shape == labels.shape:  # the grid is the wanted one
        return labels
    resampled = np.zeros(share.shape, np.uint8)
    for value in range(1, len(plan.class_names)):
        other, _ = resample((labels == value).astype(np.float32), affine, plan.spacing_mm)
        larger = other > share
        resampled[larger] = value
        share = np.where(larger, other, share)
    return resampled
