"""The decoder of the masked autoencoder without the work whose result is known beforehand; see docs/method.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s3d_kernels import (
    BlockMask,
    BlockSparseTensor,
    FilledTensor,
    SparseInstanceNorm3d,
    fused_upconv3d,
    masked_head,
    sparse_conv3d,
)


def decode(
    decoder: UNetDecoder,
    skips: Sequence[FilledTensor | Tensor],
    *,
    kernels: bool,
    wanted: BlockMask | None = None,
    checkpointed: bool = False,
) -> Tensor:
    """What `decoder` gives for the same skips.

    Args:
        decoder: of a network that was converted with ``to_sparse``.
        skips: features of each stage, from full resolution down.
        kernels: compute the stages of which nothing is known with the kernels of s3d_kernels, not with torch's.
        wanted: the voxels whose results are wanted, whole blocks; default all. Others may be zeros.
        checkpointed: keep only what goes into a stage, see ``S3D.checkpoint_activations``.
    Returns: [N, C_out, D, H, W].
    """
    *finer, deepest = skips
    if isinstance(deepest, FilledTensor):
        deepest = deepest.to_dense()
    mask = whole_mask(deepest)
    x = whole_blocks(deepest, mask)
    head = decoder.seg_layers[-1]
    for up, stage, skip in zip(decoder.transpconvs, decoder.stages, finer[::-1], strict=True):
        mask = mask.upsample(up.stride)
        if isinstance(skip, FilledTensor):
            ending = (head, wanted) if stage is decoder.stages[-1] and _ends_in_norm(stage) else (None, None)
            arguments = (up, stage, x, skip, mask, *ending)
            x = checkpoint(_merge, *arguments, use_reentrant=False) if checkpointed else _merge(*arguments)
        elif kernels:
            # In one expression, so that nothing holds the halves any longer. torch.cat is declared for tensors.
            x = stage(torch.cat((up(x), whole_blocks(skip, mask)), 1))  # type: ignore[arg-type]
        else:
            x = whole_blocks(stage(torch.cat((up(dense_features(x)), skip), 1)), mask)
    if x.mask is wanted:
        return x.to_dense()
    reconstruction: Tensor = dense_features(head(x)) if kernels else head(dense_features(x))
    return reconstruction


def _merge(
    up: nn.ConvTranspose3d,
    stage: StackedConvBlocks,
    x: BlockSparseTensor,
    skip: FilledTensor,
    mask: BlockMask,
    head: nn.Conv3d | None,
    wanted: BlockMask | None,
) -> BlockSparseTensor:
    """A stage of the decoder: what `stage(cat(up(x), skip))` gives; of that what `head` gives where it is `wanted`."""
    first, *rest = stage.convs
    weight, bias = first.conv.weight, first.conv.bias
    if _fusing_pays(up, weight, math.prod(mask.shape) * mask.batch):
        y = fused_upconv3d(dense_features(x), up.weight, up.bias, weight, bias, skip).permute(0, 2, 3, 4, 1)
    else:
        of_up, of_skip = weight.split((up.out_channels, weight.shape[1] - up.out_channels), dim=1)
        background = skip.background.conv3d(of_skip, bias)
        upsampled = sparse_conv3d(up(x), of_up, background.centre, 1, first.conv.padding)
        y = skip.conv3d_of(of_skip, background).add_beyond_centre(upsampled.blocks)
    merged = BlockSparseTensor(y, mask)
    if head is not None and head.bias is not None and wanted is not None:
        norm, slope = first.norm, first.nonlin.negative_slope
        return masked_head(merged, norm.weight, norm.bias, norm.eps, slope, head.weight, head.bias, wanted)
    for module in (*first.all_modules[1:], *rest):
        merged = module(merged)
    return merged


def _ends_in_norm(stage: StackedConvBlocks) -> bool:
    """Whether a stage is one convolution, instance norm with affine and LeakyReLU, as ``masked_head`` continues it."""
    _, *behind = stage.convs[0].all_modules
    kinds = [type(module) for module in behind]
    return len(stage.convs) == 1 and kinds == [SparseInstanceNorm3d, nn.LeakyReLU] and behind[0].affine


def _fusing_pays(up: nn.ConvTranspose3d, weight: Tensor, voxels: int) -> bool:
    """Whether the fused up-convolution saves more than the product of the two weights costs.

    Multiplications are counted, of the product all 27 * 8 though it takes fewer; and as kernels of 3^3 save many of
    theirs (Winograd), four times as many must be saved.
    """
    if up.kernel_size != (2, 2, 2) or up.stride != (2, 2, 2) or weight.shape[2:] != (3, 3, 3):
        return False
    below, between, out = up.in_channels, up.out_channels, len(weight)
    saved = voxels * (27 * out * between + between * below - 8 * out * below)
    return saved >= 4 * 216 * out * between * below


def whole_mask(x: Tensor) -> BlockMask:
    """All of each sample of dense features [N, C, D, H, W] as one visible block."""
    everything = torch.ones(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
    return BlockMask.from_grid(everything, tuple(x.shape[2:]))


def whole_blocks(x: Tensor, mask: BlockMask) -> BlockSparseTensor:
    """Dense features [N, C, D, H, W] under a mask that has each sample as one block, in channels-last memory."""
    return BlockSparseTensor(x.permute(0, 2, 3, 4, 1).contiguous(), mask)


def dense_features(x: BlockSparseTensor) -> Tensor:
    """The reverse, without a copy."""
    return x.blocks.permute(0, 4, 1, 2, 3)
