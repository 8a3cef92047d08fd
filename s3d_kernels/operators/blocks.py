"""Gathering the blocks of a dense volume and scattering them back; each is the gradient of the other."""

from typing import Any, Optional

import torch
from torch import Tensor

from ..backends import Backend, BlockGeometry, BlocksProblem, call
from .custom_operator import custom_operator


def _problem(x: Tensor, channels: int, geometry: BlockGeometry) -> BlocksProblem:
    return BlocksProblem(x.device.type, x.dtype, channels, geometry.block, geometry.voxels is not None)


@custom_operator("s3d_kernels::gather_blocks")
def gather_blocks(
    dense: Tensor,  # [N, C, D, H, W]
    index: Tensor,  # [V, 4] int32
    voxels: Optional[Tensor],  # [V, bd, bh, bw] bool
    sample_offsets: Tensor,  # [N + 1] int32
    sizes: list[int],
    backend: str,
) -> Tensor:
    """Visible blocks of a dense volume, zeros at masked voxels. Returns: [V, bd, bh, bw, C]."""
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    return call(backend, _problem(dense, dense.shape[1], geometry), Backend.gather_blocks, dense, geometry)


@gather_blocks.register_fake
def _(dense, index, voxels, sample_offsets, sizes, backend):
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    return dense.new_empty(index.shape[0], *geometry.block, dense.shape[1])


@custom_operator("s3d_kernels::scatter_blocks")
def scatter_blocks(
    blocks: Tensor,  # [V, bd, bh, bw, C]
    fill: Tensor,  # [C], value of masked voxels
    index: Tensor,
    voxels: Optional[Tensor],
    sample_offsets: Tensor,
    sizes: list[int],
    backend: str,
) -> Tensor:
    """Dense volume with `fill` at masked voxels, in channels-last memory. Returns: [N, C, D, H, W]."""
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    problem = _problem(blocks, blocks.shape[-1], geometry)
    return call(backend, problem, Backend.scatter_blocks, blocks, fill, geometry)


@scatter_blocks.register_fake
def _(blocks, fill, index, voxels, sample_offsets, sizes, backend):
    geometry = BlockGeometry.from_operator(index, voxels, sample_offsets, sizes)
    return blocks.new_empty(geometry.batch, *geometry.shape, blocks.shape[-1]).permute(0, 4, 1, 2, 3)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, voxels, sample_offsets, ctx.sizes, ctx.backend = inputs
    ctx.save_for_backward(index, voxels, sample_offsets)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    zeros = grad.new_zeros(grad.shape[-1])
    return scatter_blocks(grad.contiguous(), zeros, *ctx.saved_tensors, ctx.sizes, ctx.backend), *(None,) * 5


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, index, voxels, sample_offsets, ctx.sizes, ctx.backend = inputs
    ctx.save_for_backward(index, voxels, sample_offsets)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    index, voxels, sample_offsets = ctx.saved_tensors
    rest = (index, voxels, sample_offsets, ctx.sizes, ctx.backend)
    grad_blocks = gather_blocks(grad, *rest)
    grad_fill = None
    if ctx.needs_input_grad[1]:
        # The sum over masked voxels, not "all minus visible", which would cancel.
        block = BlockGeometry.from_operator(index, voxels, sample_offsets, ctx.sizes).block
        shown = grad.new_ones(1, *block, 1).expand(index.shape[0], *block, 1).contiguous()
        visible = scatter_blocks(shown, grad.new_zeros(1), *rest)  # [N, 1, D, H, W]
        grad_fill = torch.where(visible > 0, 0, grad).sum((0, 2, 3, 4))
    return grad_blocks, grad_fill, *(None for _ in rest)


gather_blocks.register_autograd(_gather_backward, setup_context=_gather_setup)
scatter_blocks.register_autograd(_scatter_backward, setup_context=_scatter_setup)
