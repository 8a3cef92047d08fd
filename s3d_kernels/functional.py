"""Functions on BlockSparseTensor: checks, autocast and masks of the result; the operators do the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import operators
from .backends import WindowGeometry, current_backend, fusing
from .backends.interface import PoolKind
from .block_mask import BlockMask, Triple, triple
from .block_sparse import BlockSparseTensor, block_geometry
from .fused_norm import PendingNorm
from .operators.conv import SAVED_X, conv_problem
from .recompute import ConvRecipe, Kept, Recipe, compute_instead


def sparse_conv3d(
    x: BlockSparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    groups: int = 1,
    backend: str | None = None,
    target: BlockMask | None = None,
) -> BlockSparseTensor:
    """3D convolution over visible voxels: masked voxels count as zeros, output exists at visible voxels only.

    Args:
        x: features [N, C_in, D, H, W] at visible voxels; float32, float64, bfloat16 or float16.
        weight: [C_out, C_in / groups, kd, kh, kw].
        bias: [C_out], added at visible voxels.
        stride: per axis.
        padding: per axis, such that the output is the input divided by the stride: k - s <= 2 p < k; or "same".
        groups: blocks of channels that do not see each other.
        backend: name of a backend; default is the current one, see ``use_backend``.
        target: where else output is wanted: a mask on the same grid of blocks, such as ``x.mask.grow(1)``; default is
            ``x.mask.downsample(stride)``.
    Returns: features under ``target``, [N, C_out, D / sd, H / sh, W / sw].
    Raises:
        ValueError: channels, padding, volume or target do not fit; an unknown backend or one that cannot do this.
    Source: sparse convolution of Tian et al., SparK (ICLR 2023), section 3.2; 3D: Wald et al. (CVPR 2025), section 3.
    """
    if weight.dim() != 5 or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"weight must be [C_out, C_in / groups, kd, kh, kw] for C_in={x.shape[1]} and groups={groups}, "
            f"got {tuple(weight.shape)}"
        )
    out_channels = weight.shape[0]
    if groups < 1 or out_channels % groups:
        raise ValueError(f"groups must divide the {out_channels} output channels, got {groups}")
    check_vector("bias", bias, out_channels)
    kernel_size: Triple = tuple(weight.shape[2:])  # type: ignore[assignment]
    steps = triple(stride, "stride")
    source = x.merge(x.mask.merge_factors(steps))
    visible = x.mask.downsample(steps)
    if target is None:
        target = visible
    elif (target.block, target.batch, target.shape) != (visible.block, visible.batch, visible.shape):
        raise ValueError(f"target must lie on the grid of blocks of {visible}, got {target}")
    sizes = conv_padding(kernel_size, steps, padding)
    geometry = _window_geometry(source.mask, target, kernel_size, steps, sizes, whole=padding != "same")
    dtype, weight, bias = in_autocast_dtype(source, weight, bias)
    name = backend or current_backend()
    arguments = (*_arguments(geometry), groups, name)
    may_fuse = target is source.mask and source.may_fuse()
    if may_fuse and fusing(name, conv_problem(weight, groups, geometry, weight)) is not None:
        return _conv3d_fused(source, weight, bias, arguments, dtype)
    blocks = source.blocks.to(dtype)
    y = BlockSparseTensor(operators.conv3d(blocks, weight, bias, *arguments), target)
    if torch.compiler.is_compiling() or y.blocks.grad_fn is None or not weight.requires_grad:
        return y
    recipe = (source.recipe if blocks is source.blocks else None) or Kept(blocks)
    if not isinstance(recipe, Kept):
        compute_instead(y.blocks, SAVED_X, recipe.features)
    y.remember(ConvRecipe.of(recipe, weight, bias, arguments))
    return y


def _conv3d_fused(
    source: BlockSparseTensor, weight: Tensor, bias: Tensor | None, arguments: tuple[Any, ...], dtype: torch.dtype
) -> BlockSparseTensor:
    """Convolution that computes the norm and LeakyReLU before it on the way, and the statistics for a norm behind it.

    Args: as of operators.conv3d; arguments: those behind the bias; dtype: in which the input is to be read.
    """
    deferred = source.deferred() if source.dtype == dtype else None
    recipe: Recipe
    if deferred is None:
        blocks = source.blocks.to(dtype)
        recipe = (source.recipe if blocks is source.blocks else None) or Kept(blocks)
        affine: tuple[Any, ...] = (None, None, None, None, 1.0)
    else:
        blocks, recipe = deferred.place, deferred.recipe
        affine = (
            deferred.raw,
            deferred.recipe.mean,
            deferred.recipe.scale,
            deferred.recipe.shift,
            deferred.recipe.slope,
        )
    offsets = source.mask.sample_offsets
    blocks, mean, squares = operators.conv3d_fused(blocks, weight, bias, *arguments, offsets, *affine)
    y = BlockSparseTensor(blocks, source.mask)
    if blocks.grad_fn is not None and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        if not isinstance(recipe, Kept):
            compute_instead(blocks, SAVED_X, recipe.features)
        y.remember(ConvRecipe.of(recipe, weight, bias, arguments))
    y.remember_statistics(mean, squares, arguments[-1])
    return y


def sparse_conv_transpose3d(
    x: BlockSparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    backend: str | None = None,
) -> BlockSparseTensor:
    """Transposed 3D convolution with stride = kernel size: every visible voxel becomes a visible cuboid of voxels.

    Args:
        x: features [N, C_in, D, H, W] at visible voxels.
        weight: [C_in, C_out / groups, kd, kh, kw].
        bias: [C_out].
        groups: blocks of channels that do not see each other.
        backend: name of a backend; default is the current one.
    Returns: features under ``x.mask.upsample(kernel_size)``, [N, C_out, D * kd, H * kh, W * kw].
    Raises:
        ValueError: channels do not fit.
    """
    if weight.dim() != 5 or x.blocks.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"weight must be [C_in, C_out / groups, kd, kh, kw] for C_in={x.blocks.shape[-1]}, "
            f"got {tuple(weight.shape)}"
        )
    if groups < 1 or len(weight) % groups:
        raise ValueError(f"groups must divide the {len(weight)} input channels, got {groups}")
    check_vector("bias", bias, weight.shape[1] * groups)
    kernel_size: Triple = tuple(weight.shape[2:])  # type: ignore[assignment]
    fine = x.mask.upsample(kernel_size)
    # It is the gradient of the convolution fine -> coarse with respect to its input.
    geometry = _window_geometry(fine, x.mask, kernel_size, kernel_size, (0, 0, 0))
    dtype, weight, bias = in_autocast_dtype(x, weight, bias)
    blocks = x.blocks.to(dtype)
    y = operators.conv3d_grad_input(blocks, weight, *_arguments(geometry), groups, backend or current_backend())
    result = BlockSparseTensor(y, fine)
    return result if bias is None else result + bias.view(-1, 1, 1, 1)


def sparse_pool3d(
    x: BlockSparseTensor,
    kind: PoolKind,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    divisor: int | None = None,
    count_include_pad: bool = True,
    backend: str | None = None,
) -> BlockSparseTensor:
    """Average or maximum pooling over visible voxels.

    Masked voxels count as zeros. Outside the volume the average sees zeros and the maximum nothing, as in torch, so
    with everything visible the result equals that of torch.

    Args:
        x: features [N, C, D, H, W] at visible voxels.
        kind: "avg" or "max".
        kernel_size: window, per axis.
        stride: per axis; default is ``kernel_size``.
        padding: per axis, such that the output is the input divided by the stride: k - s <= 2 p < k.
        divisor: of the average; default is the size of the window.
        count_include_pad: False: the default divisor counts only voxels of the window that are in the volume.
        backend: name of a backend; default is the current one.
    Returns: features under ``x.mask.downsample(stride)``.
    Raises:
        ValueError: padding or volume do not fit.
    """
    window = triple(kernel_size, "kernel_size")
    steps = window if stride is None else triple(stride, "stride")
    source = x.merge(x.mask.merge_factors(steps))
    target = x.mask.downsample(steps)
    sizes = conv_padding(window, steps, padding)
    geometry = _window_geometry(source.mask, target, window, steps, sizes, whole=True)
    if divisor is None:
        divisor = math.prod(window) if count_include_pad or not any(geometry.padding) else 0
    arguments = (*_arguments(geometry), kind, divisor, backend or current_backend())
    return BlockSparseTensor(operators.pool3d(source.blocks, *arguments), target)


def sparse_instance_norm(
    x: BlockSparseTensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> BlockSparseTensor:
    """Instance norm with statistics over the visible voxels of each sample and channel.

    Args:
        x: features [N, C, D, H, W] at visible voxels.
        weight: [C] or None.
        bias: [C] or None.
        eps: added to the (biased) variance inside the square root.
        backend: name of a backend; default is the current one.
    Returns: features under the same mask, dtype of x; statistics are float32 (float64 for float64).
    """
    return sparse_group_norm(x, x.blocks.shape[-1], weight, bias, eps, backend)


def sparse_group_norm(
    x: BlockSparseTensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> BlockSparseTensor:
    """Group norm with statistics over the visible voxels and the channels of a group, per sample.

    Args and returns: as :func:`sparse_instance_norm`; ``num_groups`` divides the channels.
    Raises:
        ValueError: ``num_groups`` does not divide the channels.
    """
    channels = x.blocks.shape[-1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}")
    mean, squares, count = channel_statistics(x, backend)
    if num_groups == channels:
        count = x.mask.voxel_counts(mean.dtype, least=1)
        rstd = (squares / count).add_(eps).rsqrt_()
    else:
        mean, variance, count = _merge_statistics(mean, squares, count.expand_as(mean), "sample", num_groups, False)
        count, rstd = count.clamp(min=1), (variance + eps).rsqrt()
    return _normalize(x, weight, bias, mean, rstd, count, "sample", num_groups, False, backend)


def sparse_batch_norm(
    x: BlockSparseTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    synchronise: bool = False,
    backend: str | None = None,
) -> BlockSparseTensor:
    """Batch norm with statistics over the visible voxels of all samples.

    Args:
        x: features [N, C, D, H, W] at visible voxels.
        running_mean: [C], updated in place when training; None: always use batch statistics.
        running_var: [C], unbiased, updated in place when training.
        weight: [C] or None.
        bias: [C] or None.
        training: use batch statistics; otherwise the running ones.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance inside the square root.
        synchronise: take statistics over all ranks of torch.distributed.
        backend: name of a backend; default is the current one.
    Returns: features under the same mask, dtype of x.
    """
    channels = x.blocks.shape[-1]
    if not training and running_mean is not None and running_var is not None:
        dtype = _statistics_dtype(x)
        # A copy: the running statistics may change before the result is asked for.
        mean = running_mean.to(dtype).repeat(x.mask.batch, 1)
        rstd = (running_var.to(dtype) + eps).rsqrt().repeat(x.mask.batch, 1)
        return _normalize(x, weight, bias, mean, rstd, torch.ones_like(mean), "nothing", 1, False, backend)
    mean, squares, count = channel_statistics(x, backend)
    mean, variance, count = _merge_statistics(mean, squares, count.expand_as(mean), "batch", channels, synchronise)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            # A batch without any visible voxel says nothing about the data.
            share = torch.where(count > 0, momentum, 0.0)
            running_mean += (share * (mean - running_mean))[0].to(running_mean.dtype)
            running_var += (share * (unbiased - running_var))[0].to(running_var.dtype)
    mean, rstd = (table.expand(x.mask.batch, channels).contiguous() for table in (mean, (variance + eps).rsqrt()))
    return _normalize(x, weight, bias, mean, rstd, count.clamp(min=1), "batch", channels, synchronise, backend)


def channel_statistics(x: BlockSparseTensor, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over the visible voxels of each sample and channel, without gradient.

    Returns: mean [N, C], sum of squared deviations from it [N, C], number of voxels [N, 1]; float32 or float64.
    """
    name = backend or current_backend()
    known = x.statistics(name)
    if known is None:
        geometry = block_geometry(x.mask)
        where = (geometry.index, geometry.voxels, geometry.sample_offsets, geometry.sizes())
        known = operators.norm_statistics(x.blocks.detach(), *where, name)
    mean, squares = known
    return mean, squares, x.mask.voxel_counts(mean.dtype)


