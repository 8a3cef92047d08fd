"""Normalisation over visible voxels.

Backends reduce over the voxels of each sample and channel and apply tables [N, C]; whether the statistics are shared
within a group of channels (group norm) or over the batch and all ranks (batch norm) is algebra on those small
tables, done here.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from ..backends import BlockGeometry, NormProblem, choose


def _problem(x: Tensor, geometry: BlockGeometry) -> NormProblem:
    return NormProblem(x.device.type, x.dtype, x.shape[-1], geometry.block, geometry.voxels is not None)


def _table(x: Tensor, geometry: BlockGeometry) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(geometry.batch, x.shape[-1], dtype=dtype)


@torch.library.custom_op("s3d_kernels::norm_statistics", mutates_args=())
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
    return choose(backend, _problem(x, geometry)).norm_statistics(x, geometry)


@norm_statistics.register_fake
def _(x, index, voxels, sample_offsets, sizes, backend):
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    return _table(x, geometry), _table(x, geometry)


@torch.library.custom_op("s3d_kernels::norm_grad_sums", mutates_args=())
def norm_grad_sums(
    grad: Tensor,  # [V, bd, bh, bw, C]
    x: Tensor,  # [V, bd, bh, bw, C]
    mean: Tensor,  # [N, C]
    rstd: Tensor,  # [N, C]
    index: Tensor,
    voxels: Optional[Tensor],
    sample_offsets: Tensor,
    sizes: list[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Sums over visible voxels of grad and of grad * (x - mean) * rstd. Returns: [N, C] each."""
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    return choose(backend, _problem(x, geometry)).norm_grad_sums(grad.contiguous(), x, mean, rstd, geometry)


@norm_grad_sums.register_fake
def _(grad, x, mean, rstd, index, voxels, sample_offsets, sizes, backend):
    return torch.empty_like(mean), torch.empty_like(mean)


@torch.library.custom_op("s3d_kernels::norm_grad_input", mutates_args=())
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
    kernel = choose(backend, _problem(x, geometry))
    return kernel.norm_grad_input(grad.contiguous(), x, mean, rstd, scale, offset, slope, geometry)


@norm_grad_input.register_fake
def _(grad, x, mean, rstd, scale, offset, slope, index, voxels, sample_offsets, sizes, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op("s3d_kernels::normalize", mutates_args=())
def normalize(
    x: Tensor,  # [V, bd, bh, bw, C]
    weight: Optional[Tensor],  # [C]
    bias: Optional[Tensor],  # [C]
    mean: Tensor,  # [N, C]
    rstd: Tensor,  # [N, C]
    count: Tensor,  # [N, C] or [1, C]: values that each statistic was taken over (in group, batch, all ranks)
    index: Tensor,
    voxels: Optional[Tensor],
    sample_offsets: Tensor,
    sizes: list[int],
    over: str,
    groups: int,
    synchronise: bool,
    backend: str,
) -> Tensor:
    """(x - mean) * rstd * weight + bias.

    `over` says what mean and rstd are functions of, for the derivative: "sample" (of the voxels of the sample in each
    of `groups` groups of channels), "batch" (of the voxels of all samples, of all ranks with `synchronise`) or
    "nothing" (given constants). Returns: [V, bd, bh, bw, C], dtype of x.
    """
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    scale = rstd if weight is None else rstd * weight
    shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype).expand_as(mean).contiguous()
    return choose(backend, _problem(x, geometry)).norm_apply(x, mean, scale.to(mean.dtype), shift, geometry)


@normalize.register_fake
def _(
    x, weight, bias, mean, rstd, count, index, voxels, sample_offsets, sizes, over, groups, synchronise, backend
):  # fmt: skip
    return x.new_empty(x.shape)


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


def _normalize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, mean, rstd, count, index, voxels, sample_offsets, *rest = inputs
    ctx.save_for_backward(x, weight, bias, mean, rstd, count, index, voxels, sample_offsets)
    ctx.sizes, ctx.over, ctx.groups, ctx.synchronise, ctx.backend = rest


def _normalize_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, mean, rstd, count, index, voxels, sample_offsets = ctx.saved_tensors
    geometry = (index, voxels, sample_offsets, ctx.sizes, ctx.backend)
    of_grad, of_product = norm_grad_sums(grad, x, mean, rstd, *geometry)
    grad_weight = None if weight is None else of_product.sum(0).to(weight.dtype)
    grad_bias = None if bias is None else of_grad.sum(0).to(bias.dtype)
    grad_x = None
    if ctx.needs_input_grad[0]:
        if weight is not None:
            of_grad, of_product = of_grad * weight, of_product * weight
        scale = rstd if weight is None else (rstd * weight).to(rstd.dtype)
        if ctx.over == "nothing":
            offset = slope = torch.zeros_like(mean)
        else:
            per_value = rstd / count.clamp(min=1)
            sums = torch.cat([of_grad, of_product], 1)
            # One reduction for both tables: across ranks its latency counts, not its size.
            shared = sum_shared(sums, ctx.over, 2 * ctx.groups, ctx.synchronise)
            offset, slope = (part * per_value for part in shared.chunk(2, 1))
        grad_x = norm_grad_input(grad, x, mean, rstd, scale, offset.contiguous(), slope.contiguous(), *geometry)
    return grad_x, grad_weight, grad_bias, *(None,) * 11


normalize.register_autograd(_normalize_backward, setup_context=_normalize_setup)
