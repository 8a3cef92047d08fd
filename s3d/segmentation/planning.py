"""Plans: which grid, patch and network a data set gets.

Source: nnU-Net's ExperimentPlanner (Isensee et al., Nature Methods 2021) and its planners of residual encoders
(Isensee et al., MICCAI 2024), with the axes in our order and the features and blocks of a preset.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from numpy.typing import NDArray

from s3d.data.patches import check_patch_size
from s3d.data.preparing import short_hash
from s3d.data.reading import by
from s3d.data.store import write_atomically
from s3d.data.volume import check_spacing
from s3d.model import NetworkShape, build_network, preset_shape
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
    if not _has_ct(dataset):
        return _plan(dataset, "fixed", spacing, patch, network, None)
    fingerprint = read_fingerprint(dataset, skip_bad=skip_bad, workers=workers, progress=progress)
    return _plan(dataset, "fixed", spacing, patch, network, fingerprint)


def dynamic_plan(
    dataset: RawDataset,
    preset: str,
    memory_gib: float,
    *,
    batch_size: int = 2,
    skip_bad: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> SegmentationPlan:
    """A grid, patch, strides and kernels that fit the data, as nnU-Net plans its 3D full-resolution configuration.

    The spacing is the median of the training cases, but the 10th percentile along an axis that is coarse in most of
    them. The patch has the proportions of the median case and is cut until a training step fits into the memory. An
    axis is halved from stage to stage while it is long enough and its voxels are not the longest, and convolved with
    kernels of 1 while its voxels are. Features and blocks are those of the preset, of which the lowest stages may be
    left out.

    Args:
        dataset: to be segmented; all its training cases are read.
        preset: of the network.
        memory_gib: that a training step may take, in half precision; full precision takes twice as much.
        batch_size: patches of a training step.
        skip_bad, workers, progress: as in `read_fingerprint`.
    Raises:
        ValueError: no such preset, an argument is out of range, or no patch fits into the memory.
        BadImageError: a case cannot be used and `skip_bad` is off.
    """
    whole = preset_shape(preset)
    if whole.architecture != "resenc":
        raise ValueError(f"a dynamic plan is for ResEnc U-Nets, and preset {preset} is a {whole.architecture} network")
    if not memory_gib > 0:
        raise ValueError(f"memory_gib must be positive, got {memory_gib}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    fingerprint = read_fingerprint(dataset, skip_bad=skip_bad, workers=workers, progress=progress)
    spacing = target_spacing(fingerprint)
    shapes = np.round(fingerprint.shapes * fingerprint.spacings_mm / spacing)
    patch, network = plan_patch(
        whole,
        spacing,
        np.median(shapes, axis=0).tolist(),
        values=memory_gib * 2**30 / BYTES_A_VALUE / batch_size,
        channels=len(dataset.channel_names),
        classes=len(dataset.class_names),
    )
    return _plan(dataset, "dynamic", spacing, patch, network, fingerprint)


def target_spacing(fingerprint: Fingerprint) -> Millimetres:
    """The voxel size that cases are resampled to: nnU-Net's `determine_fullres_target_spacing`."""
    spacing = np.median(fingerprint.spacings_mm, axis=0)
    shape = np.median(fingerprint.shapes, axis=0)
    coarse = int(np.argmax(spacing))
    others = [axis for axis in range(3) if axis != coarse]
    finer = float(spacing[others].max())
    if spacing[coarse] > ANISOTROPIC * finer and shape[coarse] * ANISOTROPIC < shape[others].min():
        spacing[coarse] = max(float(np.percentile(fingerprint.spacings_mm[:, coarse], 10)), finer)
    depth, height, width = spacing.tolist()
    return depth, height, width


