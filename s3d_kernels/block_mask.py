"""BlockMask: which voxels of a batch of volumes are visible, stored block by block."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.interface import WindowGeometry

Triple = tuple[int, int, int]


def triple(value: int | Sequence[int], name: str, minimum: int = 1) -> Triple:
    """One integer or three as a tuple of three.

    Raises:
        ValueError: not an integer or three integers of at least ``minimum``; names the argument.
    """
    if type(value) is tuple and len(value) == 3:  # what layers have, and call for each of their inputs
        first, second, third = value
        if type(first) is type(second) is type(third) is int and min(value) >= minimum:
            return first, second, third
    try:
        # operator.index takes every integer type, numpy's too, and nothing else.
        values = (
            tuple(operator.index(v) for v in value) if isinstance(value, Iterable) else (operator.index(value),) * 3
        )
    except TypeError:
        values = ()
    if len(values) != 3 or any(v < minimum for v in values):
        raise ValueError(f"{name} must be an integer or three integers >= {minimum}, got {value!r}")
    return int(values[0]), int(values[1]), int(values[2])


class BlockTables:
    """Tables of the stored blocks, shared by the masks of all resolutions of one batch.

    Attributes:
        grid: [N, Gd, Gh, Gw] bool, True where a block is stored.
        index: [V, 4] int32, (n, gd, gh, gw) of each stored block, sorted, so samples are contiguous.
        rows: [N, Gd, Gh, Gw] int32, the inverse of ``index``; -1 where no block is stored.
        sample_offsets: [N + 1] int32, rows of sample n are sample_offsets[n]:sample_offsets[n + 1].
        neighbours: [V, 27] int32, see :func:`neighbour_table`.
    """

    def __init__(self, grid: Tensor) -> None:
        self._neighbours: Tensor | None = None
        self.grid = grid
        self.index = grid.nonzero().to(torch.int32, memory_format=torch.contiguous_format)
        self.rows = torch.where(grid, grid.flatten().cumsum(0).view(grid.shape) - 1, -1).to(torch.int32)
        counts = grid.flatten(1).sum(1)
        self.sample_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)

    @property
    def neighbours(self) -> Tensor:
        if self._neighbours is None:  # not a cached_property: its lock breaks compiled graphs in Python 3.11
            self._neighbours = neighbour_table(self.index, self.rows, (1, 1, 1))
        return self._neighbours


def neighbour_table(
    index: Tensor,  # [V, 4] int32 (n, gd, gh, gw)
    rows: Tensor,  # [N, Gd, Gh, Gw] int32, -1 where not stored
    radius: Triple,
) -> Tensor:
    """Row of every block in the neighbourhood of the blocks listed in ``index``.

    ``index`` and ``rows`` may belong to different block sets on the same grid (output and input of an operator).

    Returns: [V, T] int32 with T = prod(2 * radius + 1). The column of grid offset (dz, dy, dx) is
        ((dz + rz) * (2 ry + 1) + dy + ry) * (2 rx + 1) + dx + rx; it holds the row of the block there, -1 where none
        is stored or outside the grid.
    """
    rz, ry, rx = radius
    padded = torch.nn.functional.pad(rows, (rx, rx, ry, ry, rz, rz), value=-1)
    windows = padded.unfold(1, 2 * rz + 1, 1).unfold(2, 2 * ry + 1, 1).unfold(3, 2 * rx + 1, 1)
    n, z, y, x = index.long().unbind(1)
    return windows[n, z, y, x].flatten(1).contiguous()


class BlockMask:
    """Which voxels of a batch of volumes are visible, at one resolution.

    A *block* is a cuboid of voxels; blocks with at least one visible voxel are stored, as rows that are sorted by
    sample. Samples may have different numbers of rows, also none. Where blocks are only partly visible, ``voxels``
    says which of their voxels are. Make one with :meth:`random`, :meth:`from_grid` or :meth:`from_voxels`.

    Attributes:
        tables: index tables, the same object at all resolutions that share a block grid.
        block: voxels of a block along depth, height, width at this resolution.
        shape: voxels of the volume at this resolution. Blocks at its far faces may reach beyond it.
        voxels: [V, bd, bh, bw] bool, True at visible voxels of the stored blocks; None if all are visible.
    """

    def __init__(self, tables: BlockTables, block: Triple, shape: Triple, voxels: Tensor | None) -> None:
        self.tables = tables
        self.block = block
        self.shape = shape
        self.voxels = voxels
        self._merged: dict[Triple, tuple[BlockMask, Tensor]] = {}
        self._downsampled: dict[Triple, BlockMask] = {}
        self._counts: dict[tuple[torch.dtype, int], Tensor] = {}
        self.windows: dict[Any, WindowGeometry] = {}  # of functional, which knows when one of them fits

    # ---- constructors

    @classmethod
    def from_grid(
        cls,
        visible: Tensor,  # [N, Gd, Gh, Gw] bool
        block: int | Sequence[int],
    ) -> BlockMask:
        """Mask of whole blocks: cell (n, d, h, w) of ``visible`` says whether that block is visible.

        Raises:
            ValueError: ``visible`` is not a 4-dimensional bool tensor, or ``block`` not positive.
        """
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool or visible.dim() != 4:
            raise ValueError(f"visible must be a bool tensor [N, Gd, Gh, Gw], got {_describe(visible)}")
        sides = triple(block, "block")
        shape = tuple(g * b for g, b in zip(visible.shape[1:], sides, strict=True))
        return cls(BlockTables(visible), sides, shape, None)  # type: ignore[arg-type]

    @classmethod
    def random(
        cls,
        batch: int,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        ratio: float | tuple[float, float],
        generator: torch.Generator | None = None,
        *,
        per_sample: bool = True,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Mask floor(ratio * cells) random cells of the grid of every sample.

        Args:
            batch: samples.
            grid: cells along depth, height, width, e.g. 5 for a 160^3 patch and blocks of 32.
            block: voxels of a block along each axis.
            ratio: masked cells / all cells, in [0, 1]; or a range from which it is drawn uniformly.
            generator: random numbers are drawn on its device, so that a CPU generator gives the same mask everywhere.
            per_sample: draw a ratio from the range for every sample (True) or one for the batch (False).
            device: where the mask lives; default is the device of ``generator``, or the CPU.
        Raises:
            ValueError: ``ratio`` outside [0, 1] or a range in the wrong order; batch, grid or block not positive.
        Source: Wald et al. (CVPR 2025), section 3: static ratio, or dynamic ratio drawn from U[0.6, 0.9].
        """
        low, high = (ratio, ratio) if isinstance(ratio, int | float) else ratio
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"ratio must be in [0, 1] or an increasing pair of such numbers, got {ratio!r}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        cells_per_axis = triple(grid, "grid")
        cells = math.prod(cells_per_axis)
        draw_device = generator.device if generator is not None else torch.device("cpu")
        draws = torch.rand(batch if per_sample else 1, generator=generator, device=draw_device, dtype=torch.float64)
        ratios = (low + (high - low) * draws).expand(batch)
        # 0.29 * 100 is 28.999999999999996 in binary; the small term keeps floor() at what the user wrote.
        masked = torch.floor(ratios * cells + 1e-9)
        rank = torch.rand(batch, cells, generator=generator, device=draw_device).argsort(1).argsort(1)
        visible = (rank >= masked[:, None]).view(batch, *cells_per_axis)
        return cls.from_grid(visible.to(device if device is not None else draw_device), block)

    @classmethod
    def from_voxels(
        cls,
        visible: Tensor,  # [N, D, H, W] or [N, 1, D, H, W] bool
        block: int | Sequence[int] = 8,
    ) -> BlockMask:
        """Mask of any shape. Exact for every mask, fast where visible voxels cluster.

        A block is stored if any of its voxels is visible. Volume sides need not be multiples of the block.

        Raises:
            ValueError: ``visible`` is not such a bool tensor, or ``block`` not positive.
        """
        if isinstance(visible, Tensor) and visible.dim() == 5 and visible.shape[1] == 1:
            visible = visible[:, 0]
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool or visible.dim() != 4:
            raise ValueError(f"visible must be a bool tensor [N, D, H, W] or [N, 1, D, H, W], got {_describe(visible)}")
        sides = triple(block, "block")
        shape: Triple = tuple(visible.shape[1:])  # type: ignore[assignment]
        bricks = _split_blocks(visible, sides)
        tables = BlockTables(bricks.flatten(4).any(4))
        voxels = bricks[tables.grid]
        return cls(tables, sides, shape, None if bool(voxels.all()) else voxels)

    # ---- sizes and tables

    @property
    def batch(self) -> int:
        """Samples N."""
        return self.tables.grid.shape[0]

    @property
    def grid_shape(self) -> Triple:
        """Blocks of the volume along depth, height, width."""
        return tuple(self.tables.grid.shape[1:])  # type: ignore[return-value]

    @property
    def num_blocks(self) -> int:
        """Stored blocks V over all samples."""
        return self.tables.index.shape[0]

    @property
    def index(self) -> Tensor:
        """[V, 4] int32: (n, gd, gh, gw) of each stored block."""
        return self.tables.index

    @property
    def sample_offsets(self) -> Tensor:
        """[N + 1] int32: sample n has the rows sample_offsets[n]:sample_offsets[n + 1]."""
        return self.tables.sample_offsets

    @property
    def device(self) -> torch.device:
        return self.tables.grid.device

    def neighbours(self, radius: Triple = (1, 1, 1), of: BlockMask | None = None) -> Tensor:
        """[V', T] int32 row of each neighbour within ``radius`` blocks of the blocks of a mask on the same grid.

        See :func:`neighbour_table`; default is this mask itself.
        """
        index = self.tables.index if of is None else of.tables.index
        if radius == (1, 1, 1) and index is self.tables.index:
            return self.tables.neighbours
        return neighbour_table(index, self.tables.rows, radius)

    def visible_voxels(self) -> Tensor:
        """[N] int64: visible voxels of each sample."""
        if self.voxels is None:
            return (self.sample_offsets[1:] - self.sample_offsets[:-1]).long() * math.prod(self.block)
        per_block = self.voxels.flatten(1).sum(1)
        return per_block.new_zeros(self.batch).index_add_(0, self.index[:, 0], per_block)

    def voxel_counts(self, dtype: torch.dtype, least: int = 0) -> Tensor:
        """[N, 1], not to be modified: visible voxels of each sample, as every norm under this mask wants them.

        Args: least: put in place of less, 1 for a divisor.
        """
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():  # where a tensor is of no use to others
            return self.visible_voxels()[:, None].clamp(min=least).to(dtype)
        if (dtype, least) not in self._counts:
            counts = self.voxel_counts(dtype).clamp(min=least) if least else self.visible_voxels()[:, None].to(dtype)
            self._counts[dtype, least] = counts
        return self._counts[dtype, least]

    def same_layout(self, other: BlockMask) -> bool:
        """Whether two masks are one: same stored blocks, resolution and visible voxels (same objects)."""
        return self is other or (
            self.tables is other.tables
            and self.block == other.block
            and self.shape == other.shape
            and self.voxels is other.voxels
        )

    # ---- other resolutions and forms

    def downsample(self, stride: int | Sequence[int]) -> BlockMask:
        """Mask at the resolution after a layer of this stride: a voxel is visible if any of the voxels it covers is.

        All tables are shared. Along an axis whose stride does not divide the block side (a block would get smaller
        than one voxel), ``stride`` neighbouring blocks are first merged into one with a voxel mask.
        """
        steps = triple(stride, "stride")
        if steps == (1, 1, 1):
            return self
        if steps in self._downsampled:
            return self._downsampled[steps]
        source = self.merge(self.merge_factors(steps))[0]
        block: Triple = tuple(b // s for b, s in zip(source.block, steps, strict=True))  # type: ignore[assignment]
        shape: Triple = tuple(-(-e // s) for e, s in zip(source.shape, steps, strict=True))  # type: ignore[assignment]
        # A stored block has a visible voxel, so blocks of one voxel need no voxel mask.
        voxels = None if source.voxels is None or block == (1, 1, 1) else _any_pool(source.voxels, steps)
        coarse = BlockMask(source.tables, block, shape, voxels)
        # Kept, so that the two branches of a residual block that halves the resolution get one and the same mask.
        self._downsampled[steps] = coarse
        return coarse

    def upsample(self, stride: int | Sequence[int]) -> BlockMask:
        """Mask at the resolution after a transposed convolution with kernel = stride; all tables are shared."""
        steps = triple(stride, "stride")
        if steps == (1, 1, 1):
            return self
        voxels = self.voxels
        if voxels is not None:
            for axis, step in enumerate(steps):
                voxels = voxels.repeat_interleave(step, dim=axis + 1)
        block: Triple = tuple(b * s for b, s in zip(self.block, steps, strict=True))  # type: ignore[assignment]
        shape: Triple = tuple(e * s for e, s in zip(self.shape, steps, strict=True))  # type: ignore[assignment]
        return BlockMask(self.tables, block, shape, voxels)

    def merge_factors(self, stride: Triple) -> Triple:
        """Blocks to merge along each axis before a layer of this stride: 1 where it divides the block side."""
        return tuple(1 if b % s == 0 else s for b, s in zip(self.block, stride, strict=True))  # type: ignore[return-value]

    def merge(self, factors: Triple) -> tuple[BlockMask, Tensor]:
        """Mask of the same voxels in larger blocks, and where their parts come from.

        Returns: the merged mask, and [V', fd, fh, fw] int64, the rows of the blocks that each merged block is made of
            (-1 where such a block is not stored).
        """
        if factors == (1, 1, 1):
            return self, torch.arange(self.num_blocks, device=self.device).view(-1, 1, 1, 1)
        if factors in self._merged:
            return self._merged[factors]
        rows = _split_blocks(self.tables.rows, factors, fill=-1)
        tables = BlockTables((rows >= 0).flatten(4).any(4))
        parts = rows[tables.grid].long()  # [V', fd, fh, fw]
        stored = parts >= 0
        if self.voxels is None:
            voxels = stored[..., None, None, None].expand(*parts.shape, *self.block)
        elif self.num_blocks == 0:
            voxels = self.voxels.new_zeros(*parts.shape, *self.block)
        else:
            voxels = stored[..., None, None, None] & self.voxels[parts.clamp(min=0)]
        block: Triple = tuple(b * f for b, f in zip(self.block, factors, strict=True))  # type: ignore[assignment]
        voxels = voxels.permute(0, 1, 4, 2, 5, 3, 6).reshape(tables.index.shape[0], *block)
        merged = BlockMask(tables, block, self.shape, None if bool(voxels.all()) else voxels)
        self._merged[factors] = (merged, parts)
        return merged, parts

    def split(self, block: int | Sequence[int]) -> BlockMask:
        """Mask of the same voxels in smaller blocks, with tables of its own.

        Raises:
            ValueError: ``block`` does not divide the present block along every axis.
        """
        sides = triple(block, "block")
        if any(b % s for b, s in zip(self.block, sides, strict=True)):
            raise ValueError(f"block must divide the present block {self.block}, got {block!r}")
        if sides == self.block:
            return self
        if self.voxels is not None:
            return BlockMask.from_voxels(self.to_dense(), sides)
        n, gd, gh, gw = self.tables.grid.shape
        fd, fh, fw = (b // s for b, s in zip(self.block, sides, strict=True))
        cells = self.tables.grid[:, :, None, :, None, :, None].expand(n, gd, fd, gh, fh, gw, fw)
        return BlockMask(BlockTables(cells.reshape(n, gd * fd, gh * fh, gw * fw)), sides, self.shape, None)

    def grow(self, blocks: int | Sequence[int]) -> BlockMask:
        """Mask of all stored blocks, as a whole, and of those at most ``blocks`` away from one along each axis.

        Raises:
            ValueError: blocks at the far faces reach beyond the volume, so that no mask without voxels can hold them.
        """
        steps = triple(blocks, "blocks", minimum=0)
        if any(e % b for e, b in zip(self.shape, self.block, strict=True)):
            raise ValueError(f"the volume {self.shape} must be made of whole blocks {self.block} to let a mask grow")
        # With an axis of channels: without, torch refuses no samples.
        near = torch.nn.functional.max_pool3d(
            self.tables.grid[:, None].float(), [2 * n + 1 for n in steps], stride=1, padding=list(steps)
        )
        return BlockMask(BlockTables(near[:, 0] > 0), self.block, self.shape, None)

    def complement(self) -> BlockMask:
        """Mask of the voxels that are not visible, in blocks of the same shape; its tables are its own."""
        if self.voxels is None:
            return BlockMask(BlockTables(~self.tables.grid), self.block, self.shape, None)
        return BlockMask.from_voxels(~self.to_dense(), self.block)

    def to_dense(self) -> Tensor:
        """[N, 1, D, H, W] bool, True at visible voxels."""
        n, gd, gh, gw = self.tables.grid.shape
        bricks = self.tables.grid[..., None, None, None].expand(n, gd, gh, gw, *self.block).clone()
        if self.voxels is not None:
            bricks[self.tables.grid] = self.voxels
        (bd, bh, bw), (d, h, w) = self.block, self.shape
        dense = bricks.permute(0, 1, 4, 2, 5, 3, 6).reshape(n, gd * bd, gh * bh, gw * bw)
        return dense[:, None, :d, :h, :w]

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device; masks of other resolutions are made anew from it."""
        device = torch.device(device)
        if device == self.device:
            return self
        voxels = None if self.voxels is None else self.voxels.to(device)
        return BlockMask(BlockTables(self.tables.grid.to(device)), self.block, self.shape, voxels)

    def __repr__(self) -> str:
        partial = "" if self.voxels is None else ", partly visible blocks"
        return (
            f"BlockMask(batch={self.batch}, shape={self.shape}, block={self.block}, "
            f"visible blocks {self.num_blocks} of {self.tables.grid.numel()}{partial})"
        )


def _split_blocks(
    volume: Tensor,  # [N, D, H, W]
    block: Triple,
    fill: int | bool = False,
) -> Tensor:
    """Cut into blocks, padding the far faces with ``fill``. Returns: [N, Gd, Gh, Gw, bd, bh, bw]."""
    grid = [-(-e // b) for e, b in zip(volume.shape[1:], block, strict=True)]
    padding = [g * b - e for g, b, e in zip(grid, block, volume.shape[1:], strict=True)]
    padded = torch.nn.functional.pad(volume, (0, padding[2], 0, padding[1], 0, padding[0]), value=fill)
    parts = padded.view(-1, grid[0], block[0], grid[1], block[1], grid[2], block[2])
    return parts.permute(0, 1, 3, 5, 2, 4, 6)


def _any_pool(voxels: Tensor, stride: Triple) -> Tensor:
    """[V, bd, bh, bw] bool -> [V, bd / sd, bh / sh, bw / sw] bool: whether any voxel of each window is True."""
    (v, bd, bh, bw), (sd, sh, sw) = voxels.shape, stride
    return voxels.view(v, bd // sd, sd, bh // sh, sh, bw // sw, sw).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).any(4)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)}"
    return type(value).__name__
