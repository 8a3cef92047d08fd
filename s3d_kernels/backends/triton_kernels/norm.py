"""Normalisation over the visible voxels of each sample: statistics, the elementwise pass, and their backward.

    statistics       mean[n, c], squares[n, c] = sum of (x - mean)^2
    apply            y = leaky((x - mean) * scale + shift + residual),   leaky(v) = v or, below 0, slope * v
    grad_sums        of_grad = sum of grad, of_product = sum of grad * (x - mean) * rstd
    grad_activation  before = grad where y > 0, slope * grad elsewhere; grad_sums of it
    grad_input       grad_x = scale * grad - offset - slope * (x - mean) * rstd

Layouts   x, y, residual, grad, before [voxels, C], channels last; tables [samples, C] in float32.
Work      Each sample is cut into splits, a number that the shapes fix. A program makes one tile of channels of one
          split: it reads its line of each table once and goes through the voxels ROWS at a time. Programs side by
          side have neighbouring channels. No tile straddles two samples, whatever the side of the blocks.
Sums      Each row of the tile keeps its own, moments by Welford's method; at the end rows are added, then splits by a
          second kernel (moments.py, add_parts_kernel). float32, in a fixed order: always the same bits.
Numbers   Computed in float32, rounded once. Masked voxels are not read. A tile starts at an offset of 64 bits; those
          in it have 32.
Limits    Fewer than 2^31 voxels; fewer than 2^30 numbers in a table.
Expected  Bound by memory: each tensor is read or written once; grad_activation reads two or three and writes one.
          Not measured yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import BlockGeometry
from .moments import merge, merged, merged_rows
from .tiles import WARPS, flags_of, tile_of

STEPS = 8  # tiles that a program goes through, in a sample of average size
MOST_PROGRAMS = 2**20
MOST_SUMMING_PROGRAMS = 2048  # they fill a GPU, and the more there are, the more remains to be added


@dataclass(frozen=True)
class Shares:
    """How the voxels of a geometry are shared out to programs."""

    splits: int  # of each sample
    parts: int  # splits of all samples
    grid: tuple[int]
    arguments: tuple[Tensor | int | None, ...]  # of every kernel: which voxels there are and how they are shared out
    constants: dict[str, int]


@triton.jit
def share_of(sample_offsets, block_voxels, splits, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """What a program makes: number of its split among all samples', sample, voxels first ... last - 1, channels."""
    tiles = tl.cdiv(channels, CHANNELS)
    part = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    sample = part // splits
    # 64 bits, and so is what follows from them: one number for a tile, whose own offsets are small.
    first = tl.load(sample_offsets + sample).to(tl.int64) * block_voxels
    last = tl.load(sample_offsets + sample + 1).to(tl.int64) * block_voxels
    length = tl.cdiv(tl.cdiv(last - first, splits), ROWS) * ROWS
    first += part % splits * length
    return part, sample, first, tl.minimum(first + length, last), channel


@triton.jit
def rows_of(voxels, start, last, ROWS: tl.constexpr):
    """Which voxels of the tile from `start` on there are, and which are visible: [rows, 1] each."""
    row = tl.arange(0, ROWS)
    inside = row < tl.minimum(last - start, ROWS).to(tl.int32)
    visible = inside
    if voxels is not None:
        visible &= tl.load(voxels + start + row, mask=inside, other=0) != 0
    return inside[:, None], visible[:, None]


@triton.jit
def offsets_of(channel, channels, ROWS: tl.constexpr):
    """Offsets [rows, channels] of the numbers of a tile from its first row on."""
    return tl.arange(0, ROWS)[:, None] * channels + channel[None, :]


@triton.jit
def line_of(table, sample, channel, channels):
    """A sample's line of a table, [1, channels of the tile]."""
    return tl.load(table + sample * channels + channel, mask=channel < channels, other=0.0)[None, :]


