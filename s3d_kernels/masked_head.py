"""The end of a reconstruction network where only masked voxels are wanted: norm, LeakyReLU and 1x1x1 convolution."""

from __future__ import annotations

from torch import Tensor

from . import operators
from .backends import current_backend
from .block_mask import BlockMask
from .block_sparse import BlockSparseTensor
from .functional import channel_statistics, check_vector, in_autocast_dtype


def masked_head(
    x: BlockSparseTensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    slope: float,
    weight: Tensor,
    bias: Tensor,
    masked: BlockMask,
    backend: str | None = None,
) -> BlockSparseTensor:
    """Instance norm of whole volumes, LeakyReLU and 1x1x1 convolution, at the voxels of ``masked`` only.

    As the three layers on all voxels, statistics and gradients included. But the features between them, as large as
    ``x``, are never there as a whole: backward computes them again, piece by piece, as forward did.

    Args:
        x: features [N, C, D, H, W] of whole volumes: one visible block a sample.
        norm_weight: [C].
        norm_bias: [C].
        eps: added to the (biased) variance of each sample and channel inside the square root.
        slope: of LeakyReLU below zero, in [0, 1).
        weight: [O, C, 1, 1, 1], dtype of ``x`` outside autocast.
        bias: [O].
        masked: the voxels that are wanted, whole blocks of the same volumes; see ``BlockMask.complement``.
        backend: name of a backend; default is the current one, see ``use_backend``.
    Returns: features [N, O, D, H, W] under ``masked``; in autocast its dtype, as of a convolution.
    Raises:
        ValueError: x is not of whole volumes, masked not of whole blocks, or shapes do not fit; says which.
    """
    channels = x.shape[1]
    if x.mask.voxels is not None or x.mask.block != x.mask.shape or x.mask.num_blocks != x.mask.batch:
        raise ValueError(f"x must be whole volumes, one visible block a sample, got {x.mask}")
    if masked.voxels is not None:
        raise ValueError(f"masked must be a mask of whole blocks, got {masked}")
    if (masked.batch, masked.shape, masked.device) != (x.mask.batch, x.mask.shape, x.mask.device):
        raise ValueError(f"masked must be of the volumes of x and on its device {x.device}, got {masked} for {x.mask}")
    if weight.dim() != 5 or tuple(weight.shape[1:]) != (channels, 1, 1, 1):
        raise ValueError(f"weight must be [O, C, 1, 1, 1] for C={channels}, got {tuple(weight.shape)}")
    for name, vector, length in (
        ("norm_weight", norm_weight, channels),
        ("norm_bias", norm_bias, channels),
        ("bias", bias, len(weight)),
    ):
        check_vector(name, vector, length)
    if not 0 <= slope < 1:
        raise ValueError(f"slope must be in [0, 1), got {slope}")
    mean, squares, count = channel_statistics(x, backend)
    rstd = (squares / count + eps).rsqrt()
    _, weight, cast_bias = in_autocast_dtype(x, weight, bias)
    assert cast_bias is not None
    y = operators.masked_head(
        x.blocks,
        norm_weight,
        norm_bias,
        weight[..., 0, 0, 0],
        cast_bias,
        mean.contiguous(),
        rstd.contiguous(),
        masked.index,
        masked.sample_offsets,
        list(masked.block),
        slope,
        backend or current_backend(),
    )
    return BlockSparseTensor(y, masked)
