"""Average and maximum pooling over visible voxels, and their derivatives."""

from typing import Any, Optional

from torch import Tensor

from ..backends import Backend, PoolProblem, WindowGeometry, call
from .conv import load_operands, save_operands
from .custom_operator import custom_operator


def _problem(x: Tensor, kind: str, geometry: WindowGeometry) -> PoolProblem:
    return PoolProblem(
        device=x.device.type,
        dtype=x.dtype,
        channels=x.shape[-1],
        kind=kind,  # type: ignore[arg-type]
        kernel_size=geometry.kernel_size,
        stride=geometry.stride,
        padding=geometry.padding,
        block=geometry.target_block,
        partial=geometry.source_voxels is not None or geometry.target_voxels is not None,
    )


@custom_operator("s3d_kernels::pool3d")
def pool3d(
    x: Tensor,  # [Vi, *source_block, C]
    source_index: Tensor,
    source_voxels: Optional[Tensor],
    target_index: Tensor,
    target_voxels: Optional[Tensor],
    table: Tensor,
    sizes: list[int],
    kind: str,
    divisor: int,
    backend: str,
) -> Tensor:
    """Pooling of a kind ("avg", "max"). Returns: [Vo, *target_block, C]."""
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    problem = _problem(x, kind, geometry)
    return call(backend, problem, Backend.pool3d, x, geometry, problem.kind, divisor)


@pool3d.register_fake
def _(x, source_index, source_voxels, target_index, target_voxels, table, sizes, kind, divisor, backend):
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    return x.new_empty(target_index.shape[0], *geometry.target_block, x.shape[-1])


@custom_operator("s3d_kernels::pool3d_grad")
def pool3d_grad(
    grad: Tensor,  # [Vo, *target_block, C]
    x: Optional[Tensor],  # [Vi, *source_block, C], for "max" only
    source_index: Tensor,
    source_voxels: Optional[Tensor],
    target_index: Tensor,
    target_voxels: Optional[Tensor],
    table: Tensor,
    sizes: list[int],
    kind: str,
    divisor: int,
    backend: str,
) -> Tensor:
    """Gradient of pooling with respect to its input. Returns: [Vi, *source_block, C]."""
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    problem = _problem(grad, kind, geometry)
    return call(backend, problem, Backend.pool3d_grad, grad.contiguous(), x, geometry, problem.kind, divisor)


@pool3d_grad.register_fake
def _(grad, x, source_index, source_voxels, target_index, target_voxels, table, sizes, kind, divisor, backend):
    geometry = WindowGeometry.from_operator(source_index, source_voxels, target_index, target_voxels, table, sizes)
    return grad.new_empty(source_index.shape[0], *geometry.source_block, grad.shape[-1])


def _pool3d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *rest = inputs
    save_operands(ctx, (x if rest[-3] == "max" else None,), rest)


def _pool3d_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,), rest = load_operands(ctx)
    return pool3d_grad(grad, x, *rest), *(None for _ in rest)


pool3d.register_autograd(_pool3d_backward, setup_context=_pool3d_setup)
