"""Which voxels the windows of a convolution or pooling read: the arithmetic that those kernels share.

`written` voxels are computed, `gathered` ones are read: a forward kernel writes outputs and gathers inputs, a
transposed one (gradient of the input) the reverse. Output voxel o reads the inputs o * stride - padding + tap.

Written voxels are numbered by *units*: one for each output voxel of a block. Forward, a unit is a written voxel.
Transposed, it stands for the prod(stride) inputs that start at unit * stride; the *class* (one of prod(stride)) says
which of them is meant. All voxels of a class are read under the same taps, so a tile of one class has no tap that is
between the steps of a stride, and in both directions the gathered coordinate is a multiple of the unit's plus a shift
that depends on class and tap alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..interface import Triple, WindowGeometry
from .tiles import flags_of

# Voxels are numbered by 32 bits, and tiles reach beyond the end.
MAX_VOXELS = 2**31 - 1024


class WindowShape(NamedTuple):
    """What a kernel is compiled for."""

    UNITS: Triple  # of a block: the block of the output
    STRIDE: Triple
    KERNEL: Triple
    PADDING: Triple
    RADIUS: Triple
    TRANSPOSED: bool
    GATHERED_PARTIAL: bool  # whether gathered voxels may be masked inside stored blocks
    WRITTEN_PARTIAL: bool


@dataclass(frozen=True)
class Window:
    """One direction of a window, as launchers hand it to kernels."""

    shape: WindowShape
    table: Tensor  # [Vw, T] int32: rows of the gathered blocks around each written block
    gathered_voxels: Tensor | None  # [Vg, *gathered_block] uint8; None where all are visible
    written_voxels: Tensor | None  # [Vw, *written_block] uint8
    written_index: Tensor  # [Vw, 4] int32

    @property
    def classes(self) -> int:
        return math.prod(self.shape.STRIDE) if self.shape.TRANSPOSED else 1

    @property
    def units(self) -> int:
        """Of one class: all written voxels, forward."""
        return len(self.written_index) * math.prod(self.shape.UNITS)


def forward_window(geometry: WindowGeometry) -> Window:
    """Outputs are written, inputs gathered."""
    return _window(geometry, transposed=False)


def transposed_window(geometry: WindowGeometry) -> Window:
    """Inputs are written, outputs gathered."""
    return _window(geometry, transposed=True)


def _window(geometry: WindowGeometry, transposed: bool) -> Window:
    source, target = geometry.source_voxels, geometry.target_voxels
    gathered, written = (target, source) if transposed else (source, target)
    shape = WindowShape(
        UNITS=geometry.target_block,
        STRIDE=geometry.stride,
        KERNEL=geometry.kernel_size,
        PADDING=geometry.padding,
        RADIUS=geometry.radius,
        TRANSPOSED=transposed,
        GATHERED_PARTIAL=gathered is not None,
        WRITTEN_PARTIAL=written is not None,
    )
    table = geometry.reverse_table() if transposed else geometry.table
    index = geometry.source_index if transposed else geometry.target_index
    voxels = len(geometry.source_index) * math.prod(geometry.source_block)
    if voxels > MAX_VOXELS:
        raise ValueError(f"input has {voxels} voxels in visible blocks, the triton backend can take {MAX_VOXELS}")
    return Window(shape, table.contiguous(), flags_of(gathered), flags_of(written), index)


# Kernels are not specialised on numbers that follow from how many blocks are visible, or each mask would compile anew.


@triton.jit
def place_of(unit, SHAPE: tl.constexpr):
    """Row of a unit's block and coordinates of the unit in it."""
    x = unit % SHAPE.UNITS[2]
    line = unit // SHAPE.UNITS[2]
    y = line % SHAPE.UNITS[1]
    plane = line // SHAPE.UNITS[1]
    return plane // SHAPE.UNITS[0], plane % SHAPE.UNITS[0], y, x


@triton.jit
def class_of(number, SHAPE: tl.constexpr):
    """Offsets along each axis of the written voxels of a class."""
    if SHAPE.TRANSPOSED:
        x = number % SHAPE.STRIDE[2]
        line = number // SHAPE.STRIDE[2]
        return line // SHAPE.STRIDE[1], line % SHAPE.STRIDE[1], x
    else:
        return 0, 0, 0


