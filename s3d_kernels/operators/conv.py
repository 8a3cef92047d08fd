"""Convolution over visible voxels and its derivatives.

Convolution is bilinear, so three operators are closed under differentiation: the gradients of each of conv3d,
conv3d_grad_input and conv3d_grad_weight are the two others. Second derivatives come for free, and the transposed
convolution (kernel = stride) is conv3d_grad_input with the roles of input and output exchanged.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from ..backends import Backend, ConvProblem, WindowGeometry, call, fusing
from .custom_operator import custom_operator

# torch reads the schema of a custom operator from these annotations: it wants Optional and list, not unions, tuples.
# Behind their operands all window operators take the tensors of a WindowGeometry, its sizes and the backend's name.
_GEOMETRY_TENSORS = 5


def conv_problem(weight: Tensor, groups: int, geometry: WindowGeometry, x: Tensor) -> ConvProblem:
    """What `x`, an input or output, and the weight [C_out, C_in / groups, ...] make of a convolution."""
    return ConvProblem(
        device=x.device.type,
        dtype=x.dtype,
        in_channels=weight.shape[1] * groups,
        out_channels=weight.shape[0],
        groups=groups,
        kernel_size=geometry.kernel_size,
        stride=geometry.stride,
        padding=geometry.padding,
        block=geometry.target_block,
        partial=geometry.source_voxels is not None or geometry.target_voxels is not None,
    )


@custom_operator("s3d_kernels::conv3d")
def conv3d(
    x: Tensor,  # [Vi, *source_block, C_in]
    weight: Tensor,  # [C_out, C_in / groups, kd, kh, kw]
    bias: Optional[Tensor],  # [C_out]
    source_index: Tensor,
    source_voxels: Optional[Tensor],
    target_index: Tensor,
    target_voxels: Optional[Tensor],
    table: Tensor,
    sizes: list[int],
    groups: int,
    backend: str,
) -> Tensor:
    """Convolution. Returns: [Vo, *target_block, C_out]."""
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    problem = conv_problem(weight, groups, geometry, x)
    return call(backend, problem, Backend.conv3d, x, weight, bias, geometry, groups)


@conv3d.register_fake
def _(x, weight, bias, source_index, source_voxels, target_index, target_voxels, table, sizes, groups, backend):
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    return x.new_empty(target_index.shape[0], *geometry.target_block, weight.shape[0])


@custom_operator("s3d_kernels::conv3d_fused")
def conv3d_fused(
    x: Tensor,  # [V, *block, C_in]
    weight: Tensor,  # [C_out, C_in / groups, kd, kh, kw]
    bias: Optional[Tensor],  # [C_out]
    source_index: Tensor,
    source_voxels: Optional[Tensor],
    target_index: Tensor,
    target_voxels: Optional[Tensor],
    table: Tensor,
    sizes: list[int],
    groups: int,
    backend: str,
    sample_offsets: Tensor,
    raw: Optional[Tensor],  # [V, *block, C_in]
    mean: Optional[Tensor],  # [N, C_in]
    scale: Optional[Tensor],  # [N, C_in]
    shift: Optional[Tensor],  # [N, C_in]
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution, and the statistics of its result as `norm_statistics` gives them, on a backend that fuses them.

    With `raw` it reads leaky_relu((raw - mean) * scale + shift, slope), and x, of `normalize_deferred`, only stands
    for that in the graph: the caller lets backward compute what is saved of x. Not for compiled graphs.
    Returns: [V, *block, C_out], and without gradient [N, C_out] twice.
    Raises:
        ValueError: the backend does not fuse this.
    """
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    problem = conv_problem(weight, groups, geometry, x)
    kernel = fusing(backend, problem)
    if kernel is None:
        raise ValueError(f"backend {backend!r} does not fuse {problem}")
    affine = None if mean is None or scale is None or shift is None else (mean, scale, shift)
    return kernel.conv3d_fused(x if raw is None else raw, weight, bias, affine, slope, geometry, sample_offsets, groups)


@conv3d_fused.register_fake
def _(
    x, weight, bias, source_index, source_voxels, target_index, target_voxels, table, sizes, groups, backend,
    sample_offsets, raw, mean, scale, shift, slope,
):  # fmt: skip
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    channels = weight.shape[0]
    table = x.new_empty(geometry.batch, channels, dtype=torch.float32)
    return x.new_empty(len(target_index), *geometry.target_block, channels), table, torch.empty_like(table)


@custom_operator("s3d_kernels::conv3d_grad_input")
def conv3d_grad_input(
    grad: Tensor,  # [Vo, *target_block, C_out]
    weight: Tensor,  # [C_out, C_in / groups, kd, kh, kw]
    source_index: Tensor,
    source_voxels: Optional[Tensor],
    target_index: Tensor,
    target_voxels: Optional[Tensor],
    table: Tensor,
    sizes: list[int],
    groups: int,
    backend: str,
) -> Tensor:
    """Gradient of the convolution with respect to its input. Returns: [Vi, *source_block, C_in]."""
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    problem = conv_problem(weight, groups, geometry, grad)
    return call(backend, problem, Backend.conv3d_grad_input, grad.contiguous(), weight, geometry, groups)


