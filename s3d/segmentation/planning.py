"""Plans: which grid, patch and network a data set gets.

Source: nnU-Net's ExperimentPlanner (Isensee et al., Nature Methods 2021) and its planners of residual encoders
(Isensee et al., MICCAI 2024), with the axes in our order and the features and blocks of a preset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from s3d.data.patches import check_patch_size
from s3d.data.reading import by
from s3d.data.volume import check_spacing
from s3d.model import NetworkShape, preset_shape
from s3d.segmentation.fingerprint import Fingerprint, read_fingerprint
from s3d.segmentation.plan import Millimetres, Normalization, SegmentationPlan, Voxels
from s3d.segmentation.raw_dataset import RawDataset

CT = "ct"  # the name of a channel whose intensities mean the same everywhere

ANISOTROPIC = 3  # an axis is coarse if its voxels are so many times longer than the others
LONGEST_PATCH = 256  # of a cube; others have as many voxels
SHORTEST_FEATURES = 4  # voxels that an axis keeps at the lowest resolution
# nnU-Net's own reference: 680e6 values of feature maps at batch size 2 take 8 GiB in half precision.
BYTES_A_VALUE = 8 * 2**30 / 680e6 / 2


def fixed_plan(
    dataset: RawDataset,
    preset: str,
    spacing_mm: float | Sequence[float],
    patch_size: Sequence[int],
    *,
    skip_bad: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> SegmentationPlan:
    """The network of a preset on a grid that is given: that of the pre-training.

    Images are read only where a channel is called "CT", for the intensities of the data set.

    Args:
        dataset: to be segmented.
        preset: of the network.
        spacing_mm: voxel size in mm, one number or (depth, height, width).
        patch_size: voxels (depth, height, width).
        skip_bad, workers, progress: as in `read_fingerprint`.
    Raises:
        ValueError: no such preset, an argument is out of range, or the network cannot take such a patch.
        BadImageError: a CT case cannot be used and `skip_bad` is off.
    """
    network = preset_shape(preset)
    spacing = check_spacing(spacing_mm)
    if spacing is None:
        raise ValueError("spacing_mm must be one positive number or three of them, got None")
    patch = check_patch(patch_size, network)
    if not any(name.casefold() == CT for name in dataset.channel_names):
        return _plan(dataset, "fixed", spacing, patch, network, None)
    fingerprint = read_fingerprint(dataset, skip_bad=skip_bad, workers=workers, progress=progress)
    return _plan(dataset, "fixed", spacing, patch, network, fingerprint)


def check_patch(patch_size: Sequence[int], network: NetworkShape) -> Voxels:
    """`patch_size` as a tuple.

    Raises:
        ValueError: it is not three positive whole numbers, or not a multiple of the network's total stride along each
            axis, or leaves a single voxel at the lowest resolution, which cannot be normalised.
    """
    patch = check_patch_size(patch_size)
    strides = total_strides(network)
    if any(side % stride for side, stride in zip(patch, strides)):
        nearest = [max(1, round(side / stride)) * stride for side, stride in zip(patch, strides)]
        raise ValueError(
            f"patch_size must be a multiple of {by(strides)}, the total stride of the network, got {by(patch)}; "
            f"{by(nearest)} is near"
        )
    if patch == strides:
        raise ValueError(
            f"patch_size {by(patch)} leaves one voxel at the lowest resolution, which cannot be normalised; at least "
            "one side must be longer"
        )
    return patch


def total_strides(network: NetworkShape) -> Voxels:
    """Voxels of the input that a voxel of the lowest resolution stands for, (depth, height, width)."""
    depth, height, width = (math.prod(stride[axis] for stride in network.strides) for axis in range(3))
    return depth, height, width


def _plan(
    dataset: RawDataset,
    kind: Literal["fixed", "dynamic"],
    spacing_mm: Millimetres,
    patch_size: Voxels,
    network: NetworkShape,
    fingerprint: Fingerprint | None,
) -> SegmentationPlan:
    return SegmentationPlan(
        dataset=dataset.name,
        channel_names=dataset.channel_names,
        class_names=dataset.class_names,
        file_ending=dataset.file_ending,
        kind=kind,
        spacing_mm=spacing_mm,
        patch_size=patch_size,
        normalization=tuple(
            _normalization(name, None if fingerprint is None else fingerprint.foreground[channel])
            for channel, name in enumerate(dataset.channel_names)
        ),
        network=network,
    )


def _normalization(channel_name: str, foreground: NDArray[np.float32] | None) -> Normalization:
    if channel_name.casefold() != CT:
        return Normalization("zscore")
    assert foreground is not None
    low, high = np.percentile(foreground, (0.5, 99.5)).tolist()
    mean, std = float(foreground.mean(dtype=np.float64)), float(foreground.std(dtype=np.float64))
    if not std > 0:
        raise ValueError(
            f"channel {channel_name!r}: every voxel of the foreground is {mean:g}; check images and labels, or rename "
            "the channel in dataset.json, so that each image is normalised by itself"
        )
    return Normalization("ct", low=low, high=high, mean=mean, std=std)