def plan_patch(
    preset: NetworkShape,
    spacing_mm: Sequence[float],
    median_shape: Sequence[float],
    *,
    values: float,
    channels: int,
    classes: int,
) -> tuple[Voxels, NetworkShape]:
    """The patch and the network of a grid: nnU-Net's `get_plans_for_configuration`.

    Args:
        preset: whose features and blocks the network has, and no more stages.
        spacing_mm: of the grid, (depth, height, width).
        median_shape: voxels of a case on the grid.
        values: of feature maps that one patch may have.
        channels: of the images.
        classes: background included.
    Raises:
        ValueError: not even a small patch has so few values.
    """
    side = LONGEST_PATCH * math.prod(spacing_mm) ** (1 / 3)  # in mm, of a cube of as many voxels
    wanted = [math.ceil(min(round(side / step), length)) for step, length in zip(spacing_mm, median_shape)]
    while True:
        network = _network(preset, spacing_mm, wanted)
        strides = total_strides(network)
        patch = [-(-length // stride) * stride for length, stride in zip(wanted, strides)]
        needed = feature_values(network, patch, channels, classes)
        if needed <= values:
            return check_patch(patch, network), network
        # The axis that is longest for a case is cut by the stride that it has after the cut: it may be a smaller one.
        axis = int(np.argmax([length / whole for length, whole in zip(patch, median_shape)]))
        cut = [length - stride * (other == axis) for other, (length, stride) in enumerate(zip(patch, strides))]
        if cut[axis] < SHORTEST_FEATURES:
            raise ValueError(
                f"memory_gib is too little: a patch of {by(patch)} needs {needed / values:.1f} times as much; allow "
                "more, lower the batch size or take a smaller preset"
            )
        step = total_strides(_network(preset, spacing_mm, cut))[axis]
        wanted = [length - step * (other == axis) for other, length in enumerate(patch)]


def _network(preset: NetworkShape, spacing_mm: Sequence[float], patch_size: Sequence[int]) -> NetworkShape:
    """Strides and kernels of a patch: nnU-Net's `get_pool_and_conv_props`, for no more stages than the preset has."""
    spacing, size = list(spacing_mm), list(patch_size)
    strides: list[Voxels] = [(1, 1, 1)]
    kernels: list[Voxels] = []
    fine = [False, False, False]  # whether an axis is convolved: from the first stage on where its voxels are short
    while len(strides) < len(preset.features):
        long = [axis for axis in range(3) if size[axis] >= 2 * SHORTEST_FEATURES]
        if not long:
            break
        shortest = min(spacing[axis] for axis in long)
        halved = [axis for axis in long if spacing[axis] < 2 * shortest]
        if len(halved) == 1 and size[halved[0]] < 3 * SHORTEST_FEATURES:
            break
        fine = [was or step < 2 * min(spacing) for was, step in zip(fine, spacing)]
        kernels.append(_triple(3 if axis else 1 for axis in fine))
        strides.append(_triple(2 if axis in halved else 1 for axis in range(3)))
        for axis in halved:
            spacing[axis] *= 2
            size[axis] = -(-size[axis] // 2)
    kernels.append((3, 3, 3))
    stages = len(strides)
    return NetworkShape(preset.features[:stages], preset.blocks[:stages], tuple(strides), tuple(kernels))


def _triple(values: Iterable[int]) -> Voxels:
    depth, height, width = values
    return depth, height, width


def feature_values(network: NetworkShape, patch_size: Sequence[int], channels: int, classes: int) -> int:
    """Values of all feature maps that convolutions make of one patch: nnU-Net's measure of memory."""
    return int(_weightless(network, channels, classes).compute_conv_feature_map_size(tuple(patch_size)))


@functools.lru_cache(maxsize=8)  # many patches in a row have one network, which takes a tenth of a second to make
def _weightless(network: NetworkShape, channels: int, classes: int) -> ResidualEncoderUNet:
    with torch.device("meta"):
        return build_network(network, channels, classes)


def kept_plan(
    make: Callable[..., SegmentationPlan],
    kind: str,
    dataset: RawDataset,
    settings: dict[str, Any],
    folder: Path,
    workers: int,
) -> SegmentationPlan:
    """The plan that an earlier call has kept, if it was of the same settings and files; otherwise a new one is kept.

    Only plans for which all images are read are kept: those that take no time are made anew.

    Args:
        make: makes the plan.
        kind: "fixed" or "dynamic".
        dataset: to be segmented.
        settings: what decides, beside the data set.
        folder: of prepared cases.
        workers: processes that read images.
    Raises: as `make` does.
    """
    if kind == "fixed" and not _has_ct(dataset):
        return make(workers=workers)
    files = [file for case in dataset.training for file in (*case.images, case.label) if file is not None]
    versions = [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    names = [dataset.name, dataset.channel_names, dataset.class_names, dataset.file_ending]
    file = folder / f"plan-{short_hash(json.dumps([kind, settings, names, versions]))}.json"
    if file.is_file():
        return SegmentationPlan.from_plain(json.loads(file.read_text(encoding="utf-8")))
    plan = make(workers=workers)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(plan.plain(), indent=1).encode())
    return plan


def _has_ct(dataset: RawDataset) -> bool:
    return any(name.casefold() == CT for name in dataset.channel_names)


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
