"""Mild spatial augmentation (rotation, scaling, mirroring) that reads little more of a volume than it shows.

The usual way reads a region large enough for any rotation and scale, whatever is drawn (257^3 voxels for a 160^3
patch). Here the transform is drawn first, and the region read is the bounding box of the patch it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class SpatialTransform:
    """One drawn transform. A patch voxel at offset o from the patch's centre shows the volume at offset matrix @ o.

    Mirroring comes last and does not move the region that is shown.
    """

    angles_degrees: tuple[float, float, float] = (0.0, 0.0, 0.0)  # around the depth, height and width axis, in turn
    scale: float = 1.0  # extent shown / extent of the patch: above 1 things get smaller
    mirror: tuple[bool, bool, bool] = (False, False, False)  # (depth, height, width)
    flat_axis: int | None = None  # that is not scaled; angles around other axes are 0

    @property
    def interpolates(self) -> bool:
        """Whether voxels are shown that lie between those of the volume; otherwise a patch is a plain crop."""
        return any(self.angles_degrees) or self.scale != 1.0

    @property
    def matrix(self) -> NDArray[np.float64]:
        """[3, 3], rotation times scale, from patch offsets to volume offsets in (depth, height, width)."""
        rotation = np.eye(3)
        for axis, angle in enumerate(self.angles_degrees):
            first, second = (other for other in range(3) if other != axis)
            turn = np.eye(3)
            turn[first, first] = turn[second, second] = math.cos(math.radians(angle))
            turn[first, second] = -math.sin(math.radians(angle))
            turn[second, first] = math.sin(math.radians(angle))
            rotation = turn @ rotation
        return rotation * [1.0 if axis == self.flat_axis else self.scale for axis in range(3)]

    def source_region(
        self, centre: Sequence[float], patch_size: Sequence[int], volume_shape: Sequence[int]
    ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """The part of the volume that the patch shows: its bounding box, cut to the volume.

        Args:
            centre: of the patch, in voxel coordinates of the volume (depth, height, width).
            patch_size: voxels (depth, height, width).
            volume_shape: voxels (depth, height, width).
        Returns: start and shape of the region, at least one voxel.
        """
        half = np.abs(self.matrix) @ ((np.asarray(patch_size) - 1) / 2)
        last = np.asarray(volume_shape) - 1
        low = np.clip(np.floor(centre - half), 0, last).astype(int)
        high = np.clip(np.ceil(centre + half), 0, last).astype(int)
        depth, height, width = low.tolist()
        return (depth, height, width), tuple((high - low + 1).tolist())

    def resample(
        self,
        region: Tensor,  # [d, h, w] float32, as source_region describes it
        region_start: Sequence[int],
        centre: Sequence[float],
        patch_size: Sequence[int],
        background: float,
    ) -> Tensor:
        """The patch, by trilinear interpolation; `background` is what lies outside the volume. Without the mirroring.

        Returns: float32 [D, H, W] = patch_size.
        """
        # torch's own sampler: it takes any region with a few numbers for the grid, where MONAI's transforms
        # would have to be told of the shifted centre through an affine and take seconds to import.
        grid = self.sampling_grid(region.shape, region_start, centre, patch_size)
        # Outside the region the sampler sees zeros, so background is moved there and back.
        shown = torch.nn.functional.grid_sample(
            (region - background)[None, None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False
        )
        return shown[0, 0].add_(background)

    def sampling_grid(
        self,
        region_shape: Sequence[int],
        region_start: Sequence[int],
        centre: Sequence[float],
        patch_size: Sequence[int],
    ) -> Tensor:
        """Where in a region each voxel of the patch lies, as `torch.nn.functional.grid_sample` wants it.

        Returns: float32 [D, H, W, 3] of a patch D x H x W.
        """
        # grid_sample wants (width, height, depth) in units of the region: -1 and 1 are its outer voxel edges. The grid
        # is a sum of three lines, which takes a third of the time of affine_grid.
        extent = np.asarray(region_shape, dtype=np.float64)
        turn = 2 * self.matrix / extent[:, None]
        middle = (2 * (np.asarray(centre) - np.asarray(region_start)) + 1) / extent - 1
        lines = []
        for axis, length in enumerate(patch_size):
            offsets = np.arange(length) - (length - 1) / 2
            line = (offsets[:, None] * turn[:, axis] + middle / 3)[:, ::-1]  # [length, 3]
            lines.append(torch.from_numpy(line.astype(np.float32)))
        depth, height, width = lines
        return depth[:, None, None] + (height[:, None] + width)


@dataclass(frozen=True)
class SpatialAugmentation:
    """Settings of the random transforms; the defaults are those of the method (after nnU-Net).

    Raises:
        ValueError: a probability outside [0, 1], a rotation outside [0, 180], or a scale range that is not
            0 < low <= high.
    Source: Wald et al. (CVPR 2025), section 3; ranges as in nnU-Net (Isensee et al., Nature Methods 2021).
    """

    max_rotation_degrees: float = 30.0  # around each axis, uniform in +-
    rotation_probability: float = 0.2  # of rotating at all; then around all three axes
    scale_range: tuple[float, float] = (0.7, 1.4)  # log-uniform, so that larger and smaller are equally likely
    scale_probability: float = 0.2
    mirror_probability: float = 0.5  # for each axis
    flat_axis: int | None = None  # of patches that are thin along it: they rotate around it only and keep its scale

    def __post_init__(self) -> None:
        for name in ("rotation_probability", "scale_probability", "mirror_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be within [0, 1], got {getattr(self, name)}")
        if not 0 <= self.max_rotation_degrees <= 180:
            raise ValueError(f"max_rotation_degrees must be within [0, 180], got {self.max_rotation_degrees}")
        low, high = self.scale_range
        if not 0 < low <= high < math.inf:
            raise ValueError(f"scale_range must be 0 < low <= high, got {self.scale_range}")

    def draw(self, rng: np.random.Generator) -> SpatialTransform:
        """A random transform."""
        angles, scale = (0.0, 0.0, 0.0), 1.0
        if rng.random() < self.rotation_probability:
            depth, height, width = rng.uniform(-self.max_rotation_degrees, self.max_rotation_degrees, size=3).tolist()
            turns = [self.flat_axis in (None, axis) for axis in range(3)]
            angles = (depth * turns[0], height * turns[1], width * turns[2])
        if rng.random() < self.scale_probability:
            low, high = self.scale_range
            scale = math.exp(rng.uniform(math.log(low), math.log(high)))
        depth_flip, height_flip, width_flip = (rng.random(3) < self.mirror_probability).tolist()
        return SpatialTransform(angles, scale, (depth_flip, height_flip, width_flip), self.flat_axis)