def _merge_statistics(
    mean: Tensor,  # [N, C]
    squares: Tensor,  # [N, C]
    count: Tensor,  # [N, C]
    over: Literal["sample", "batch"],
    groups: int,
    synchronise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of all values that share a statistic: [N, C], or [1, C] over the batch.

    Chan et al. (1979): the squared deviations of the parts plus those of their means.
    """
    total = operators.norm.sum_shared(count, over, groups, synchronise)
    shared = operators.norm.sum_shared(count / total.clamp(min=1) * mean, over, groups, synchronise)
    squares = squares + count * (mean - shared).square()
    return shared, operators.norm.sum_shared(squares, over, groups, synchronise) / total.clamp(min=1), total


def _normalize(
    x: BlockSparseTensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,  # [N, C]
    rstd: Tensor,  # [N, C]
    count: Tensor,  # at least 1, [N, C], [N, 1] or [1, C]
    over: Literal["sample", "batch", "nothing"],
    groups: int,
    synchronise: bool,
    backend: str | None,
) -> BlockSparseTensor:
    for name, vector in (("weight", weight), ("bias", bias)):
        check_vector(name, vector, x.blocks.shape[-1])
    norm = PendingNorm(
        x.blocks,
        weight,
        bias,
        mean,
        rstd,
        count,
        block_geometry(x.mask),
        (over, groups, synchronise, backend or current_backend()),
        x.recipe,
    )
    if not PendingNorm.may_wait(x.blocks):
        return x.with_blocks(norm.compute(1.0)[0])
    return BlockSparseTensor.of_norm(norm.waiting(), x.mask, x)


def autocast_dtype(x: Tensor | BlockSparseTensor) -> torch.dtype | None:
    """In what to compute with x where torch.autocast is on, as torch's own convolution does; otherwise None."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


def check_vector(name: str, vector: Tensor | None, channels: int) -> None:
    """Raise ValueError, with the name of the argument, unless it is [channels] or None."""
    if vector is not None and vector.shape != (channels,):
        raise ValueError(f"{name} must be a vector of {channels} channels, got shape {tuple(vector.shape)}")


def _statistics_dtype(x: BlockSparseTensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def conv_padding(kernel_size: Triple, stride: Triple, padding: int | str | Sequence[int]) -> Triple:
    """Padding before the volume, per axis, after checking that outputs line up with inputs.

    Raises:
        ValueError: not k - s <= 2 p < k on some axis, so that output size is not input size / stride; says which.
    """
    if padding == "same":
        if stride != (1, 1, 1):
            raise ValueError(f'padding "same" needs stride 1, got {stride}')
        return tuple((k - 1) // 2 for k in kernel_size)  # type: ignore[return-value]
    if isinstance(padding, str):
        if padding != "valid":
            raise ValueError(f'padding must be numbers, "same" or "valid", got {padding!r}')
        padding = 0
    sizes = triple(padding, "padding", minimum=0)
    for axis, k, s, p in zip(("depth", "height", "width"), kernel_size, stride, sizes, strict=True):
        if not k - s <= 2 * p < k:
            raise ValueError(
                f"padding must make the output size the input size / stride (kernel_size - stride <= 2 * padding < "
                f"kernel_size), got kernel_size {k}, stride {s}, padding {p} along {axis}"
            )
    return sizes


def _window_geometry(
    source: BlockMask, target: BlockMask, kernel_size: Triple, stride: Triple, padding: Triple, whole: bool = False
) -> WindowGeometry:
    """The windows between the blocks of two masks; kept with ``source``, for all layers that are alike.

    Args: whole: refuse volumes with an incomplete last window, see :func:`_check_volume`.
    """
    key = (kernel_size, stride, padding, whole)
    known = source.windows.get(key)
    if (
        known is not None
        and known.target_index is target.index
        and known.target_voxels is target.voxels
        and known.target_block == target.block
    ):
        return known
    sizes = zip(kernel_size, stride, padding, source.block, strict=True)
    # Blocks that a window reaches beyond its own: usually one on each side, more for large kernels on tiny blocks.
    radius: Triple = tuple(max(1, -(-max(p, k - s - p) // b)) for k, s, p, b in sizes)  # type: ignore[assignment]
    geometry = WindowGeometry(
        source_index=source.index,
        source_voxels=source.voxels,
        target_index=target.index,
        target_voxels=target.voxels,
        table=source.neighbours(radius, target),
        radius=radius,
        batch=source.batch,
        shape=source.shape,
        target_block=target.block,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
    )
    if whole:
        _check_volume(geometry)
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():  # where tensors are for others too
        source.windows[key] = geometry
    return geometry


def _check_volume(geometry: WindowGeometry) -> None:
    """torch drops a last incomplete window; a mask cannot follow that."""
    sizes = (geometry.kernel_size, geometry.stride, geometry.padding)
    for size, out, k, s, p in zip(geometry.shape, geometry.target_shape, *sizes, strict=True):
        if (size + 2 * p - k) // s + 1 != out:
            raise ValueError(
                f"the volume {geometry.shape} does not fit kernel_size {geometry.kernel_size}, stride "
                f"{geometry.stride}, padding {geometry.padding}: a last incomplete window would be dropped; "
                "pad the volume to a multiple of the stride"
            )


def _arguments(geometry: WindowGeometry) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, list[int]]:
    g = geometry
    return g.source_index, g.source_voxels, g.target_index, g.target_voxels, g.table, g.sizes()


def in_autocast_dtype(
    x: BlockSparseTensor, weight: Tensor, bias: Tensor | None
) -> tuple[torch.dtype, Tensor, Tensor | None]:
    """The dtype of torch.autocast where that is on, as for torch's own convolution, and the parameters in it.

    Raises:
        ValueError: outside autocast, x and weight differ in dtype.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        return dtype, weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must have the same dtype outside autocast, got {x.dtype} and {weight.dtype}")
    return x.dtype, weight, bias
