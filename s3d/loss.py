"""Reconstruction loss over masked voxels."""

from __future__ import annotations

import torch
from torch import Tensor

from s3d_kernels import BlockMask


def masked_mse(
    reconstruction: Tensor,  # [N, C, D, H, W]
    target: Tensor,  # [N, C, D, H, W]
    mask: BlockMask,
) -> Tensor:
    """Mean squared error over the masked voxels of the batch, float32; 0 where nothing is masked.

    Source: Wald et al. (CVPR 2025), section 3.
    """
    masked = ~mask.to_dense()
    # Selection, not multiplication: a NaN or infinity at a visible voxel is no business of the loss.
    error = torch.where(masked, reconstruction.float() - target.float(), 0.0)
    return error.square().sum() / (masked.sum() * reconstruction.shape[1]).clamp(min=1)


def visible_mean_mse(
    target: Tensor,  # [N, C, D, H, W]
    mask: BlockMask,
) -> Tensor:
    """The loss of predicting, for every sample and channel, the mean of its visible voxels: what a model must beat."""
    visible = mask.to_dense()
    count = visible.sum((2, 3, 4), keepdim=True).clamp(min=1)
    mean = torch.where(visible, target.float(), 0.0).sum((2, 3, 4), keepdim=True) / count
    return masked_mse(mean.expand_as(target), target, mask)
