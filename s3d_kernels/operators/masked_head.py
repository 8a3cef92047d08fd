"""Instance norm of whole volumes, LeakyReLU and 1x1x1 convolution, of which only some blocks are wanted.

What lies between the norm's input and the result is as large as the input and is never there as a whole: forward
computes it in pieces, and backward again, piece by piece.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, BlockGeometry, BlocksProblem, NormProblem, call
from .custom_operator import custom_operator
from .norm import affine_tables

# Features of one piece. On a CPU four such tensors stay in its outermost cache; smaller pieces are a little faster on
# an idle machine, but on a busy one threads wait for the scheduler several times in each. Not a matter of the number of
# threads, which must not change the order of sums. On a GPU starting kernels takes no time beside so many.
PIECE_BYTES = {"cpu": 2**22}
PIECE_BYTES_ELSEWHERE = 2**26

Piece = tuple[slice, BlockGeometry]  # of the rows of a tensor, and where they lie


def _pieces(geometry: BlockGeometry, like: Tensor) -> Iterator[Piece]:
    """Cut the rows of blocks one voxel deep, with as many features each as ``like`` [N, D, H, W, C] has."""
    _, height, width = geometry.block
    row_bytes = max(1, height * width * like.shape[-1] * like.element_size())
    rows = max(1, PIECE_BYTES.get(like.device.type, PIECE_BYTES_ELSEWHERE) // row_bytes)
    for start in range(0, len(geometry.index), rows):
        where = slice(start, min(start + rows, len(geometry.index)))
        offsets = (geometry.sample_offsets - start).clamp(0, where.stop - start)
        index = geometry.index[where]
        yield where, BlockGeometry(index, None, offsets, geometry.batch, geometry.shape, geometry.block)


def _wanted(index: Tensor, sample_offsets: Tensor, block: list[int], x: Tensor) -> BlockGeometry:
    """The wanted blocks, cut into blocks one voxel deep: those of a block follow one another."""
    depth, height, width = block
    n, d, h, w = index.unbind(1)
    planes = d[:, None] * depth + torch.arange(depth, dtype=index.dtype, device=index.device)
    n, h, w = (column.repeat_interleave(depth) for column in (n, h, w))
    rows = torch.stack([n, planes.flatten(), h, w], 1)
    shape = (x.shape[1], x.shape[2], x.shape[3])
    return BlockGeometry(rows, None, sample_offsets * depth, x.shape[0], shape, (1, height, width))


def _everything(x: Tensor) -> BlockGeometry:
    """All lines of the volumes [N, D, H, W, C] as blocks, in the order of memory."""
    batch, lines, width = x.shape[0], x.shape[1] * x.shape[2], x.shape[3]
    rows = torch.arange(batch * lines, dtype=torch.int32, device=x.device)
    zeros = torch.zeros_like(rows)
    index = torch.stack([rows // lines, rows % lines, zeros, zeros], 1)
    offsets = torch.arange(0, batch * lines + 1, lines, dtype=torch.int32, device=x.device)
    return BlockGeometry(index, None, offsets, batch, (lines, 1, width), (1, 1, width))


def _problem(x: Tensor, geometry: BlockGeometry) -> NormProblem:
    return NormProblem(x.device.type, x.dtype, x.shape[-1], geometry.block, partial=False)


def _gather(x: Tensor, geometry: BlockGeometry, backend: str) -> Tensor:
    """[N, D, H, W, C] -> [rows, 1, bh, bw, C]."""
    problem = BlocksProblem(x.device.type, x.dtype, x.shape[-1], geometry.block, partial=False)
    return call(backend, problem, Backend.gather_blocks, x.permute(0, 4, 1, 2, 3), geometry)


@custom_operator("s3d_kernels::masked_head")
def masked_head(
    x: Tensor,  # [N, D, H, W, C]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    weight: Tensor,  # [O, C]
    bias: Tensor,  # [O], dtype of weight
    mean: Tensor,  # [N, C]
    rstd: Tensor,  # [N, C]
    index: Tensor,  # [V, 4] int32: the wanted blocks
    sample_offsets: Tensor,  # [N + 1] int32
    block: list[int],
    slope: float,
    backend: str,
) -> Tensor:
    """leaky_relu((x - mean) * rstd * norm_weight + norm_bias, slope) @ weight.T + bias at the wanted blocks.

    mean and rstd are functions of all voxels of x, for the derivative. Returns: [V, bd, bh, bw, O], dtype of weight.
    """
    x = x.contiguous()
    wanted = _wanted(index, sample_offsets, block, x)
    scale, shift = affine_tables(norm_weight, norm_bias, rstd)
    y = weight.new_empty(len(wanted.index), *wanted.block, len(weight))
    for rows, piece in _pieces(wanted, x):
        raw = _gather(x, piece, backend)
        activated = _activate(raw, mean, scale, shift, slope, piece, backend)
        y[rows] = torch.nn.functional.linear(activated.to(weight.dtype), weight, bias)
    return y.view(len(index), *block, len(weight))


def _activate(
    raw: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, slope: float, geometry: BlockGeometry, backend: str
) -> Tensor:
    tables = (mean, scale, shift)
    return call(backend, _problem(raw, geometry), Backend.norm_apply, raw, *tables, None, slope, geometry)


@masked_head.register_fake
def _(x, norm_weight, norm_bias, weight, bias, mean, rstd, index, sample_offsets, block, slope, backend):
    return weight.new_empty(index.shape[0], *block, weight.shape[0])


@custom_operator("s3d_kernels::masked_head_grad")
def masked_head_grad(
    grad: Tensor,  # [V, bd, bh, bw, O]
    x: Tensor,  # [N, D, H, W, C]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    weight: Tensor,  # [O, C]
    mean: Tensor,  # [N, C]
    rstd: Tensor,  # [N, C]
    index: Tensor,
    sample_offsets: Tensor,
    block: list[int],
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [N, D, H, W, C], norm_weight [C], norm_bias [C], weight [O, C] and bias [O]."""
    x = x.contiguous()
    wanted = _wanted(index, sample_offsets, block, x)
    scale, shift = affine_tables(norm_weight, norm_bias, rstd)
    depth, height, width = wanted.shape
    _, bh, bw = wanted.block
    grad = grad.reshape(len(wanted.index), bh * bw, len(weight))
    # At first of the features after norm and affine, zero where nothing is wanted.
    grad_x = torch.zeros_like(x)
    places = grad_x.view(len(x), depth, height // bh, bh, width // bw, bw, x.shape[-1]).transpose(3, 4)
    of_grad, of_product = torch.zeros_like(mean), torch.zeros_like(mean)
    grad_weight = mean.new_zeros(weight.shape)
    for rows, piece in _pieces(wanted, x):
        raw = _gather(x, piece, backend)
        activated = _activate(raw, mean, scale, shift, slope, piece, backend)
        grad_y = grad[rows].flatten(0, 1)
        grad_weight += grad_y.T @ activated.view(-1, x.shape[-1]).to(weight.dtype)
        grad_activated = (grad_y @ weight).to(x.dtype).view_as(raw)
        del activated
        tables = (mean, rstd, scale, shift)
        given = (grad_activated, raw, None, *tables, slope, piece)
        before, sums, products = call(backend, _problem(x, piece), Backend.norm_grad_activation, *given)
        of_grad += sums
        of_product += products
        places[piece.index.long().unbind(1)] = before[:, 0]
    # The statistics are functions of all voxels, so their gradient reaches unwanted voxels too.
    per_value = (rstd / (depth * height * width)) * norm_weight
    offset_and_tilt = ((of_grad * per_value).to(mean.dtype), (of_product * per_value).to(mean.dtype))
    lines, grad_lines = (t.view(-1, 1, 1, *x.shape[3:]) for t in (x, grad_x))
    for rows, piece in _pieces(_everything(x), x):
        line = (grad_lines[rows], lines[rows], mean, rstd, scale, *offset_and_tilt, piece)
        grad_lines[rows] = call(backend, _problem(x, piece), Backend.norm_grad_input, *line)
    grad_bias = grad.sum((0, 1), dtype=mean.dtype).to(grad.dtype)
    vectors = (of_product.sum(0).to(norm_weight.dtype), of_grad.sum(0).to(norm_bias.dtype))
    return grad_x, *vectors, grad_weight.to(weight.dtype), grad_bias


@masked_head_grad.register_fake
def _(grad, x, norm_weight, norm_bias, weight, mean, rstd, index, sample_offsets, block, slope, backend):
    like = (x.contiguous(), norm_weight, norm_bias, weight)
    return *(torch.empty_like(t) for t in like), weight.new_empty(weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, norm_weight, norm_bias, weight, _, mean, rstd, index, sample_offsets, *rest = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, mean, rstd, index, sample_offsets)
    ctx.rest = rest


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *masked_head_grad(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 7


masked_head.register_autograd(_backward, setup_context=_setup)
