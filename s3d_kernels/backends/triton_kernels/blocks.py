"""Visible blocks of a dense volume, and back.

    gather    blocks[v, c] = dense[n, c, z, y, x] of the voxel's place; zeros at masked voxels and beyond the volume
    scatter   dense[n, c, z, y, x] = blocks[v, c] at visible voxels, fill[c] elsewhere

Layouts   dense [N, C, D, H, W] of any strides where it is read, channels last where it is written; blocks
          [voxels, C]; index [V, 4]; cells [N, grid]: the row of each cell's block, -1 where there is none.
Work      Both go through what is written and write each number once: a program makes a tile of ROWS consecutive voxels
          (W fastest) and CHANNELS of what is written. gather finds a voxel's place in the volume by index, scatter a
          place's block by cells, which a small kernel fills. Where channels are neighbours in the volume, both sides
          are moved along them; else the compiler reads along the voxels and turns the tile in shared memory.
Numbers   Moved as they are.
Limits    Fewer than 2^31 voxels on each side.
Expected  Bound by memory: what is visible is read once, the result written once. Not measured yet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..interface import BlockGeometry, Triple
from .tiles import WARPS, addresses, flags_of, is_wide, tile_of

INDEX_ROWS = 256  # of a program that fills cells
MOST_ROWS = 1024


@triton.jit(do_not_specialize=["written"])
def gather_kernel(
    dense,
    blocks,
    index,
    voxels,
    written,
    depth,
    height,
    width,
    stride_n,
    stride_c,
    stride_d,
    stride_h,
    stride_w,
    channels,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles = tl.cdiv(channels, CHANNELS)
    voxel = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    exists = voxel < written
    line = voxel // BLOCK[2]
    plane = line // BLOCK[1]
    cell = index + plane // BLOCK[0] * 4
    n = tl.load(cell, mask=exists, other=0)
    z = tl.load(cell + 1, mask=exists, other=0) * BLOCK[0] + plane % BLOCK[0]
    y = tl.load(cell + 2, mask=exists, other=0) * BLOCK[1] + line % BLOCK[1]
    x = tl.load(cell + 3, mask=exists, other=0) * BLOCK[2] + voxel % BLOCK[2]
    visible = exists & (z < depth) & (y < height) & (x < width)
    if voxels is not None:
        visible &= tl.load(voxels + voxel, mask=visible, other=0) != 0
    at = channel
    if WIDE:
        n = n.to(tl.int64)
        z = z.to(tl.int64)
        y = y.to(tl.int64)
        x = x.to(tl.int64)
        at = at.to(tl.int64)
    place = n * stride_n + z * stride_d + y * stride_h + x * stride_w
    here = (channel < channels)[None, :]
    values = tl.load(dense + place[:, None] + at[None, :] * stride_c, mask=visible[:, None] & here, other=0.0)
    tl.store(addresses(blocks, voxel, channel, channels, WIDE), values, mask=exists[:, None] & here)


@triton.jit(do_not_specialize=["rows"])
def cells_kernel(
    index,  # [V, 4]
    cells,  # [N, Gd, Gh, Gw], -1 everywhere
    rows,
    grid_d,
    grid_h,
    grid_w,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    n = tl.load(index + row * 4, mask=exists, other=0)
    z = tl.load(index + row * 4 + 1, mask=exists, other=0)
    y = tl.load(index + row * 4 + 2, mask=exists, other=0)
    x = tl.load(index + row * 4 + 3, mask=exists, other=0)
    tl.store(cells + ((n * grid_d + z) * grid_h + y) * grid_w + x, row, mask=exists)


@triton.jit(do_not_specialize=["written"])
def scatter_kernel(
    blocks,
    fill,
    dense,
    cells,
    voxels,
    written,
    depth,
    height,
    width,
    grid_d,
    grid_h,
    grid_w,
    channels,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles = tl.cdiv(channels, CHANNELS)
    place = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    exists = place < written
    x = place % width
    line = place // width
    y = line % height
    plane = line // height
    z = plane % depth
    cell = ((plane // depth * grid_d + z // BLOCK[0]) * grid_h + y // BLOCK[1]) * grid_w + x // BLOCK[2]
    row = tl.load(cells + cell, mask=exists, other=-1)
    voxel = ((row * BLOCK[0] + z % BLOCK[0]) * BLOCK[1] + y % BLOCK[1]) * BLOCK[2] + x % BLOCK[2]
    visible = row >= 0
    if voxels is not None:
        visible &= tl.load(voxels + voxel, mask=visible, other=0) != 0
    here = (channel < channels)[None, :]
    masked = tl.load(fill + channel, mask=channel < channels, other=0.0)[None, :]
    shown = visible[:, None]
    values = tl.load(addresses(blocks, voxel, channel, channels, WIDE), mask=shown & here, other=0.0)
    values = tl.where(shown, values, masked)
    tl.store(addresses(dense, place, channel, channels, WIDE), values, mask=exists[:, None] & here)


def gather(
    dense: Tensor,  # [N, C, D, H, W] of any strides
    geometry: BlockGeometry,
) -> Tensor:
    """The blocks of a geometry, zeros at masked voxels and beyond the volume: [V, *block, C]."""
    channels = dense.shape[1]
    blocks = dense.new_empty(len(geometry.index), *geometry.block, channels)
    if blocks.numel():
        tile, written = tile_of(channels, MOST_ROWS), blocks.numel() // channels
        gather_kernel[(triton.cdiv(written, tile.ROWS) * triton.cdiv(channels, tile.CHANNELS),)](
            dense,
            blocks,
            geometry.index.contiguous(),
            flags_of(geometry.voxels),
            written,
            *dense.shape[2:],
            *dense.stride(),
            channels,
            geometry.block,
            *tile,
            WIDE=is_wide(dense, blocks),
            num_warps=WARPS,
        )
    return blocks


def scatter(
    blocks: Tensor,  # [V, *block, C]
    fill: Tensor,  # [C]
    geometry: BlockGeometry,
) -> Tensor:
    """Volumes with `fill` at masked voxels: [N, C, D, H, W] in channels-last memory."""
    channels = blocks.shape[-1]
    dense = blocks.new_empty(geometry.batch, *geometry.shape, channels)
    if dense.numel():
        tile, written = tile_of(channels, MOST_ROWS), dense.numel() // channels
        cells = _cells(geometry)
        scatter_kernel[(triton.cdiv(written, tile.ROWS) * triton.cdiv(channels, tile.CHANNELS),)](
            blocks.contiguous(),
            fill.contiguous(),
            dense,
            cells,
            flags_of(geometry.voxels),
            written,
            *geometry.shape,
            *cells.shape[1:],
            channels,
            geometry.block,
            *tile,
            WIDE=is_wide(dense, blocks),
            num_warps=WARPS,
        )
    return dense.permute(0, 4, 1, 2, 3)


def _cells(geometry: BlockGeometry) -> Tensor:
    """[N, Gd, Gh, Gw] int32: the row of each cell's block, -1 where there is none."""
    grid: Triple = tuple(-(-size // side) for size, side in zip(geometry.shape, geometry.block, strict=True))  # type: ignore[assignment]
    rows = len(geometry.index)
    cells = geometry.index.new_full((geometry.batch, *grid), -1)
    if rows:
        index = geometry.index.contiguous()
        cells_kernel[(triton.cdiv(rows, INDEX_ROWS),)](index, cells, rows, *grid, INDEX_ROWS, num_warps=WARPS)
    return cells
