"""BlockMask: constructors, tables, resolutions."""

from __future__ import annotations

import gc
import math
import weakref

import oracle
import pytest
import torch

from s3d_kernels import BlockMask, BlockSparseTensor, functional
from s3d_kernels.backends import WindowGeometry
from s3d_kernels.block_mask import Triple


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.6, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("grid", [(5, 5, 5), (4, 5, 5), (1, 2, 3)])
def test_random_masks_the_floor_of_ratio_times_cells(ratio: float, grid: tuple[int, int, int]) -> None:
    mask = BlockMask.random(3, grid, 4, ratio, generator())
    cells = math.prod(grid)
    expected = cells - math.floor(round(ratio * 100) * cells / 100)
    assert mask.tables.grid.flatten(1).sum(1).tolist() == [expected] * 3
    assert mask.shape == tuple(4 * g for g in grid)


def test_29_of_100_is_29() -> None:
    assert BlockMask.random(1, (4, 5, 5), 1, 0.29).num_blocks == 71


def test_random_is_reproducible_and_samples_differ() -> None:
    a, b, c = (BlockMask.random(2, 4, 8, 0.5, generator(seed)).tables.grid for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a[0], a[1])


def test_range_of_ratios() -> None:
    per_sample = BlockMask.random(50, 5, 1, (0.6, 0.9), generator()).tables.grid.flatten(1).sum(1)
    assert 12 <= per_sample.min() < per_sample.max() <= 50
    per_batch = BlockMask.random(50, 5, 1, (0.6, 0.9), generator(), per_sample=False).tables.grid.flatten(1).sum(1)
    assert per_batch.min() == per_batch.max()