@conv3d_grad_input.register_fake
def _(grad, weight, source_index, source_voxels, target_index, target_voxels, table, sizes, groups, backend):
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    return grad.new_empty(source_index.shape[0], *geometry.source_block, weight.shape[1] * groups)


@custom_operator("s3d_kernels::conv3d_grad_weight")
def conv3d_grad_weight(
    grad: Tensor,  # [Vo, *target_block, C_out]
    x: Tensor,  # [Vi, *source_block, C_in]
    source_index: Tensor,
    source_voxels: Optional[Tensor],
    target_index: Tensor,
    target_voxels: Optional[Tensor],
    table: Tensor,
    sizes: list[int],
    groups: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to weight and bias. Returns: [C_out, C_in / groups, kd, kh, kw], [C_out]."""
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    weight = grad.new_empty(grad.shape[-1], x.shape[-1] // groups, 0)
    problem = conv_problem(weight, groups, geometry, grad)
    return call(backend, problem, Backend.conv3d_grad_weight, grad.contiguous(), x.contiguous(), geometry, groups)


@conv3d_grad_weight.register_fake
def _(grad, x, source_index, source_voxels, target_index, target_voxels, table, sizes, groups, backend):
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    channels = grad.shape[-1]
    return grad.new_empty(channels, x.shape[-1] // groups, *geometry.kernel_size), grad.new_empty(channels)


def save_operands(ctx: Any, operands: tuple[Tensor | None, ...], rest: Sequence[Any]) -> None:
    """Keep operands and everything behind them for :func:`load_operands`."""
    ctx.save_for_backward(*operands, *rest[:_GEOMETRY_TENSORS])
    ctx.numbers = rest[_GEOMETRY_TENSORS:]


def load_operands(ctx: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """The operands and the rest."""
    saved = ctx.saved_tensors
    return saved[:-_GEOMETRY_TENSORS], (*saved[-_GEOMETRY_TENSORS:], *ctx.numbers)


# Where the setup below saves the features that a caller may want computed instead.
SAVED_X = 0


def _conv3d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *rest = inputs
    of_parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    save_operands(ctx, (x if of_parameters else None, weight), rest)
    ctx.has_bias = bias is not None


def _conv3d_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x, weight), rest = load_operands(ctx)
    grad_x = grad_weight = grad_bias = None
    if x is not None:
        grad_weight, grad_bias = conv3d_grad_weight(grad, x, *rest)
        del x  # it may have been computed just for this, and the next gradient is as large
    if ctx.needs_input_grad[0]:
        grad_x = conv3d_grad_input(grad, weight, *rest)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, *(None for _ in rest)


# Arguments of conv3d_fused behind those of conv3d.
_FUSED = 6


def _conv3d_fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    y, mean, squares = output
    _conv3d_setup(ctx, inputs[:-_FUSED], y)
    ctx.mark_non_differentiable(mean, squares)
    ctx.set_materialize_grads(False)


def _conv3d_fused_backward(ctx: Any, grad: Optional[Tensor], *of_statistics: None) -> tuple[Any, ...]:
    if grad is None:  # nothing that follows has a gradient
        return (None,) * (11 + _FUSED)
    return *_conv3d_backward(ctx, grad), *(None,) * _FUSED


def _conv3d_grad_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, *rest = inputs
    save_operands(ctx, (grad, weight), rest)


def _conv3d_grad_input_backward(ctx: Any, grad2: Tensor) -> tuple[Any, ...]:
    (grad, weight), rest = load_operands(ctx)
    of_grad = of_weight = None
    if ctx.needs_input_grad[0]:
        of_grad = conv3d(grad2.contiguous(), weight, None, *rest)
    if ctx.needs_input_grad[1]:
        of_weight, _ = conv3d_grad_weight(grad, grad2, *rest)
    return of_grad, of_weight, *(None for _ in rest)


def _conv3d_grad_weight_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, x, *rest = inputs
    save_operands(ctx, (grad, x), rest)


def _conv3d_grad_weight_backward(ctx: Any, grad2_weight: Tensor, grad2_bias: Tensor) -> tuple[Any, ...]:
    (grad, x), rest = load_operands(ctx)
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        of_grad = conv3d(x, grad2_weight, grad2_bias, *rest)
    if ctx.needs_input_grad[1]:
        of_x = conv3d_grad_input(grad, grad2_weight, *rest)
    return of_grad, of_x, *(None for _ in rest)


conv3d.register_autograd(_conv3d_backward, setup_context=_conv3d_setup)
conv3d_fused.register_autograd(_conv3d_fused_backward, setup_context=_conv3d_fused_setup)
conv3d_grad_input.register_autograd(_conv3d_grad_input_backward, setup_context=_conv3d_grad_input_setup)
conv3d_grad_weight.register_autograd(_conv3d_grad_weight_backward, setup_context=_conv3d_grad_weight_setup)
