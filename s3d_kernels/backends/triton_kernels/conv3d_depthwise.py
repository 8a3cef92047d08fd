"""Convolution with as many groups as channels: each channel by itself, so there is nothing for a tensor core.

    written[v, c] = bias[c] + sum over taps of gathered[source(v, tap), c] * weight[tap, c]

and the gradient of the weight: grad_weight[tap, c] = sum over v of x[source(v, tap), c] * grad[v, c].

Layouts   channels last; the weight is packed to [taps, C].
Work      A program makes a tile of TILE_M units of one class (window.py) x TILE_C channels under all taps. For the
          gradient of the weight: one tap x TILE_C channels over its part of the units; the parts are added up by
          torch, in a fixed order.
Numbers   Multiplied and added in float32, in a fixed order.
Expected  Every tap reads its rows again, from L1 or L2: bound by their bandwidth. Not measured on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import power_of_two
from .product import multiprocessors, offset_of
from .tiles import is_wide
from .window import Window, class_of, place_of, source_of, tap_along, taps_along, written_voxel

# Numbers of a tile.
_TILE = 4096


def applies(weight: Tensor, groups: int) -> bool:
    """Whether a convolution is depthwise; one channel alone is not."""
    return 1 < groups == len(weight) and weight.shape[1] == 1


@triton.jit(do_not_specialize=["units"])
def conv3d_depthwise_kernel(
    gathered,  # [voxels, channels]
    packed,  # [taps, channels]
    bias,  # [channels]
    written,  # [voxels, channels]
    table,
    gathered_voxels,
    written_voxels,
    units,
    channels,
    SHAPE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles_c = tl.cdiv(channels, TILE_C)
    tiles_of_class = tl.cdiv(units, TILE_M)
    tile_m = tl.program_id(0) // tiles_c
    channel = tl.program_id(0) % tiles_c * TILE_C + tl.arange(0, TILE_C)
    class_z, class_y, class_x = class_of(tile_m // tiles_of_class, SHAPE)
    unit = tile_m % tiles_of_class * TILE_M + tl.arange(0, TILE_M)
    exists = unit < units
    inside = channel < channels
    row, z, y, x = place_of(tl.where(exists, unit, 0), SHAPE)
    voxel = written_voxel(row, z, y, x, class_z, class_y, class_x, SHAPE)
    visible = exists
    if written_voxels is not None:
        visible = tl.load(written_voxels + voxel, mask=exists, other=0) != 0
    sums = tl.zeros((TILE_M, TILE_C), tl.float32)
    taps_y = taps_along(class_y, 1, SHAPE)
    taps_x = taps_along(class_x, 2, SHAPE)
    taps = taps_along(class_z, 0, SHAPE) * taps_y * taps_x
    # A class that is under no tap has no steps, but the pipeline computes addresses ahead.
    taps_y = tl.maximum(taps_y, 1)
    taps_x = tl.maximum(taps_x, 1)
    for number in tl.range(0, taps, num_stages=3):
        tap_x = tap_along(number % taps_x, class_x, 2, SHAPE)
        tap_y = tap_along(number // taps_x % taps_y, class_y, 1, SHAPE)
        tap_z = tap_along(number // taps_x // taps_y, class_z, 0, SHAPE)
        source = source_of(
            table, gathered_voxels, row, z, y, x, tap_z, tap_y, tap_x, class_z, class_y, class_x, visible, SHAPE
        )
        at = offset_of(source, channels, WIDE)[:, None] + channel[None, :]
        value = tl.load(gathered + at, mask=(source >= 0)[:, None] & inside[None, :], other=0.0)
        weight_row = (tap_z * SHAPE.KERNEL[1] + tap_y) * SHAPE.KERNEL[2] + tap_x
        weight = tl.load(packed + weight_row * channels + channel, mask=inside, other=0.0)
        sums += value.to(tl.float32) * weight.to(tl.float32)[None, :]
    if bias is not None:
        sums += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums = tl.where(visible[:, None], sums, 0.0)
    to = offset_of(voxel, channels, WIDE)[:, None] + channel[None, :]
    tl.store(written + to, sums.to(written.dtype.element_ty), mask=exists[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["units", "splits"])
def conv3d_depthwise_grad_weight_kernel(
    x_,  # [voxels, channels]
    grad,  # [units, channels]
    parts,  # [splits, taps, channels] float32
    table,
    gathered_voxels,
    written_voxels,
    units,
    channels,
    splits,
    SHAPE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles_c = tl.cdiv(channels, TILE_C)
    taps: tl.constexpr = SHAPE.KERNEL[0] * SHAPE.KERNEL[1] * SHAPE.KERNEL[2]
    channel = tl.program_id(0) % tiles_c * TILE_C + tl.arange(0, TILE_C)
    tap = tl.program_id(0) // tiles_c % taps
    split = tl.program_id(0) // tiles_c // taps
    tap_x = tap % SHAPE.KERNEL[2]
    tap_y = tap // SHAPE.KERNEL[2] % SHAPE.KERNEL[1]
    tap_z = tap // SHAPE.KERNEL[2] // SHAPE.KERNEL[1]
    inside = channel < channels
    sums = tl.zeros((TILE_C,), tl.float32)
    for first in tl.range(split * TILE_M, units, splits * TILE_M, num_stages=3):
        unit = first + tl.arange(0, TILE_M)
        visible = unit < units
        row, z, y, x = place_of(tl.where(visible, unit, 0), SHAPE)
        if written_voxels is not None:
            visible = tl.load(written_voxels + unit, mask=visible, other=0) != 0
        source = source_of(table, gathered_voxels, row, z, y, x, tap_z, tap_y, tap_x, 0, 0, 0, visible, SHAPE)
        pairs = (source >= 0)[:, None] & inside[None, :]
        value = tl.load(x_ + offset_of(source, channels, WIDE)[:, None] + channel[None, :], mask=pairs, other=0.0)
        slope = tl.load(grad + offset_of(unit, channels, WIDE)[:, None] + channel[None, :], mask=pairs, other=0.0)
        sums += tl.sum(value.to(tl.float32) * slope.to(tl.float32), 0)
    tl.store(parts + (split * taps + tap) * channels + channel, sums, mask=inside)


def run(window: Window, gathered: Tensor, weight: Tensor, bias: Tensor | None, written: Tensor) -> None:
    """Forward or gradient of the input, as the window says."""
    if written.numel() == 0:
        return
    channels = len(weight)
    tile_c = power_of_two(channels, 16, 128)
    tile_m = _TILE // tile_c
    tiles_m = triton.cdiv(window.units, tile_m) * window.classes
    conv3d_depthwise_kernel[(tiles_m * triton.cdiv(channels, tile_c),)](
        gathered.contiguous(),
        weight.reshape(channels, -1).t().contiguous(),
        None if bias is None else bias.contiguous(),
        written,
        window.table,
        window.gathered_voxels,
        window.written_voxels,
        window.units,
        channels,
        SHAPE=window.shape,
        TILE_M=tile_m,
        TILE_C=tile_c,
        WIDE=is_wide(gathered, written),
    )


def grad_weight(window: Window, grad: Tensor, x: Tensor) -> Tensor:
    """[C, 1, kd, kh, kw] float32, of a forward window."""
    channels, taps = x.shape[-1], math.prod(window.shape.KERNEL)
    tile_c = power_of_two(channels, 16, 128)
    tile_m = _TILE // tile_c
    tiles = taps * triton.cdiv(channels, tile_c)
    splits = max(1, min(triton.cdiv(window.units, tile_m), 8 * multiprocessors(x.device) // tiles))
    parts = x.new_empty(splits, taps, channels, dtype=torch.float32)
    conv3d_depthwise_grad_weight_kernel[(splits * tiles,)](
        x.contiguous(),
        grad.contiguous(),
        parts,
        window.table,
        window.gathered_voxels,
        window.written_voxels,
        window.units,
        channels,
        splits,
        SHAPE=window.shape,
        TILE_M=tile_m,
        TILE_C=tile_c,
        WIDE=is_wide(x, grad),
    )
    return parts.sum(0).t().reshape(channels, 1, *window.shape.KERNEL)
