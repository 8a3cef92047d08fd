"""Backend "reference": every operator by its meaning, a dense computation with the mask applied.

Blocks are scattered to a dense volume of zeros, torch computes densely, and the visible voxels are selected from the
result. It is the oracle for all other backends and the baseline that sparse ones are measured against. Masking is
selection, not multiplication, so NaN at a masked voxel stays there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv3d_weight

from .interface import BlockGeometry, PoolKind, Problem, Triple, WindowGeometry
from .stacked_phases import PHASES, interleaved


class ReferenceBackend:
    """Dense computation times mask, in plain torch, on any device."""

    name = "reference"

    def why_not(self, problem: Problem) -> str | None:
        return None

    def conv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: WindowGeometry, groups: int) -> Tensor:
        dense = F.pad(_source_volume(x, geometry), _far_padding(geometry))
        y = F.conv3d(dense, weight, bias, geometry.stride, geometry.padding, 1, groups)
        return _select_target(y, geometry)

    def conv3d_grad_input(self, grad: Tensor, weight: Tensor, geometry: WindowGeometry, groups: int) -> Tensor:
        in_channels = weight.shape[1] * groups
        dense = F.pad(grad.new_zeros(geometry.batch, in_channels, *geometry.shape), _far_padding(geometry))
        grad_input, _, _ = _convolution_backward(
            _target_volume(grad, geometry), dense, weight, geometry, groups, [True, False, False]
        )
        d, h, w = geometry.shape
        grad_input = grad_input[:, :, :d, :h, :w]
        return _select(grad_input, geometry.source_index, geometry.source_voxels, geometry.source_block)

    def conv3d_grad_weight(
        self, grad: Tensor, x: Tensor, geometry: WindowGeometry, groups: int
    ) -> tuple[Tensor, Tensor]:
        weight = x.new_empty(grad.shape[-1], x.shape[-1] // groups, *geometry.kernel_size)
        dense_grad = _target_volume(grad, geometry)
        dense = F.pad(_source_volume(x, geometry), _far_padding(geometry))
        _, grad_weight, grad_bias = _convolution_backward(
            dense_grad, dense, weight, geometry, groups, [False, True, True]
        )
        return grad_weight.contiguous(), grad_bias

    def upconv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, *sizes, _ = x.shape
        y = x.new_empty(batch, *(2 * size for size in sizes), weight.shape[3])
        for p, of_phase in zip(PHASES, interleaved(y), strict=True):
            windows = F.pad(x.permute(0, 4, 1, 2, 3), _around(p))
            of_phase.copy_(F.conv3d(windows, weight[p], bias).permute(0, 2, 3, 4, 1))
        return y

    def upconv3d_grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        batch, *sizes, _ = grad.shape
        d, h, w = (size // 2 for size in sizes)
        grad_x = grad.new_zeros(batch, d, h, w, weight.shape[4], dtype=accumulation_dtype(grad))
        for p, of_phase in zip(PHASES, interleaved(grad), strict=True):
            of_windows = F.conv_transpose3d(of_phase.permute(0, 4, 1, 2, 3), weight[p]).permute(0, 2, 3, 4, 1)
            near = [1 - offset for offset in p]
            grad_x += of_windows[:, near[0] : near[0] + d, near[1] : near[1] + h, near[2] : near[2] + w]
        return grad_x.to(grad.dtype)

    def upconv3d_grad_weight(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        channels, channels_low = grad.shape[-1], x.shape[-1]
        grad_weight = x.new_empty(2, 2, 2, channels, channels_low, 2, 2, 2)
        for p, of_phase in zip(PHASES, interleaved(grad), strict=True):
            windows = F.pad(x.permute(0, 4, 1, 2, 3), _around(p))
            size = (channels, channels_low, 2, 2, 2)
            grad_weight[p] = conv3d_weight(windows, size, of_phase.permute(0, 4, 1, 2, 3))
        return grad_weight, grad.sum((0, 1, 2, 3))

    def pool3d(self, x: Tensor, geometry: WindowGeometry, kind: PoolKind, divisor: int) -> Tensor:
        dense = _poolable(_source_volume(x, geometry))
        window = geometry.kernel_size, geometry.stride, geometry.padding
        if kind == "max":
            return _select_target(F.max_pool3d(dense, *window).to(x.dtype), geometry)
        y = F.avg_pool3d(dense, *window, count_include_pad=divisor != 0, divisor_override=divisor or None)
        return _select_target(y.to(x.dtype), geometry)

    def pool3d_grad(
        self, grad: Tensor, x: Tensor | None, geometry: WindowGeometry, kind: PoolKind, divisor: int
    ) -> Tensor:
        if x is None:  # the gradient of an average does not depend on it
            x = grad.new_zeros(len(geometry.source_index), *geometry.source_block, grad.shape[-1])
        dense, dense_grad = _poolable(_source_volume(x, geometry)), _poolable(_target_volume(grad, geometry))
        window = geometry.kernel_size, geometry.stride, geometry.padding
        if kind == "max":
            _, winners = torch.ops.aten.max_pool3d_with_indices(dense, *window)
            grad_input = torch.ops.aten.max_pool3d_with_indices_backward(
                dense_grad, dense, *window, [1] * 3, False, winners
            )
        else:
            grad_input = torch.ops.aten.avg_pool3d_backward(
                dense_grad, dense, *window, False, divisor != 0, divisor or None
            )
        grad_input = grad_input.to(grad.dtype)
        return _select(grad_input, geometry.source_index, geometry.source_voxels, geometry.source_block)

    def norm_statistics(self, x: Tensor, geometry: BlockGeometry) -> tuple[Tensor, Tensor]:
        mean = x.new_zeros(geometry.batch, x.shape[-1], dtype=accumulation_dtype(x))
        squares = torch.zeros_like(mean)
        for sample in range(geometry.batch):
            values = _sample_values(x, geometry, sample)  # [voxels, C]
            if len(values):
                mean[sample] = values.mean(0)
                squares[sample] = (values - mean[sample]).square().sum(0)
        return mean, squares

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
        per_row = [_per_row(table, geometry) for table in (mean, scale, shift)]
        y = (x.to(mean.dtype) - per_row[0]) * per_row[1] + per_row[2]
        if residual is not None:
            y = y + residual.to(mean.dtype)
        y = F.relu(y) if slope == 0 else F.leaky_relu(y, slope)
        return _zero_masked(y, geometry.voxels).to(x.dtype)

    def norm_grad_sums(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, geometry: BlockGeometry
    ) -> tuple[Tensor, Tensor]:
        of_grad, of_product = torch.zeros_like(mean), torch.zeros_like(mean)
        for sample in range(geometry.batch):
            values = _sample_values(grad, geometry, sample)
            normalised = (_sample_values(x, geometry, sample) - mean[sample]) * rstd[sample]
            of_grad[sample] = values.sum(0)
            of_product[sample] = (values * normalised).sum(0)
        return of_grad, of_product

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
            per_row = [_per_row(table, geometry) for table in (mean, scale, shift)]
            y = (x.to(mean.dtype) - per_row[0]) * per_row[1] + per_row[2]
        below = torch.zeros_like(grad) if slope == 0 else slope * grad
        before = _zero_masked(torch.where(y > 0, grad, below), geometry.voxels)
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
        mean, rstd, scale, offset, slope = (_per_row(t, geometry) for t in (mean, rstd, scale, offset, slope))
        normalised = (x.to(mean.dtype) - mean) * rstd
        grad_input = scale * grad.to(mean.dtype) - offset - slope * normalised
        return _zero_masked(grad_input, geometry.voxels).to(x.dtype)

    def gather_blocks(self, dense: Tensor, geometry: BlockGeometry) -> Tensor:
        return _select(dense, geometry.index, geometry.voxels, geometry.block)

    def scatter_blocks(self, blocks: Tensor, fill: Tensor, geometry: BlockGeometry) -> Tensor:
        dense = _volume(blocks, geometry.index, geometry.voxels, geometry.batch, geometry.shape, fill)
        return dense.contiguous(memory_format=torch.channels_last_3d)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which statistics of x are computed: float64 for float64, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _linear_index(
    index: Tensor,  # [V, 4] int32
    voxels: Tensor | None,  # [V, *block] bool
    block: Triple,
    shape: Triple,
) -> tuple[Tensor, Tensor]:
    """Position n * D * H * W + d * H * W + h * W + w of every voxel, and which voxels are visible.

    Returns: [V, bd, bh, bw] int64 and bool. Voxels outside the volume have a meaningless position and are not visible.
    """
    position = index[:, 0].long().view(-1, 1, 1, 1).expand(-1, *block)
    visible = torch.ones_like(position, dtype=torch.bool) if voxels is None else voxels
    for axis in range(3):
        local = torch.arange(block[axis], device=index.device).view([-1 if a == axis else 1 for a in range(3)])
        coordinate = index[:, axis + 1].long().view(-1, 1, 1, 1) * block[axis] + local
        position = position * shape[axis] + coordinate
        visible = visible & (coordinate < shape[axis])
    return position, visible


def _volume(
    blocks: Tensor,  # [V, bd, bh, bw, C]
    index: Tensor,
    voxels: Tensor | None,
    batch: int,
    shape: Triple,
    fill: Tensor | None = None,  # [C]
) -> Tensor:
    """Dense [N, C, D, H, W] with `fill` (or zeros) at masked voxels."""
    channels = blocks.shape[-1]
    flat = blocks.new_zeros(batch * math.prod(shape), channels)
    if fill is not None:
        flat += fill
    position, visible = _linear_index(index, voxels, tuple(blocks.shape[1:4]), shape)  # type: ignore[arg-type]
    flat[position[visible]] = blocks[visible]
    return flat.view(batch, *shape, channels).permute(0, 4, 1, 2, 3).contiguous()


def _select(dense: Tensor, index: Tensor, voxels: Tensor | None, block: Triple) -> Tensor:
    """[N, C, D, H, W] -> [V, bd, bh, bw, C], zeros at masked voxels."""
    shape: Triple = tuple(dense.shape[2:])  # type: ignore[assignment]
    flat = dense.permute(0, 2, 3, 4, 1).reshape(-1, dense.shape[1])
    position, visible = _linear_index(index, voxels, block, shape)
    blocks = flat.new_zeros(*position.shape, dense.shape[1])
    blocks[visible] = flat[position[visible]]
    return blocks


def _source_volume(x: Tensor, geometry: WindowGeometry) -> Tensor:
    return _volume(x, geometry.source_index, geometry.source_voxels, geometry.batch, geometry.shape)


def _target_volume(y: Tensor, geometry: WindowGeometry) -> Tensor:
    return _volume(y, geometry.target_index, geometry.target_voxels, geometry.batch, geometry.target_shape)


def _select_target(dense: Tensor, geometry: WindowGeometry) -> Tensor:
    return _select(dense, geometry.target_index, geometry.target_voxels, geometry.target_block)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: WindowGeometry, groups: int, which: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, x, weight, [grad.shape[1]], geometry.stride, geometry.padding, [1] * 3, False, [0] * 3, groups, which
    )
    return gradients


def _far_padding(geometry: WindowGeometry) -> list[int]:
    """Zeros to add beyond the far faces (for F.pad) where windows reach further there than the near padding.

    Only even kernels with padding "same" need it: torch pads them by k / 2 - 1 before and k / 2 after.
    """
    sizes = zip(
        geometry.shape, geometry.target_shape, geometry.kernel_size, geometry.stride, geometry.padding, strict=True
    )
    extra = [max(0, (out - 1) * s + k - p - size - p) for size, out, k, s, p in sizes]
    return [0, extra[2], 0, extra[1], 0, extra[0]]


def _around(phase: Triple) -> list[int]:
    """Zeros to add before and after a volume (for F.pad), so that the windows of a phase of an up-convolution fit."""
    return [side for p in reversed(phase) for side in (1 - p, p)]


def _poolable(dense: Tensor) -> Tensor:
    """float32 for half precision on the CPU, where torch has no average pooling for it."""
    return dense.float() if dense.device.type == "cpu" and dense.dtype.itemsize < 4 else dense


def _sample_values(x: Tensor, geometry: BlockGeometry, sample: int) -> Tensor:
    """[voxels, C]: the visible voxels of one sample, in the dtype of statistics."""
    rows = slice(int(geometry.sample_offsets[sample]), int(geometry.sample_offsets[sample + 1]))
    values = x[rows] if geometry.voxels is None else x[rows][geometry.voxels[rows]]
    return values.reshape(-1, x.shape[-1]).to(accumulation_dtype(x))


def _per_row(table: Tensor, geometry: BlockGeometry) -> Tensor:
    """[N, C] -> [V, 1, 1, 1, C]."""
    return table[geometry.index[:, 0].long()][:, None, None, None]


def _zero_masked(x: Tensor, voxels: Tensor | None) -> Tensor:
    return x if voxels is None else torch.where(voxels[..., None], x, 0)
