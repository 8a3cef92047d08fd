"""Backend "torch": gather blocks with their halo, then one batched library convolution (oneDNN, cuDNN).

Needs no build and runs wherever torch runs. A convolution copies each visible block and the shell of voxels that its
windows reach into a buffer [V, C, bd + halo, bh + halo, bw + halo] in channels-last memory; the blocks are the batch
of an ordinary convolution without padding. At a mask ratio of 75 % the copy costs 2-20 % of the convolution for
blocks of side 8 and more; for blocks of side 1 and 2 it is im2col. Nothing dense is ever stored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import stacked_phases
from .interface import BlockGeometry, PoolKind, Problem, Triple, WindowGeometry


class TorchGatherBackend:
    """Visible blocks as the batch of torch's own dense operators."""

    name = "torch"

    def why_not(self, problem: Problem) -> str | None:
        return None

    # ---- convolution

    def conv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: WindowGeometry, groups: int) -> Tensor:
        if len(geometry.target_index) == 0:
            return x.new_zeros(0, *geometry.target_block, len(weight))
        windows = _gather_windows(x, geometry)
        y = F.conv3d(windows.permute(0, 4, 1, 2, 3), weight, bias, geometry.stride, 0, 1, groups)
        return _zero_masked(_channels_last(y), geometry.target_voxels)

    def conv3d_grad_input(self, grad: Tensor, weight: Tensor, geometry: WindowGeometry, groups: int) -> Tensor:
        in_channels = weight.shape[1] * groups
        if len(geometry.source_index) == 0 or len(geometry.target_index) == 0:
            return grad.new_zeros(len(geometry.source_index), *geometry.source_block, in_channels)
        # Input voxel i is read by outputs ceil((i + p - k + 1) / s) ... floor((i + p) / s): a window of outputs around
        # each input block, convolved with the transposed weight.
        sizes = list(
            zip(
                geometry.source_block,
                geometry.target_block,
                geometry.kernel_size,
                geometry.stride,
                geometry.padding,
                strict=True,
            )
        )
        low = [(k - 1 - p) // s for _, _, k, s, p in sizes]
        high = [(b_in - 1 + p) // s - (b_out - 1) for b_in, b_out, _, s, p in sizes]
        windows = _gather_halo(
            _zero_masked(grad, geometry.target_voxels),
            geometry.reverse_table(),
            geometry.radius,
            low,
            high,
            in_place=geometry.same_rows,
        )
        # The transposed convolution gives voxels from low * s + p before the block on; crop what it can, then the rest.
        before = [lo * s + p for lo, (_, _, _, s, p) in zip(low, sizes, strict=True)]
        whole = [(n - 1) * s + k for n, (_, _, k, s, _) in zip(windows.shape[1:4], sizes, strict=True)]
        after = [n - skip - size[0] for n, skip, size in zip(whole, before, sizes, strict=True)]
        crop = [max(0, min(b, a)) for b, a in zip(before, after, strict=True)]
        extend = [max(0, -a) for a in after]
        y = F.conv_transpose3d(windows.permute(0, 4, 1, 2, 3), weight, None, geometry.stride, crop, extend, groups)
        for axis in range(3):
            y = y.narrow(axis + 2, before[axis] - crop[axis], sizes[axis][0])
        return _zero_masked(_channels_last(y), geometry.source_voxels)

    def conv3d_grad_weight(
        self, grad: Tensor, x: Tensor, geometry: WindowGeometry, groups: int
    ) -> tuple[Tensor, Tensor]:
        weight = x.new_empty(grad.shape[-1], x.shape[-1] // groups, *geometry.kernel_size)
        if len(geometry.target_index) == 0:
            return torch.zeros_like(weight), x.new_zeros(len(weight))
        grad = _zero_masked(grad, geometry.target_voxels)
        windows = _gather_windows(x, geometry)
        if windows.shape[1:4] == geometry.source_block:
            # Without a halo no window crosses a block, so the blocks can be stacked to one volume: the sum over them is
            # then one inner sum of the library and not a sum over the batch, which some add up in half precision.
            grad, windows = (t.view(1, -1, *t.shape[2:]) for t in (grad, windows))
        _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad.permute(0, 4, 1, 2, 3),
            windows.permute(0, 4, 1, 2, 3),
            weight,
            [len(weight)],
            geometry.stride,
            [0] * 3,
            [1] * 3,
            False,
            [0] * 3,
            groups,
            [False, True, True],
        )
        return grad_weight.contiguous(), grad_bias

    # ---- up-convolution

    def upconv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return stacked_phases.upconv3d(self, x, weight, bias)

    def upconv3d_grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        return stacked_phases.upconv3d_grad_input(self, grad, weight)

    def upconv3d_grad_weight(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return stacked_phases.upconv3d_grad_weight(self, grad, x)

    # ---- pooling

    def pool3d(self, x: Tensor, geometry: WindowGeometry, kind: PoolKind, divisor: int) -> Tensor:
        if len(geometry.target_index) == 0:
            return x.new_zeros(0, *geometry.target_block, x.shape[-1])
        size, stride = geometry.kernel_size, geometry.stride
        windows = _poolable(_gather_windows(x, geometry)).permute(0, 4, 1, 2, 3)
        if kind == "max":
            y = F.max_pool3d(_without_outside(windows, geometry), size, stride)
        elif divisor > 0:
            y = F.avg_pool3d(windows, size, stride, divisor_override=divisor)
        else:
            y = F.avg_pool3d(windows, size, stride, divisor_override=1) / _voxels_inside(geometry, windows)
        return _zero_masked(_channels_last(y).to(x.dtype), geometry.target_voxels)

    def pool3d_grad(
        self, grad: Tensor, x: Tensor | None, geometry: WindowGeometry, kind: PoolKind, divisor: int
    ) -> Tensor:
        rows = len(geometry.source_index)
        if len(geometry.target_index) == 0 or rows == 0:
            return grad.new_zeros(rows, *geometry.source_block, grad.shape[-1])
        size, stride, no_padding = geometry.kernel_size, geometry.stride, [0] * 3
        dtype = grad.dtype
        grad = _poolable(_zero_masked(grad, geometry.target_voxels)).permute(0, 4, 1, 2, 3)
        if x is not None and kind == "max":
            windows = _poolable(_gather_windows(x, geometry)).permute(0, 4, 1, 2, 3)
            windows = _without_outside(windows, geometry)
            _, winners = torch.ops.aten.max_pool3d_with_indices(windows, size, stride)
            grad_windows = torch.ops.aten.max_pool3d_with_indices_backward(
                grad, windows, size, stride, no_padding, [1] * 3, False, winners
            )
        else:
            extent = [(b - 1) * s + k for b, s, k in zip(grad.shape[2:], stride, size, strict=True)]
            like = grad.new_empty(1).expand(len(grad), grad.shape[1], *extent)  # only its shape is read
            if divisor == 0:
                grad = grad / _voxels_inside(geometry, like)
            grad_windows = torch.ops.aten.avg_pool3d_backward(
                grad, like, size, stride, no_padding, False, True, divisor or 1
            )
        grad_input = _scatter_windows(_channels_last(grad_windows), geometry).to(dtype)
        return _zero_masked(grad_input, geometry.source_voxels)

    # ---- normalisation

    def norm_statistics(self, x: Tensor, geometry: BlockGeometry) -> tuple[Tensor, Tensor]:
        # Mean and squared deviations per block, then merged per sample (Chan et al. 1979): no E[x^2] - E[x]^2.
        count, mean, squares = _block_moments(x, geometry)
        total = _sum_samples(count, geometry).clamp(min=1)  # [N, 1]
        sample = geometry.index[:, 0].long()
        sample_mean = _sum_samples(mean * (count / total[sample]), geometry)
        deviation = mean - sample_mean[sample]
        return sample_mean, _sum_samples(squares + count * deviation.square(), geometry)

    def norm_apply(
        self,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        slope: float,
        geometry: BlockGeometry,
    ) -> Tensor:
        y = _affine(x, mean, scale, shift, geometry)
        if residual is not None:
            y += residual
        if slope == 0.0:
            y.relu_()
        elif slope != 1.0:
            F.leaky_relu_(y, slope)
        return _zero_masked(y.to(x.dtype), geometry.voxels)

    def norm_grad_sums(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, geometry: BlockGeometry
    ) -> tuple[Tensor, Tensor]:
        grad = _zero_masked(grad, geometry.voxels).to(mean.dtype)
        normalised = _normalise(x, mean, rstd, geometry)
        of_grad = _sum_samples(grad.sum((1, 2, 3)), geometry)
        return of_grad, _sum_samples(normalised.mul_(grad).sum((1, 2, 3)), geometry)

    def norm_grad_activation(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        shift: Tensor,
        slope: float,
        geometry: BlockGeometry,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if y is None:
            y = _affine(x, mean, scale, shift, geometry)
        if slope == 0.0:
            before = torch.ops.aten.threshold_backward(grad, y.to(grad.dtype), 0)
        else:
            before = torch.ops.aten.leaky_relu_backward(grad, y.to(grad.dtype), slope, False)
        before = _zero_masked(before, geometry.voxels)
        return before, *self.norm_grad_sums(before, x, mean, rstd, geometry)

    def norm_grad_input(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        offset: Tensor,
        slope: Tensor,
        geometry: BlockGeometry,
    ) -> Tensor:
        # scale * grad - offset - slope * (x - mean) * rstd = scale * grad + x * a + b with tables a, b would lose
        # the digits of a large mean, so x is centred first.
        scale_row, offset_row = _per_row(scale, geometry), _per_row(offset, geometry)
        y = x.to(mean.dtype) - _per_row(mean, geometry)
        y.mul_(_per_row(-slope * rstd, geometry)).sub_(offset_row).addcmul_(grad.to(mean.dtype), scale_row)
        return _zero_masked(y, geometry.voxels).to(x.dtype)

    # ---- dense <-> blocks

    def gather_blocks(self, dense: Tensor, geometry: BlockGeometry) -> Tensor:
        (bd, bh, bw), (gd, gh, gw) = geometry.block, _grid(geometry)
        padding = [g * b - size for g, b, size in zip((gd, gh, gw), geometry.block, dense.shape[2:], strict=True)]
        if any(padding):
            dense = F.pad(dense, (0, padding[2], 0, padding[1], 0, padding[0]))
        bricks = dense.view(*dense.shape[:2], gd, bd, gh, bh, gw, bw).permute(0, 2, 4, 6, 3, 5, 7, 1)
        n, d, h, w = geometry.index.long().unbind(1)
        return _zero_masked(bricks[n, d, h, w].contiguous(), geometry.voxels)

    def scatter_blocks(self, blocks: Tensor, fill: Tensor, geometry: BlockGeometry) -> Tensor:
        channels = blocks.shape[-1]
        (bd, bh, bw), (gd, gh, gw), (d, h, w) = geometry.block, _grid(geometry), geometry.shape
        if geometry.voxels is not None:
            blocks = torch.where(geometry.voxels[..., None], blocks, fill)
        dense = blocks.new_empty(geometry.batch, gd * bd, gh * bh, gw * bw, channels)
        dense.copy_(fill.expand_as(dense))
        bricks = dense.view(geometry.batch, gd, bd, gh, bh, gw, bw, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
        sample, z, y, x = geometry.index.long().unbind(1)
        bricks[sample, z, y, x] = blocks
        return dense[:, :d, :h, :w].contiguous().permute(0, 4, 1, 2, 3)


def _grid(geometry: BlockGeometry) -> list[int]:
    return [-(-size // block) for size, block in zip(geometry.shape, geometry.block, strict=True)]


def _channels_last(y: Tensor) -> Tensor:
    """[V, C, D, H, W] -> contiguous [V, D, H, W, C]; no copy if y lies in channels-last memory."""
    return y.permute(0, 2, 3, 4, 1).contiguous()


def _zero_masked(x: Tensor, voxels: Tensor | None) -> Tensor:
    return x if voxels is None else torch.where(voxels[..., None], x, 0)


# ---- halo


class _Piece(NamedTuple):
    """The part of every window that lies in one neighbouring block."""

    column: int  # of the neighbour table
    window: tuple[slice, ...]  # its place in the windows [V, D, H, W]
    block: tuple[slice, ...]  # its place in the neighbouring blocks [V, D, H, W]


def _pieces(block: Sequence[int], radius: Triple, low: Sequence[int], high: Sequence[int]) -> list[_Piece]:
    per_axis: list[list[tuple[int, slice, slice]]] = []
    for side, reach, before, after in zip(block, radius, low, high, strict=True):
        parts = []
        for offset in range(-reach, reach + 1):
            # The window covers [-before, side + after) in coordinates of the central block.
            start, stop = max(-before, offset * side), min(side + after, (offset + 1) * side)
            if start < stop:
                window = slice(start + before, stop + before)
                parts.append((offset + reach, window, slice(start - offset * side, stop - offset * side)))
        per_axis.append(parts)
    width = [2 * r + 1 for r in radius]
    every = slice(None)
    return [
        _Piece((z[0] * width[1] + y[0]) * width[2] + x[0], (every, z[1], y[1], x[1]), (every, z[2], y[2], x[2]))
        for z, y, x in itertools.product(*per_axis)
    ]


def _gather_halo(
    x: Tensor,  # [Vi, bd, bh, bw, C]
    table: Tensor,  # [Vo, T] rows of x, -1 where there is none
    radius: Triple,
    low: Sequence[int],  # voxels before the block, per axis
    high: Sequence[int],  # voxels after it
    in_place: bool,  # whether central rows are x itself
) -> Tensor:
    """Blocks with the voxels around them, zeros where there is no neighbour: [Vo, bd + low + high, ..., C]."""
    block = x.shape[1:4]
    if in_place and not any(low) and not any(high):
        return x
    size = [b + lo + hi for b, lo, hi in zip(block, low, high, strict=True)]
    windows = x.new_empty(len(table), *size, x.shape[-1])
    if len(x) == 0:
        return windows.zero_()
    for piece in _pieces(block, radius, low, high):
        place = windows[piece.window]
        part = x[piece.block]
        if in_place and piece.column == table.shape[1] // 2:
            place.copy_(part)
            continue
        rows = table[:, piece.column].long()
        place.copy_(part.index_select(0, rows.clamp(min=0)))
        place.masked_fill_((rows < 0)[:, None, None, None, None], 0)
    return windows


def _halo(geometry: WindowGeometry) -> tuple[list[int], list[int]]:
    """Voxels before and after an input block that the windows of its outputs reach; negative: they stop short."""
    sizes = zip(geometry.kernel_size, geometry.stride, geometry.padding, strict=True)
    return list(geometry.padding), [k - s - p for k, s, p in sizes]


def _gather_windows(x: Tensor, geometry: WindowGeometry) -> Tensor:
    """The input that the windows of each output block read: [Vo, (b_out - 1) * stride + kernel, ..., C_in]."""
    low, high = _halo(geometry)
    x = _zero_masked(x, geometry.source_voxels)
    return _gather_halo(x, geometry.table, geometry.radius, low, high, in_place=geometry.same_rows)


def _scatter_windows(windows: Tensor, geometry: WindowGeometry) -> Tensor:
    """The transpose of :func:`_gather_windows`: every input voxel gets the sum of its copies in the windows."""
    low, high = _halo(geometry)
    if geometry.same_rows and not any(low) and not any(high):
        return windows
    x = windows.new_zeros(len(geometry.source_index), *geometry.source_block, windows.shape[-1])
    for piece in _pieces(geometry.source_block, geometry.radius, low, high):
        rows = geometry.table[:, piece.column].long()
        values = torch.where((rows >= 0)[:, None, None, None, None], windows[piece.window], 0)
        # In one column a row occurs at most once (but for zeros), so the order of additions cannot matter.
        x[piece.block].index_add_(0, rows.clamp(min=0), values)
    return x


def _poolable(x: Tensor) -> Tensor:
    """float32 for half precision on the CPU, where torch has no average pooling for it."""
    return x.float() if x.device.type == "cpu" and x.dtype.itemsize < 4 else x


def _outside(
    windows: Tensor,  # [Vo, C, *window]
    geometry: WindowGeometry,
) -> Tensor:
    """[Vo, 1, *window] bool: which voxels of the windows lie outside the volume."""
    outside = torch.zeros(1, dtype=torch.bool, device=windows.device)
    for axis in range(3):
        position = torch.arange(windows.shape[axis + 2], device=windows.device) - geometry.padding[axis]
        first = geometry.target_index[:, axis + 1].long() * geometry.source_block[axis]
        coordinate = first[:, None] + position  # [Vo, window]
        beyond = (coordinate < 0) | (coordinate >= geometry.shape[axis])
        outside = outside | beyond.view(len(first), *[-1 if a == axis else 1 for a in range(-1, 3)])
    return outside


def _without_outside(windows: Tensor, geometry: WindowGeometry) -> Tensor:
    """The windows [Vo, C, *window] with -inf outside the volume, where a maximum must not look."""
    return windows.masked_fill(_outside(windows, geometry), -math.inf) if any(geometry.padding) else windows


def _voxels_inside(geometry: WindowGeometry, windows: Tensor) -> Tensor:
    """[Vo, 1, *target_block]: voxels of each window that lie in the volume."""
    inside = (~_outside(windows, geometry)).to(windows.dtype)
    return F.avg_pool3d(inside, geometry.kernel_size, geometry.stride, divisor_override=1).clamp(min=1)


# ---- sums over samples


def _per_row(table: Tensor, geometry: BlockGeometry) -> Tensor:
    """[N, C] -> [V, 1, 1, 1, C]."""
    return table[geometry.index[:, 0].long()][:, None, None, None]


def _normalise(x: Tensor, mean: Tensor, rstd: Tensor, geometry: BlockGeometry) -> Tensor:
    """(x - mean) * rstd in the dtype of mean; zero at masked voxels."""
    centred = _zero_masked(x.to(mean.dtype) - _per_row(mean, geometry), geometry.voxels)
    return centred * _per_row(rstd, geometry)


def _affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, geometry: BlockGeometry) -> Tensor:
    """(x - mean) * scale + shift in the dtype of mean; anything at masked voxels."""
    mean, scale, shift = (_per_row(table, geometry) for table in (mean, scale, shift))
    y = x.to(mean.dtype) - mean  # first, which keeps the digits of a large mean
    return y.mul_(scale).add_(shift)


def _sum_samples(values: Tensor, geometry: BlockGeometry) -> Tensor:
    """[V, C] -> [N, C]: sums over the rows of each sample, in a fixed order."""
    if len(values) == 0:
        return values.new_zeros(geometry.batch, values.shape[1])
    return torch.segment_reduce(values, "sum", offsets=geometry.sample_offsets.long(), axis=0, initial=0)


def _block_moments(x: Tensor, geometry: BlockGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """Visible voxels [V, 1], their mean [V, C] and their squared deviations from it [V, C], per block."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = x.to(dtype)
    if len(x) == 0:
        return values.new_zeros(0, 1), values.new_zeros(0, x.shape[-1]), values.new_zeros(0, x.shape[-1])
    if geometry.voxels is None:
        voxels = math.prod(geometry.block)
        variance, mean = torch.var_mean(values, (1, 2, 3), correction=0)
        return mean.new_full((len(mean), 1), voxels), mean, variance * voxels
    count = geometry.voxels.flatten(1).sum(1)[:, None].to(dtype)
    mean = _zero_masked(values, geometry.voxels).sum((1, 2, 3)) / count.clamp(min=1)
    deviation = _zero_masked(values - mean[:, None, None, None], geometry.voxels)
    return count, mean, deviation.square().sum((1, 2, 3))
