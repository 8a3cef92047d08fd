"""Tiles of [voxels, channels] in channels-last memory: their sizes, and where their numbers lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 2048  # of a tile: 16 for each of 128 threads
WARPS = 4
MOST_CHANNELS = 128
# From here on offsets have 64 bits; half of what 32 bits can hold, for tiles reach beyond the end.
WIDE_FROM = 2**30


class Tile(NamedTuple):
    """What a kernel is compiled for."""

    ROWS: int
    CHANNELS: int


def tile_of(channels: int, most_rows: int = NUMBERS) -> Tile:
    """A tile that wastes few lanes on channels that do not exist and reads 16 bytes at a time where it can."""
    if channels < 16:
        width = triton.next_power_of_2(max(channels, 1))
    else:
        width = min((128, 64, 32, 16), key=lambda size: (triton.cdiv(channels, size) * size, -size))
    return Tile(min(most_rows, NUMBERS // width), width)


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether offsets into one of the tensors need 64 bits, wherever its strides lead."""
    spans = (
        1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        for t in tensors
        if t is not None and t.numel() > 0
    )
    return any(span >= WIDE_FROM for span in spans)


def flags_of(voxels: Tensor | None) -> Tensor | None:
    """Which voxels are visible, as kernels read it: [V, *block] uint8; None: all."""
    return None if voxels is None else voxels.contiguous().view(torch.uint8)


@triton.jit
def addresses(base, rows, channel, channels, WIDE: tl.constexpr):
    """Pointers [rows, channels] to the numbers of a tile."""
    if WIDE:
        rows = rows.to(tl.int64)
    return base + rows[:, None] * channels + channel[None, :]
