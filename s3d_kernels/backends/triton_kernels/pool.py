"""Average and maximum pooling over windows, and their backward.

    average       out[v] = sum over taps of in[source(v, tap)] / divisor; divisor 0: the taps that lie in the volume
    average_grad  grad_in[v] = sum over taps of grad[source(v, tap)] / divisor of that output      (transposed window)
    maximum       out[v] = the largest in[source(v, tap)]; winner[v]: its tap
    maximum_grad  grad_in[v] = sum of grad[source(v, tap)] where winner[source(v, tap)] = tap      (transposed window)

Masked voxels count as zeros. Outside the volume the average sees zeros and the maximum nothing. Of equal numbers the
first tap wins; NaN wins over all numbers.

Layouts   in, out, grad, winners [voxels, C], channels last. target_index [Vo, 4]: where output blocks lie.
Work      A program makes a tile of ROWS units (window.py) of one class and CHANNELS, and goes through the taps of the
          class. Programs side by side make the classes of the same units, so that together they write whole lines.
          One kernel makes sums in both directions, another one maxima or their winners.
Winners   Are found before the gradient, as int16: to find them again, it would read all taps of each window that an
          input lies in, 27 * 27 / 8 reads for 3x3x3 with stride 2, where stored ones cost two bytes for each output.
Numbers   float32, in the order of taps, rounded once. No atomics.
Limits    Fewer than 2^31 voxels on each side; at most 2^15 taps for the gradient of a maximum.
Expected  Bound by memory where windows do not overlap; where they do, by L1 and L2, from which every tap reads its
          rows again. Not measured yet.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import PoolKind, WindowGeometry
from .tiles import WARPS, addresses, is_wide, tile_of
from .window import (
    Window,
    class_of,
    forward_window,
    place_of,
    source_of,
    tap_along,
    taps_along,
    transposed_window,
    written_voxel,
)

# Fewer than threads: the compiler then finds a tap's sources in the layout in which it reads their channels.
MOST_ROWS = 64
MOST_WINNERS = 2**15  # int16


@triton.jit
def program_of(
    written_voxels, units, channels, CLASSES: tl.constexpr, SHAPE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """What a program makes: row and place of its units, offsets of its class, written voxels, whether they are there
    and visible, channels.
    """
    tiles = tl.cdiv(channels, WIDTH)
    program = tl.program_id(0) // CLASSES
    class_z, class_y, class_x = class_of(tl.program_id(0) % CLASSES, SHAPE)
    unit = program // tiles * ROWS + tl.arange(0, ROWS)
    channel = program % tiles * WIDTH + tl.arange(0, WIDTH)
    row, z, y, x = place_of(unit, SHAPE)
    voxel = written_voxel(row, z, y, x, class_z, class_y, class_x, SHAPE)
    exists = unit < units
    visible = exists
    if SHAPE.WRITTEN_PARTIAL:
        visible &= tl.load(written_voxels + voxel, mask=exists, other=0) != 0
    return row, z, y, x, class_z, class_y, class_x, voxel, exists, visible, channel


@triton.jit
def window_start(target_index, row, unit, exists, AXIS: tl.constexpr, SHAPE: tl.constexpr):
    """Coordinate in the input volume of an output's first tap; may be negative."""
    cell = tl.load(target_index + row * 4 + (1 + AXIS), mask=exists, other=0)
    return (cell * SHAPE.UNITS[AXIS] + unit) * SHAPE.STRIDE[AXIS] - SHAPE.PADDING[AXIS]


@triton.jit
def taps_inside(target_index, row, z, y, x, exists, depth, height, width, SHAPE: tl.constexpr):
    """How many taps of an output lie in the volume."""
    start_z = window_start(target_index, row, z, exists, 0, SHAPE)
    start_y = window_start(target_index, row, y, exists, 1, SHAPE)
    start_x = window_start(target_index, row, x, exists, 2, SHAPE)
    count_z = tl.minimum(SHAPE.KERNEL[0], depth - start_z) - tl.maximum(-start_z, 0)
    count_y = tl.minimum(SHAPE.KERNEL[1], height - start_y) - tl.maximum(-start_y, 0)
    count_x = tl.minimum(SHAPE.KERNEL[2], width - start_x) - tl.maximum(-start_x, 0)
    return (tl.maximum(count_z, 1) * tl.maximum(count_y, 1) * tl.maximum(count_x, 1)).to(tl.float32)


