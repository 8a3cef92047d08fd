"""Normalisation over visible voxels.

Backends reduce over the voxels of each sample and channel and apply tables [N, C]; whether the statistics are shared
within a group of channels (group norm) or over the batch and all ranks (batch norm) is algebra on those small
tables, done here.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from ..backends import Backend, BlockGeometry, NormProblem, call
from .custom_operator import custom_operator


def _problem(x: Tensor, geometry: BlockGeometry) -> NormProblem:
    return NormProblem(x.device.type, x.dtype, x.shape[-1], geometry.block, geometry.voxels is not None)


def _table(x: Tensor, geometry: BlockGeometry) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(geometry.batch, x.shape[-1], dtype=dtype)


@custom_operator("s3d_kernels::norm_statistics")
def norm_statistics(
    x: Tensor,  # [V, bd, bh, bw, C]
    index: Tensor,
    voxels: Optional[Tensor],
    sample_offsets: Tensor,
    sizes: list[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Mean over visible voxels, and sum of squared deviations from it. Returns: [N, C] each, float32 or float64."""
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    return call(backend, _problem(x, geometry), Backend.norm_statistics, x, geometry)


@norm_statistics.register_fake
def _(x, index, voxels, sample_offsets, sizes, backend):
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    return _table(x, geometry), _table(x, geometry)


@custom_operator("s3d_kernels::norm_apply")
def norm_apply(
    x: Tensor,  # [V, bd, bh, bw, C]
    mean: Tensor,  # [N, C]
    scale: Tensor,  # [N, C]
    shift: Tensor,  # [N, C]
    residual: Optional[Tensor],  # [V, bd, bh, bw, C]
    index: Tensor,
    voxels: Optional[Tensor],
    sample_offsets: Tensor,
    sizes: list[int],
    slope: float,
    backend: str,
) -> Tensor:
    """leaky_relu((x - mean) * scale + shift + residual): what `normalize` gave, again. Returns: [V, bd, bh, bw, C]."""
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    tables = (mean, scale, shift)
    return call(backend, _problem(x, geometry), Backend.norm_apply, x, *tables, residual, slope, geometry)


@norm_apply.register_fake
def _(x, mean, scale, shift, residual, index, voxels, sample_offsets, sizes, slope, backend):
    return x.new_empty(x.shape)