@triton.jit
def written_voxel(row, z, y, x, class_z, class_y, class_x, SHAPE: tl.constexpr):
    """Number of a unit's written voxel."""
    if SHAPE.TRANSPOSED:
        z = (row * SHAPE.UNITS[0] + z) * SHAPE.STRIDE[0] + class_z
        y = (z * SHAPE.UNITS[1] + y) * SHAPE.STRIDE[1] + class_y
        return (y * SHAPE.UNITS[2] + x) * SHAPE.STRIDE[2] + class_x
    else:
        return ((row * SHAPE.UNITS[0] + z) * SHAPE.UNITS[1] + y) * SHAPE.UNITS[2] + x


@triton.jit
def first_tap(class_, AXIS: tl.constexpr, SHAPE: tl.constexpr):
    """The first tap along an axis under which the voxels of a class are read; the next ones follow by the stride."""
    if SHAPE.TRANSPOSED:
        return (class_ + SHAPE.PADDING[AXIS]) % SHAPE.STRIDE[AXIS]
    else:
        return 0


@triton.jit
def taps_along(class_, AXIS: tl.constexpr, SHAPE: tl.constexpr):
    """How many taps along an axis there are for a class; can be 0."""
    if SHAPE.TRANSPOSED:
        first = first_tap(class_, AXIS, SHAPE)
        return (tl.maximum(SHAPE.KERNEL[AXIS] - first, 0) + SHAPE.STRIDE[AXIS] - 1) // SHAPE.STRIDE[AXIS]
    else:
        return SHAPE.KERNEL[AXIS]


@triton.jit
def tap_along(number, class_, AXIS: tl.constexpr, SHAPE: tl.constexpr):
    """Tap along an axis (0 ... kernel - 1), for the `number`-th one of a class."""
    if SHAPE.TRANSPOSED:
        return first_tap(class_, AXIS, SHAPE) + number * SHAPE.STRIDE[AXIS]
    else:
        return number


@triton.jit
def gathered_along(unit, tap, class_, AXIS: tl.constexpr, SHAPE: tl.constexpr):
    """Coordinate of the gathered voxel under a tap, counted from the table's first block on, so never negative."""
    if SHAPE.TRANSPOSED:
        side = SHAPE.UNITS[AXIS]
        # The difference is a multiple of the stride; with the table's reach added it is not negative either.
        reach = SHAPE.RADIUS[AXIS] * side
        return unit + (class_ + SHAPE.PADDING[AXIS] - tap + reach * SHAPE.STRIDE[AXIS]) // SHAPE.STRIDE[AXIS]
    else:
        side = SHAPE.UNITS[AXIS] * SHAPE.STRIDE[AXIS]
        return unit * SHAPE.STRIDE[AXIS] + (tap - SHAPE.PADDING[AXIS] + SHAPE.RADIUS[AXIS] * side)


@triton.jit
def source_of(
    table, gathered_voxels, row, z, y, x, tap_z, tap_y, tap_x, class_z, class_y, class_x, exists, SHAPE: tl.constexpr
):
    """Number of the gathered voxel under a tap, -1 if it is masked or outside, or if `exists` is false.

    Units, taps and `exists` may have any shapes that broadcast.
    """
    side_z = SHAPE.UNITS[0] * (1 if SHAPE.TRANSPOSED else SHAPE.STRIDE[0])
    side_y = SHAPE.UNITS[1] * (1 if SHAPE.TRANSPOSED else SHAPE.STRIDE[1])
    side_x = SHAPE.UNITS[2] * (1 if SHAPE.TRANSPOSED else SHAPE.STRIDE[2])
    at_z = gathered_along(z, tap_z, class_z, 0, SHAPE)
    at_y = gathered_along(y, tap_y, class_y, 1, SHAPE)
    at_x = gathered_along(x, tap_x, class_x, 2, SHAPE)
    width_y = 2 * SHAPE.RADIUS[1] + 1
    width_x = 2 * SHAPE.RADIUS[2] + 1
    columns = (2 * SHAPE.RADIUS[0] + 1) * width_y * width_x
    column = (at_z // side_z * width_y + at_y // side_y) * width_x + at_x // side_x
    found = tl.load(table + (row * columns + column), mask=exists, other=-1)
    source = ((found * side_z + at_z % side_z) * side_y + at_y % side_y) * side_x + at_x % side_x
    source = tl.where(found >= 0, source, -1)
    if SHAPE.GATHERED_PARTIAL:
        shown = tl.load(gathered_voxels + source, mask=source >= 0, other=0)
        source = tl.where(shown != 0, source, -1)
    return source
