"""Reconstruction loss over masked voxels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s3d_kernels import BlockMask


def masked_mse(
    reconstruction: Tensor,  # [N, C, D, H, W]
    target: Tensor,  # [N, C, D, H, W]
    mask: BlockMask,
    valid: Tensor | None = None,  # [N, 1, D, H, W] bool
    count: float | None = None,
) -> Tensor:
    """Mean squared error over the masked voxels of the batch, float32; 0 where nothing is masked.

    Args:
        reconstruction: of all voxels.
        target: what it should be.
        mask: which voxels the network saw.
        valid: False where the target is not to be learned, such as a face that was removed; default everywhere True.
        count: values to divide by, for a batch that is part of a larger one; default those of this batch.
    Source: Wald et al. (CVPR 2025), section 3.
    """
    masked = ~mask.to_dense()
    if valid is not None:
        masked &= valid
    # Selection, not multiplication: a NaN or infinity at a visible voxel is no business of the loss.
    error = torch.where(masked, reconstruction.float() - target.float(), 0.0)
    total = error.square().sum()
    return total / (masked.sum() * reconstruction.shape[1]).clamp(min=1) if count is None else total / max(count, 1)


def masked_voxels(
    mask: BlockMask,
    valid: Tensor | None = None,  # [N, 1, D, H, W] bool
) -> int:
    """How many voxels of the batch the loss is taken over, see :func:`masked_mse`."""
    if valid is None:
        return mask.batch * math.prod(mask.shape) - int(mask.visible_voxels().sum())
    return int((~mask.to_dense().to(valid.device) & valid).sum())


def visible_mean_mse(
    target: Tensor,  # [N, C, D, H, W]
    mask: BlockMask,
    valid: Tensor | None = None,  # [N, 1, D, H, W] bool
) -> Tensor:
    """The loss of predicting, for every sample and channel, the mean of its visible voxels: what a model must beat."""
    visible = mask.to_dense()
    count = visible.sum((2, 3, 4), keepdim=True).clamp(min=1)
    mean = torch.where(visible, target.float(), 0.0).sum((2, 3, 4), keepdim=True) / count
    return masked_mse(mean.expand_as(target), target, mask, valid)


def block_normalized(
    target: Tensor,  # [N, C, D, H, W]
    mask: BlockMask,
    valid: Tensor | None = None,  # [N, 1, D, H, W] bool
) -> Tensor:
    """The target z-scored within each block of a mask, visible or not, float32: what is left to learn is structure.

    Args:
        target: of all voxels.
        mask: whose blocks are taken.
        valid: voxels whose mean and standard deviation count; default all.

    Source: He et al., "Masked autoencoders are scalable vision learners" (CVPR 2022), section 3.
    """
    sides = [part for pair in zip(mask.grid_shape, mask.block, strict=True) for part in pair]
    blocks = target.float().reshape(*target.shape[:2], *sides)
    inside = (3, 5, 7)
    if valid is None:
        variance, mean = torch.var_mean(blocks, dim=inside, correction=0, keepdim=True)
    else:
        counted = valid.reshape(len(valid), 1, *sides)
        number = counted.sum(inside, keepdim=True).clamp(min=1)
        mean = torch.where(counted, blocks, 0.0).sum(inside, keepdim=True) / number
        variance = torch.where(counted, blocks - mean, 0.0).square().sum(inside, keepdim=True) / number
    return ((blocks - mean) * (variance + 1e-6).rsqrt()).reshape(target.shape)