@custom_operator("s3d_kernels::norm_grad_sums")
def norm_grad_sums(
    grad: Tensor,  # [V, bd, bh, bw, C]
    x: Tensor,  # [V, bd, bh, bw, C]
    y: Optional[Tensor],  # [V, bd, bh, bw, C]
    mean: Tensor,  # [N, C]
    rstd: Tensor,  # [N, C]
    scale: Tensor,  # [N, C]
    shift: Tensor,  # [N, C]
    index: Tensor,
    voxels: Optional[Tensor],
    sample_offsets: Tensor,
    sizes: list[int],
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient before the activation, and its sums over visible voxels, alone and times (x - mean) * rstd.

    The activation had the sign of y, or without y that of (x - mean) * scale + shift. Returns:
    [V, bd, bh, bw, C] (empty if slope is 1: then the first is grad itself), [N, C], [N, C].
    """
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    problem = _problem(x, geometry)
    grad = grad.contiguous()
    if slope == 1.0:
        return grad.new_empty(0), *call(backend, problem, Backend.norm_grad_sums, grad, x, mean, rstd, geometry)
    tables = (mean, rstd, scale, shift)
    return call(backend, problem, Backend.norm_grad_activation, grad, x, y, *tables, slope, geometry)


@norm_grad_sums.register_fake
def _(grad, x, y, mean, rstd, scale, shift, index, voxels, sample_offsets, sizes, slope, backend):
    before = grad.new_empty(0 if slope == 1.0 else grad.shape)
    return before, torch.empty_like(mean), torch.empty_like(mean)


@custom_operator("s3d_kernels::norm_grad_input")
def norm_grad_input(
    grad: Tensor,  # [V, bd, bh, bw, C]
    x: Tensor,  # [V, bd, bh, bw, C]
    mean: Tensor,  # [N, C]
    rstd: Tensor,  # [N, C]
    scale: Tensor,  # [N, C]
    offset: Tensor,  # [N, C]
    slope: Tensor,  # [N, C]
    index: Tensor,
    voxels: Optional[Tensor],
    sample_offsets: Tensor,
    sizes: list[int],
    backend: str,
) -> Tensor:
    """scale * grad - offset - slope * (x - mean) * rstd. Returns: [V, bd, bh, bw, C], dtype of x."""
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    tables = (mean, rstd, scale, offset, slope)
    return call(backend, _problem(x, geometry), Backend.norm_grad_input, grad.contiguous(), x, *tables, geometry)


@norm_grad_input.register_fake
def _(grad, x, mean, rstd, scale, offset, slope, index, voxels, sample_offsets, sizes, backend):
    return x.new_empty(x.shape)


@custom_operator("s3d_kernels::normalize")
def normalize(
    x: Tensor,  # [V, bd, bh, bw, C]
    weight: Optional[Tensor],  # [C]
    bias: Optional[Tensor],  # [C]
    residual: Optional[Tensor],  # [V, bd, bh, bw, C]
    mean: Tensor,  # [N, C]
    rstd: Tensor,  # [N, C]
    count: Tensor,  # [N, C], [N, 1] or [1, C]: values that each statistic was taken over (in group, batch, all ranks)
    index: Tensor,
    voxels: Optional[Tensor],
    sample_offsets: Tensor,
    sizes: list[int],
    slope: float,
    over: str,
    groups: int,
    synchronise: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """leaky_relu((x - mean) * rstd * weight + bias + residual, slope); slope 1 is no activation.

    `over` says what mean and rstd are functions of, for the derivative: "sample" (of the voxels of the sample in each
    of `groups` groups of channels), "batch" (of the voxels of all samples, of all ranks with `synchronise`) or
    "nothing" (given constants); `count` is at least 1. Returns: [V, bd, bh, bw, C], dtype of x; and without gradient
    scale and shift [N, C] of the centred features.
    """
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    scale, shift = affine_tables(weight, bias, rstd)
    tables = (mean, scale, shift)
    y = call(backend, _problem(x, geometry), Backend.norm_apply, x, *tables, residual, slope, geometry)
    return y, scale, shift


@normalize.register_fake
def _(
    x, weight, bias, residual, mean, rstd, count, index, voxels, sample_offsets, sizes, slope,
    over, groups, synchronise, backend,
):  # fmt: skip
    return x.new_empty(x.shape), torch.empty_like(rstd), torch.empty_like(rstd)


@custom_operator("s3d_kernels::normalize_deferred")
def normalize_deferred(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    mean: Tensor,
    rstd: Tensor,
    count: Tensor,
    index: Tensor,
    voxels: Optional[Tensor],
    sample_offsets: Tensor,
    sizes: list[int],
    slope: float,
    over: str,
    groups: int,
    synchronise: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The place of what `normalize` gives, in graph and shape, without its values: for readers who compute them.

    Returns: [V, bd, bh, bw, C], one element in memory that means nothing; and scale and shift.
    """
    return x.new_empty(1).expand(x.shape), *affine_tables(weight, bias, rstd)


@normalize_deferred.register_fake
def _(
    x, weight, bias, residual, mean, rstd, count, index, voxels, sample_offsets, sizes, slope,
    over, groups, synchronise, backend,
):  # fmt: skip
    return x.new_empty(1).expand(x.shape), torch.empty_like(rstd), torch.empty_like(rstd)


@custom_operator("s3d_kernels::compute_deferred")
def compute_deferred(
    deferred: Tensor,  # [V, bd, bh, bw, C]
    x: Tensor,  # [V, bd, bh, bw, C]
    mean: Tensor,  # [N, C]
    scale: Tensor,  # [N, C]
    shift: Tensor,  # [N, C]
    index: Tensor,
    voxels: Optional[Tensor],
    sample_offsets: Tensor,
    sizes: list[int],
    slope: float,
    backend: str,
) -> Tensor:
    """The values of which `deferred` is the place; their gradient goes there. Returns: [V, bd, bh, bw, C]."""
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    tables = (mean, scale, shift)
    return call(backend, _problem(x, geometry), Backend.norm_apply, x, *tables, None, slope, geometry)


@compute_deferred.register_fake
def _(deferred, x, mean, scale, shift, index, voxels, sample_offsets, sizes, slope, backend):
    return x.new_empty(x.shape)


def affine_tables(weight: Optional[Tensor], bias: Optional[Tensor], rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [N, C] of the centred features, in memory of their own."""
    scale = rstd.clone() if weight is None else (rstd * weight).to(rstd.dtype)
    shift = torch.zeros_like(rstd) if bias is None else torch.empty_like(rstd).copy_(bias)
    return scale, shift


def sum_shared(table: Tensor, over: str, groups: int, synchronise: bool) -> Tensor:
    """Sum a table [N, C] over all entries that share a statistic. Returns: [N, C] or [1, C]."""
    if over == "sample":
        return group_sum(table, groups)
    total = table.sum(0, keepdim=True)
    if synchronise:
        torch.distributed.all_reduce(total)
    return total


def group_sum(table: Tensor, groups: int) -> Tensor:
    """[N, C] -> [N, C]: every channel holds the sum over its group."""
    batch, channels = table.shape
    if groups == channels:
        return table
    sums = table.view(batch, groups, channels // groups).sum(2, keepdim=True)
    return sums.expand(-1, -1, channels // groups).reshape(batch, channels)


# Where the setup below saves the features that a caller may want computed instead.
SAVED_X, SAVED_Y = 0, 1


def _normalize_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, mean, rstd, count, index, voxels, sample_offsets, sizes, slope, *rest = inputs
    y, scale, shift = output
    # The sign of the activation follows from x alone, unless there was a residual.
    saved_y = y if residual is not None and slope != 1.0 else None
    ctx.save_for_backward(x, saved_y, mean, rstd, scale, shift, count, index, voxels, sample_offsets)
    ctx.mark_non_differentiable(scale, shift)
    ctx.set_materialize_grads(False)
    ctx.dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
    ctx.sizes, ctx.slope = sizes, slope
    ctx.over, ctx.groups, ctx.synchronise, ctx.backend = rest


def _normalize_backward(ctx: Any, grad: Optional[Tensor], *of_tables: None) -> tuple[Any, ...]:
    if grad is None:  # nothing that follows has a gradient
        return (None,) * 16
    x, y, mean, rstd, scale, shift, count, index, voxels, sample_offsets = ctx.saved_tensors
    geometry = (index, voxels, sample_offsets, ctx.sizes)
    before, of_grad, of_product = norm_grad_sums(
        grad, x, y, mean, rstd, scale, shift, *geometry, ctx.slope, ctx.backend
    )
    del y  # it may have been computed just for this, and the next gradient is as large
    if ctx.slope != 1.0:
        grad = before
    grad_weight, grad_bias = (
        None if dtype is None else _sum_samples(table).to(dtype)
        for dtype, table in zip(ctx.dtypes, (of_product, of_grad), strict=True)
    )
    grad_residual = grad if ctx.needs_input_grad[3] else None
    grad_x = None
    if ctx.needs_input_grad[0]:
        tables = _of_statistics(ctx, of_grad, of_product, scale, count)
        grad_x = norm_grad_input(grad, x, mean, rstd, scale, *tables, *geometry, ctx.backend)
    return grad_x, grad_weight, grad_bias, grad_residual, *(None,) * 12


def _sum_samples(table: Tensor) -> Tensor:
    """[N, C] -> [C]."""
    return table[0] if len(table) == 1 else table.sum(0)


def _of_statistics(
    ctx: Any, of_grad: Tensor, of_product: Tensor, scale: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """What the derivatives of mean and rstd subtract from the gradient: offset and tilt [N, C].

    What is summed has rstd and count in common, so they may be multiplied before.
    """
    if ctx.over == "nothing":
        zeros = torch.zeros_like(scale)
        return zeros, zeros
    share = scale / count
    offset, tilt = of_grad * share, of_product * share
    if ctx.over == "sample" and ctx.groups == scale.shape[1]:
        return offset, tilt
    # One reduction for both tables: across ranks its latency counts, not its size.
    shared = sum_shared(torch.cat([offset, tilt], 1), ctx.over, 2 * ctx.groups, ctx.synchronise)
    offset, tilt = (part.expand_as(scale).contiguous() for part in shared.chunk(2, 1))
    return offset, tilt


normalize.register_autograd(_normalize_backward, setup_context=_normalize_setup)
normalize_deferred.register_autograd(_normalize_backward, setup_context=_normalize_setup)
compute_deferred.register_autograd(lambda ctx, grad: (grad, *(None,) * 10))