@triton.jit(do_not_specialize=["units"])
def sum_kernel(
    gathered,
    winners,  # [gathered voxels, C]: only the tap of this number counts; or None
    written,
    table,
    gathered_voxels,
    written_voxels,
    target_index,
    divisor,
    depth,
    height,
    width,
    units,
    channels,
    COUNTED: tl.constexpr,  # divide by the number of taps in the volume
    SHAPE: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row, z, y, x, class_z, class_y, class_x, voxel, exists, visible, channel = program_of(
        written_voxels, units, channels, CLASSES, SHAPE, ROWS, CHANNELS
    )
    here = (channel < channels)[None, :]
    taps_z = taps_along(class_z, 0, SHAPE)
    taps_y = taps_along(class_y, 1, SHAPE)
    taps_x = taps_along(class_x, 2, SHAPE)
    sums = tl.zeros([ROWS, CHANNELS], tl.float32)
    for number in range(taps_z * taps_y * taps_x):
        tap_x = tap_along(number % taps_x, class_x, 2, SHAPE)
        tap_y = tap_along(number // taps_x % taps_y, class_y, 1, SHAPE)
        tap_z = tap_along(number // taps_x // taps_y, class_z, 0, SHAPE)
        source = source_of(
            table, gathered_voxels, row, z, y, x, tap_z, tap_y, tap_x, class_z, class_y, class_x, visible, SHAPE
        )
        found = (source >= 0)[:, None] & here
        values = tl.load(addresses(gathered, source, channel, channels, WIDE), mask=found, other=0.0).to(tl.float32)
        if winners is not None:
            winner = tl.load(addresses(winners, source, channel, channels, WIDE), mask=found, other=-1)
            values = tl.where(winner == (tap_z * SHAPE.KERNEL[1] + tap_y) * SHAPE.KERNEL[2] + tap_x, values, 0.0)
        if COUNTED and SHAPE.TRANSPOSED:
            output = tl.maximum(source, 0)
            from_row, from_z, from_y, from_x = place_of(output, SHAPE)
            count = taps_inside(
                target_index, from_row, from_z, from_y, from_x, source >= 0, depth, height, width, SHAPE
            )
            values /= count[:, None]
        sums += values
    if not COUNTED:
        sums /= divisor
    elif not SHAPE.TRANSPOSED:
        sums /= taps_inside(target_index, row, z, y, x, exists, depth, height, width, SHAPE)[:, None]
    tl.store(addresses(written, voxel, channel, channels, WIDE), sums, mask=exists[:, None] & here)


@triton.jit(do_not_specialize=["units"])
def maximum_kernel(
    x,
    out,  # [output voxels, C]: the maximum, or its tap
    table,
    gathered_voxels,
    written_voxels,
    target_index,
    depth,
    height,
    width,
    units,
    channels,
    WINNER: tl.constexpr,  # write the tap
    SHAPE: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row, unit_z, unit_y, unit_x, class_z, class_y, class_x, voxel, exists, visible, channel = program_of(
        written_voxels, units, channels, CLASSES, SHAPE, ROWS, CHANNELS
    )
    here = (channel < channels)[None, :]
    start_z = window_start(target_index, row, unit_z, visible, 0, SHAPE)
    start_y = window_start(target_index, row, unit_y, visible, 1, SHAPE)
    start_x = window_start(target_index, row, unit_x, visible, 2, SHAPE)
    most = tl.zeros([ROWS, CHANNELS], tl.float32)
    winner = tl.full([ROWS, CHANNELS], -1, tl.int32)
    for number in range(SHAPE.KERNEL[0] * SHAPE.KERNEL[1] * SHAPE.KERNEL[2]):
        tap_x = number % SHAPE.KERNEL[2]
        tap_y = number // SHAPE.KERNEL[2] % SHAPE.KERNEL[1]
        tap_z = number // SHAPE.KERNEL[2] // SHAPE.KERNEL[1]
        at_z = start_z + tap_z
        at_y = start_y + tap_y
        at_x = start_x + tap_x
        inside = visible & (at_z >= 0) & (at_z < depth) & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        source = source_of(
            table, gathered_voxels, row, unit_z, unit_y, unit_x, tap_z, tap_y, tap_x,
            class_z, class_y, class_x, inside, SHAPE,
        )  # fmt: skip
        found = (source >= 0)[:, None] & here
        values = tl.load(addresses(x, source, channel, channels, WIDE), mask=found, other=0.0).to(tl.float32)
        # The first one wins whatever it is, minus infinity too.
        wins = inside[:, None] & ((winner < 0) | (values > most) | (values != values))
        most = tl.where(wins, values, most)
        winner = tl.where(wins, number, winner)
    result = winner if WINNER else most
    tl.store(addresses(out, voxel, channel, channels, WIDE), result, mask=exists[:, None] & here)


def pool3d(
    x: Tensor,  # [Vi, *source_block, C]
    geometry: WindowGeometry,
    kind: PoolKind,
    divisor: int,
) -> Tensor:
    """Window sum / divisor (0: the number of window voxels in the volume) or window maximum: [Vo, *target_block, C]."""
    x = x.contiguous()
    out = x.new_empty(len(geometry.target_index), *geometry.target_block, x.shape[-1])
    if kind == "max":
        _maximum(x, out, geometry)
    else:
        _sum(x, None, out, forward_window(geometry), geometry, divisor)
    return out


def pool3d_grad(
    grad: Tensor,  # [Vo, *target_block, C]
    x: Tensor | None,  # [Vi, *source_block, C], for "max" only
    geometry: WindowGeometry,
    kind: PoolKind,
    divisor: int,
) -> Tensor:
    """Gradient of the input: [Vi, *source_block, C].

    Raises:
        ValueError: more taps than the number of a maximum's can tell.
    """
    grad = grad.contiguous()
    winners = None
    if kind == "max":
        assert x is not None, "the gradient of a maximum needs the input"
        if math.prod(geometry.kernel_size) > MOST_WINNERS:
            raise ValueError(f"kernel_size must have at most {MOST_WINNERS} taps, got {geometry.kernel_size}")
        winners = torch.empty_like(grad, dtype=torch.int16)
        _maximum(x.detach().contiguous(), winners, geometry)
        divisor = 1
    grad_x = grad.new_empty(len(geometry.source_index), *geometry.source_block, grad.shape[-1])
    _sum(grad, winners, grad_x, transposed_window(geometry), geometry, divisor)
    return grad_x


def _sum(
    gathered: Tensor,  # [gathered voxels, C]
    winners: Tensor | None,  # [gathered voxels, C] int16
    written: Tensor,  # [written voxels, C]
    window: Window,
    geometry: WindowGeometry,
    divisor: int,
) -> None:
    grid, constants = _launch(gathered, written, window)
    if written.numel():
        sum_kernel[grid](
            gathered,
            winners,
            written,
            *_operands(window, geometry),
            divisor,
            *geometry.shape,
            window.units,
            written.shape[-1],
            COUNTED=divisor == 0,
            **constants,
        )


def _maximum(x: Tensor, out: Tensor, geometry: WindowGeometry) -> None:
    """The window maxima, or where out is int16 their taps."""
    window = forward_window(geometry)
    grid, constants = _launch(x, out, window)
    if out.numel():
        maximum_kernel[grid](
            x,
            out,
            *_operands(window, geometry),
            *geometry.shape,
            window.units,
            out.shape[-1],
            WINNER=out.dtype == torch.int16,
            **constants,
        )


def _operands(window: Window, geometry: WindowGeometry) -> tuple[Tensor | None, ...]:
    return window.table, window.gathered_voxels, window.written_voxels, geometry.target_index.contiguous()


def _launch(gathered: Tensor, written: Tensor, window: Window) -> tuple[tuple[int], dict[str, object]]:
    """Grid and constants."""
    channels = written.shape[-1]
    tile = tile_of(channels, MOST_ROWS)
    tiles = triton.cdiv(window.units, tile.ROWS) * triton.cdiv(channels, tile.CHANNELS)
    constants: dict[str, object] = {
        "SHAPE": window.shape,
        "CLASSES": window.classes,
        **tile._asdict(),
        "WIDE": is_wide(gathered, written),
        "num_warps": WARPS,
    }
    return (tiles * window.classes,), constants
