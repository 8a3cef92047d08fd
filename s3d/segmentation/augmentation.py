"""The default augmentation of nnU-Net: how a training patch is turned, scaled, mirrored, and its intensities changed.

Source: `nnUNetTrainer.get_training_transforms` of nnU-Net v2 (Isensee et al., Nature Methods 2021). Intensities are
changed by MONAI, whose transforms follow nnU-Net's; rotation and scaling are ours, as they read only what they show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.transforms import (
    RandAdjustContrast,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandomizableTransform,
    RandScaleIntensity,
    RandScaleIntensityFixedMean,
    RandSimulateLowResolution,
)
from monai.utils import convert_to_tensor
from torch import Tensor

from s3d.data.augment import SpatialAugmentation

ANISOTROPIC = 3  # a patch is flat along an axis where another is more than so many times longer


@dataclass(frozen=True)
class _Change:
    """What may happen to the intensities of a patch."""

    transform: RandomizableTransform  # always does it when called
    probability: float  # for the patch
    channel_probability: float = 1.0  # then for each channel by itself
    in_plane: bool = False  # of flat patches: slice by slice


class Augmentation:
    """Random transforms of patches of one size.

    - Rotation by up to 30 degrees around each axis (probability 0.2), scaling by 0.7 to 1.4 (0.2), mirroring along each
      axis (0.5). Patches that are flat along an axis rotate around it only, by any angle, and keep its scale.
    - Then, one after the other: Gaussian noise (0.1), blur (0.2), brightness (0.15), contrast (0.15), a simulated
      lower resolution (0.25), gamma of the negative (0.1), gamma (0.3).

    Args:
        patch_size: voxels (depth, height, width).
    Attributes:
        spatial: draws rotation, scale and mirroring.
    """

    def __init__(self, patch_size: Sequence[int]) -> None:
        self.flat_axis = int(np.argmin(patch_size)) if max(patch_size) > ANISOTROPIC * min(patch_size) else None
        flat = self.flat_axis is not None
        self.spatial = SpatialAugmentation(max_rotation_degrees=180.0 if flat else 30.0, flat_axis=self.flat_axis)
        blur = (0.5, 1.0)
        self._changes = (
            _Change(RandGaussianNoise(prob=1.0, std=0.1), 0.1),
            _Change(RandGaussianSmooth(prob=1.0, sigma_x=blur, sigma_y=blur, sigma_z=blur), 0.2, 0.5),
            _Change(RandScaleIntensity(prob=1.0, factors=0.25), 0.15),
            _Change(RandScaleIntensityFixedMean(prob=1.0, factors=0.25, preserve_range=True), 0.15),
            _Change(
                RandSimulateLowResolution(
                    prob=1.0,
                    downsample_mode="nearest-exact",
                    upsample_mode="bilinear" if flat else "trilinear",
                    zoom_range=(0.5, 1.0),
                ),
                0.25,
                0.5,
                in_plane=True,
            ),
            _Change(RandAdjustContrast(prob=1.0, gamma=(0.7, 1.5), invert_image=True, retain_stats=True), 0.1),
            _Change(RandAdjustContrast(prob=1.0, gamma=(0.7, 1.5), retain_stats=True), 0.3),
        )

    def change_intensities(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Changes the intensities of a patch.

        Args:
            image: float32 [C, D, H, W].
            rng: that everything is drawn from.
        Returns: a patch like `image`, which may be the same tensor.
        """
        state = np.random.RandomState(rng.bit_generator)  # what MONAI draws from; the same stream of numbers
        for change in self._changes:
            if rng.random() >= change.probability:
                continue
            change.transform.set_random_state(state=state)
            channels = [
                self._changed(channel, change) if rng.random() < change.channel_probability else channel
                for channel in image
            ]
            image = torch.stack(channels)
        return image

    def _changed(self, channel: Tensor, change: _Change) -> Tensor:
        """[D, H, W]"""
        if change.in_plane and self.flat_axis is not None:
            slices = change.transform(channel.movedim(self.flat_axis, 0).contiguous())
            changed = slices.movedim(0, self.flat_axis)
        else:
            changed = change.transform(channel[None])[0]
        return convert_to_tensor(changed, track_meta=False)