@pytest.mark.parametrize("ratio", [-0.1, 1.1, (0.9, 0.6), (0.5, 1.5)])
def test_bad_ratio_is_named(ratio: float | tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="ratio must be in"):
        BlockMask.random(1, 2, 4, ratio)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"visible must be a bool tensor \[N, Gd, Gh, Gw\], got torch.float32"):
        BlockMask.from_grid(torch.zeros(1, 2, 2, 2), 4)
    with pytest.raises(ValueError, match="block must be an integer or three integers >= 1, got 0"):
        BlockMask.from_grid(torch.zeros(1, 2, 2, 2, dtype=torch.bool), 0)
    with pytest.raises(ValueError, match=r"visible must be a bool tensor \[N, D, H, W\]"):
        BlockMask.from_voxels(torch.zeros(2, 2, 4, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="grid must be an integer or three"):
        BlockMask.random(1, (2, 2), 4, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch must be at least 1"):
        BlockMask.random(0, 2, 4, 0.5)


@pytest.mark.parametrize("radius", [(1, 1, 1), (2, 1, 3)])
def test_neighbour_table(radius: tuple[int, int, int]) -> None:
    grid = torch.rand(3, 4, 3, 5, generator=generator()) < 0.4
    grid[1] = False
    mask = BlockMask.from_grid(grid, 2)
    table = mask.neighbours(radius)
    assert table.dtype == torch.int32
    assert table.tolist() == oracle.neighbour_table(grid, radius)
    # table[i, t] = j exactly when table[j, T - 1 - t] = i, in both directions.
    row, column = (table >= 0).nonzero().unbind(1)
    back = table[table[row, column].long(), table.shape[1] - 1 - column]
    assert torch.equal(back.long(), row)
    assert torch.equal(table[:, table.shape[1] // 2].long(), torch.arange(len(table)))


def test_rows_are_sorted_by_sample() -> None:
    grid = torch.rand(4, 3, 3, 3, generator=generator()) < 0.4
    grid[2] = False
    mask = BlockMask.from_grid(grid, 4)
    assert mask.index.tolist() == sorted(mask.index.tolist())
    offsets = mask.sample_offsets.tolist()
    assert offsets[0] == 0
    assert offsets[-1] == mask.num_blocks == int(grid.sum())
    for sample in range(4):
        assert (mask.index[offsets[sample] : offsets[sample + 1], 0] == sample).all()
    assert offsets[2] == offsets[3]
    assert mask.visible_voxels().tolist() == (grid.flatten(1).sum(1) * 64).tolist()


@pytest.mark.parametrize("size", [(8, 8, 8), (9, 10, 7), (3, 17, 1)])
@pytest.mark.parametrize("block", [1, 4, (1, 4, 2)])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_voxel_masks_are_exact(size: tuple[int, int, int], block: int | tuple[int, int, int], share: float) -> None:
    visible = torch.rand(2, *size, generator=generator()) < share
    mask = BlockMask.from_voxels(visible, block)
    assert torch.equal(mask.to_dense()[:, 0], visible)
    assert mask.shape == size
    assert mask.visible_voxels().tolist() == visible.flatten(1).sum(1).tolist()
    assert torch.equal(BlockMask.from_voxels(visible[:, None], block).to_dense(), mask.to_dense())


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (3, 2, 1)])
@pytest.mark.parametrize("block", [8, 4, 1, 3, (1, 4, 2)])
def test_downsample(stride: tuple[int, int, int], block: int | tuple[int, int, int]) -> None:
    grid = torch.rand(2, 3, 2, 4, generator=generator()) < 0.4
    mask = BlockMask.from_grid(grid, block)
    coarse = mask.downsample(stride)
    assert torch.equal(coarse.to_dense(), oracle.downsample(mask.to_dense(), stride))
    assert coarse is mask.downsample(stride)


@pytest.mark.parametrize("block", [4, 2, 1])
def test_downsample_of_voxel_masks(block: int) -> None:
    mask = BlockMask.from_voxels(torch.rand(2, 9, 10, 7, generator=generator()) < 0.1, block)
    expected = mask.to_dense()
    for _ in range(4):
        mask, expected = mask.downsample(2), oracle.downsample(expected, (2, 2, 2))
        assert torch.equal(mask.to_dense(), expected)
    assert mask.shape == (1, 1, 1)


def test_tables_are_shared_down_to_single_voxels_and_merged_beyond() -> None:
    mask = BlockMask.random(1, 4, 8, 0.8, generator())
    level = mask
    for side in (4, 2, 1):
        level = level.downsample(2)
        assert level.block == (side,) * 3
        assert level.tables is mask.tables
    beyond = level.downsample(2)
    assert beyond.tables is not mask.tables
    assert beyond.block == (1, 1, 1)
    assert beyond.voxels is None


def test_upsample_and_to() -> None:
    mask = BlockMask.from_voxels(torch.rand(2, 6, 4, 4, generator=generator()) < 0.3, 2)
    assert torch.equal(mask.upsample((2, 1, 3)).to_dense(), oracle.upsample(mask.to_dense(), (2, 1, 3)))
    assert mask.to("cpu") is mask
    assert mask.same_layout(mask)
    assert not mask.same_layout(BlockMask.from_voxels(mask.to_dense(), 2))
    aligned = BlockMask.random(1, 2, 4, 0.5)
    assert aligned.downsample(2).upsample(2).same_layout(aligned)


def test_complement() -> None:
    aligned = BlockMask.random(3, (2, 3, 2), (4, 2, 8), (0.0, 1.0), generator())
    partly = BlockMask.from_voxels(torch.rand(2, 9, 10, 7, generator=generator()) < 0.4, (4, 1, 2))
    for mask in (aligned, partly, BlockMask.random(2, 2, 4, 0.0), BlockMask.random(2, 2, 4, 1.0)):
        rest = mask.complement()
        assert torch.equal(rest.to_dense(), ~mask.to_dense())
        assert (rest.block, rest.shape) == (mask.block, mask.shape)
    assert aligned.complement().voxels is None


def test_layers_that_are_alike_share_their_windows_and_others_do_not() -> None:
    mask, other = BlockMask.random(1, 3, 4, 0.5, generator(0)), BlockMask.random(1, 3, 4, 0.5, generator(1))
    three, one = (3, 3, 3), (1, 1, 1)

    def windows(target: BlockMask, kernel_size: Triple = three, stride: Triple = one) -> WindowGeometry:
        return functional._window_geometry(mask, target, kernel_size, stride, tuple(k // 2 for k in kernel_size))

    first = windows(mask)
    assert windows(mask) is first
    assert windows(mask, (5, 3, 3)).kernel_size == (5, 3, 3)
    half = windows(mask.downsample(2), stride=(2, 2, 2))
    assert half.target_block == (2, 2, 2)
    assert windows(mask.downsample(2), stride=(2, 2, 2)) is half
    assert windows(other).target_index is other.index
    assert windows(mask).target_index is mask.index
    with torch.inference_mode():
        table = windows(mask, (11, 11, 11)).table
    assert table.is_inference()
    assert not windows(mask, (11, 11, 11)).table.is_inference()


def test_kept_windows_do_not_keep_their_mask() -> None:
    mask = BlockMask.random(1, 2, 4, 0.5)
    functional._window_geometry(mask, mask, (3, 3, 3), (1, 1, 1), (1, 1, 1))
    functional._window_geometry(mask, mask.downsample(2), (3, 3, 3), (2, 2, 2), (1, 1, 1))
    gc.disable()
    try:
        gone = weakref.ref(mask)
        del mask
        assert gone() is None
    finally:
        gc.enable()


def test_a_volume_that_does_not_fit_is_refused_again_and_again() -> None:
    mask = BlockMask.random(1, 1, 5, 0.0)
    x = BlockSparseTensor(torch.zeros(1, 5, 5, 5, 2), mask)
    weight = torch.zeros(2, 2, 2, 2, 2)
    functional.sparse_conv3d(x, weight, padding="same")
    for _ in range(2):
        with pytest.raises(ValueError, match="a last incomplete window would be dropped"):
            functional.sparse_conv3d(x, weight, stride=2)