@triton.jit(do_not_specialize=["splits"])
def statistics_kernel(
    x,
    counts,  # [N, splits]
    means,  # [N, splits, C]
    squares,  # [N, splits, C]
    voxels,
    sample_offsets,
    block_voxels,
    splits,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    part, _, first, last, channel = share_of(sample_offsets, block_voxels, splits, channels, ROWS, CHANNELS)
    exists = channel < channels
    offsets = offsets_of(channel, channels, ROWS)
    count = tl.zeros([ROWS, 1], tl.float32)
    mean = tl.zeros([ROWS, CHANNELS], tl.float32)
    spread = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(first, last, ROWS):
        _inside, visible = rows_of(voxels, start, last, ROWS)
        at = x + start * channels + offsets
        values = tl.load(at, mask=visible & exists[None, :], other=0.0).to(tl.float32)
        count, mean, spread = merged(count, mean, spread, visible.to(tl.float32), values, 0.0)
    total, centre, spread_of_all = merged_rows(count, mean, spread)
    tl.store(counts + part, total, mask=tl.program_id(0) % tl.cdiv(channels, CHANNELS) == 0)
    tl.store(means + part * channels + channel, centre, mask=exists)
    tl.store(squares + part * channels + channel, spread_of_all, mask=exists)


@triton.jit(do_not_specialize=["splits"])
def apply_kernel(
    x,
    residual,  # or None
    y,
    mean,
    scale,
    shift,
    slope,
    voxels,
    sample_offsets,
    block_voxels,
    splits,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    _, sample, first, last, channel = share_of(sample_offsets, block_voxels, splits, channels, ROWS, CHANNELS)
    centre = line_of(mean, sample, channel, channels)
    factor = line_of(scale, sample, channel, channels)
    term = line_of(shift, sample, channel, channels)
    exists = (channel < channels)[None, :]
    offsets = offsets_of(channel, channels, ROWS)
    for start in range(first, last, ROWS):
        inside, visible = rows_of(voxels, start, last, ROWS)
        here = visible & exists
        at = start * channels + offsets
        values = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        values = (values - centre) * factor + term
        if residual is not None:
            values += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
        below = tl.where(slope > 0, values * slope, 0.0)  # for ReLU zero, of minus infinity too
        values = tl.where(here, tl.where(values < 0, below, values), 0.0)
        tl.store(y + at, values, mask=inside & exists)


@triton.jit(do_not_specialize=["splits", "all_parts"])
def grad_sums_kernel(
    grad,
    x,
    y,  # None: the sign is that of the affine of x
    before,  # None: there was no activation
    sums,  # [2, N, splits, C]: of the gradient, of the product
    mean,
    rstd,
    scale,  # read only for the sign, as is shift
    shift,
    slope,
    voxels,
    sample_offsets,
    block_voxels,
    splits,
    channels,
    all_parts,  # N * splits
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    part, sample, first, last, channel = share_of(sample_offsets, block_voxels, splits, channels, ROWS, CHANNELS)
    centre = line_of(mean, sample, channel, channels)
    if before is not None and y is None:
        factor = line_of(scale, sample, channel, channels)
        term = line_of(shift, sample, channel, channels)
    exists = (channel < channels)[None, :]
    offsets = offsets_of(channel, channels, ROWS)
    of_grad = tl.zeros([ROWS, CHANNELS], tl.float32)
    of_product = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(first, last, ROWS):
        inside, visible = rows_of(voxels, start, last, ROWS)
        here = visible & exists
        at = start * channels + offsets
        gradient = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        centred = tl.load(x + at, mask=here, other=0.0).to(tl.float32) - centre
        if before is not None:
            sign = centred * factor + term if y is None else tl.load(y + at, mask=here, other=0.0).to(tl.float32)
            gradient = tl.where(sign > 0, gradient, tl.where(slope > 0, gradient * slope, 0.0))
            tl.store(before + at, gradient, mask=inside & exists)
        of_grad += gradient
        of_product += tl.where(here, gradient * centred, 0.0)
    to = sums + part * channels + channel
    tl.store(to, tl.sum(of_grad, 0), mask=channel < channels)
    # Only here, to save registers. Where nothing was added it may be infinite.
    product = tl.sum(of_product, 0)
    deviation = tl.load(rstd + sample * channels + channel, mask=(channel < channels) & (product != 0), other=0.0)
    tl.store(to + all_parts * channels, product * deviation, mask=channel < channels)


@triton.jit(do_not_specialize=["splits", "all_parts"])
def add_parts_kernel(
    parts,  # [2, N, splits, C]
    of_grad,  # [N, C]
    of_product,  # [N, C]
    splits,
    channels,
    all_parts,  # N * splits
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(channels, CHANNELS)
    sample = tl.program_id(0) // tiles
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    grads = tl.zeros([ROWS, CHANNELS], tl.float32)
    products = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, splits, ROWS):
        split = start + tl.arange(0, ROWS)
        here = (split < splits)[:, None] & exists[None, :]
        at = parts + (sample * splits + split)[:, None] * channels + channel[None, :]
        grads += tl.load(at, mask=here, other=0.0)
        products += tl.load(at + all_parts * channels, mask=here, other=0.0)
    tl.store(of_grad + sample * channels + channel, tl.sum(grads, 0), mask=exists)
    tl.store(of_product + sample * channels + channel, tl.sum(products, 0), mask=exists)


@triton.jit(do_not_specialize=["splits"])
def grad_input_kernel(
    grad,
    x,
    grad_x,
    mean,
    rstd,
    scale,
    offset,
    slope,
    voxels,
    sample_offsets,
    block_voxels,
    splits,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    _, sample, first, last, channel = share_of(sample_offsets, block_voxels, splits, channels, ROWS, CHANNELS)
    centre = line_of(mean, sample, channel, channels)
    deviation = line_of(rstd, sample, channel, channels)
    factor = line_of(scale, sample, channel, channels)
    term = line_of(offset, sample, channel, channels)
    tilt = line_of(slope, sample, channel, channels)
    exists = (channel < channels)[None, :]
    offsets = offsets_of(channel, channels, ROWS)
    for start in range(first, last, ROWS):
        inside, visible = rows_of(voxels, start, last, ROWS)
        here = visible & exists
        at = start * channels + offsets
        gradient = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        values = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        gradient = factor * gradient - term - tilt * ((values - centre) * deviation)
        tl.store(grad_x + at, tl.where(here, gradient, 0.0), mask=inside & exists)


def statistics(x: Tensor, geometry: BlockGeometry) -> tuple[Tensor, Tensor]:
    """Mean over the visible voxels of each sample, and sum of squared deviations from it: [N, C] float32 each."""
    x = x.contiguous()
    shares, channels = _shares(geometry, MOST_SUMMING_PROGRAMS, x), x.shape[-1]
    counts = x.new_empty(shares.parts, dtype=torch.float32)
    means, squares = (x.new_empty(shares.parts, channels, dtype=torch.float32) for _ in range(2))
    if means.numel():
        statistics_kernel[shares.grid](x, counts, means, squares, *shares.arguments, **shares.constants)
    return merge(counts, means, squares, None, shares.splits, geometry.batch)


def apply(
    x: Tensor,  # [V, *block, C]
    mean: Tensor,  # [N, C]
    scale: Tensor,  # [N, C]
    shift: Tensor,  # [N, C]
    residual: Tensor | None,  # [V, *block, C]
    slope: float,
    geometry: BlockGeometry,
) -> Tensor:
    """leaky_relu((x - mean) * scale + shift + residual, slope) with the row's sample: [V, *block, C]."""
    x = x.contiguous()
    residual = None if residual is None else residual.detach().contiguous()
    y = torch.empty_like(x)
    if y.numel():
        shares = _shares(geometry, MOST_PROGRAMS, x)
        tables = _tables(mean, scale, shift)
        apply_kernel[shares.grid](x, residual, y, *tables, slope, *shares.arguments, **shares.constants)
    return y


def grad_sums(
    grad: Tensor,  # [V, *block, C]
    x: Tensor,  # [V, *block, C]
    mean: Tensor,  # [N, C]
    rstd: Tensor,  # [N, C]
    geometry: BlockGeometry,
) -> tuple[Tensor, Tensor]:
    """Sums over the visible voxels of each sample: of grad, and of grad * (x - mean) * rstd; [N, C] float32 each."""
    return _grad_sums(grad.contiguous(), x, None, None, _tables(mean, rstd), (None, None), 1.0, geometry)


def grad_activation(
    grad: Tensor,  # [V, *block, C]
    x: Tensor,  # [V, *block, C]
    y: Tensor | None,  # [V, *block, C]
    mean: Tensor,  # [N, C]
    rstd: Tensor,  # [N, C]
    scale: Tensor,  # [N, C]
    shift: Tensor,  # [N, C]
    slope: float,
    geometry: BlockGeometry,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient before the activation, of the sign of y or of the affine of x, [V, *block, C]; grad_sums of it."""
    grad = grad.contiguous()
    y = None if y is None else y.detach().contiguous()
    before = torch.empty_like(grad)
    affine = _tables(scale, shift)
    return before, *_grad_sums(grad, x, y, before, _tables(mean, rstd), affine, slope, geometry)


def _grad_sums(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    before: Tensor | None,  # what is written; None: there was no activation
    tables: list[Tensor],  # mean, rstd
    affine: Sequence[Tensor | None],  # scale, shift
    slope: float,
    geometry: BlockGeometry,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    shares, channels = _shares(geometry, MOST_SUMMING_PROGRAMS, x), x.shape[-1]
    parts = x.new_empty(2, shares.parts, channels, dtype=torch.float32)
    of_grad, of_product = (x.new_empty(geometry.batch, channels, dtype=torch.float32) for _ in range(2))
    if parts.numel():
        grad_sums_kernel[shares.grid](
            grad, x, y, before, parts, *tables, *affine, slope, *shares.arguments, shares.parts, **shares.constants
        )
        tile = tile_of(channels)
        add_parts_kernel[(geometry.batch * triton.cdiv(channels, tile.CHANNELS),)](
            parts,
            of_grad,
            of_product,
            shares.splits,
            channels,
            shares.parts,
            *tile,
            num_warps=WARPS,
        )
    return of_grad, of_product


def grad_input(
    grad: Tensor,  # [V, *block, C]
    x: Tensor,  # [V, *block, C]
    mean: Tensor,  # [N, C]
    rstd: Tensor,  # [N, C]
    scale: Tensor,  # [N, C]
    offset: Tensor,  # [N, C]
    slope: Tensor,  # [N, C]
    geometry: BlockGeometry,
) -> Tensor:
    """scale * grad - offset - slope * (x - mean) * rstd with the row's sample: [V, *block, C], dtype of x."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    if grad_x.numel():
        shares = _shares(geometry, MOST_PROGRAMS, x)
        tables = _tables(mean, rstd, scale, offset, slope)
        grad_input_kernel[shares.grid](grad, x, grad_x, *tables, *shares.arguments, **shares.constants)
    return grad_x


def _tables(*tables: Tensor) -> list[Tensor]:
    return [table.detach().contiguous() for table in tables]


def _shares(geometry: BlockGeometry, most_programs: int, x: Tensor) -> Shares:
    """Of a kernel for tensors like x: about STEPS tiles a program, but not more programs than `most_programs`."""
    channels, block_voxels = x.shape[-1], math.prod(geometry.block)
    tile = tile_of(channels)
    tiles = triton.cdiv(channels, tile.CHANNELS)
    samples = max(geometry.batch, 1)
    wanted = triton.cdiv(len(x) * block_voxels, samples * tile.ROWS * STEPS)
    splits = max(1, min(wanted, most_programs // max(samples * tiles, 1)))
    parts = geometry.batch * splits
    arguments = (flags_of(geometry.voxels), geometry.sample_offsets, block_voxels, splits, channels)
    constants = {**tile._asdict(), "num_warps": WARPS}
    return Shares(splits, parts, (parts * tiles,), arguments, constants)
