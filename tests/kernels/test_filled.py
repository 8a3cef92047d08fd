"""Features that are known except around visible voxels, and what they need: larger masks, smaller blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, backends, sparse_conv3d
from s3d_kernels.background import Background
from s3d_kernels.filled import FilledTensor

MASKS: dict[str, Callable[[], BlockMask]] = {
    "half": lambda: BlockMask.random(2, (2, 3, 2), 8, 0.5, torch.Generator().manual_seed(0)),
    "unequal": lambda: BlockMask.random(3, (2, 2, 3), 4, (0.2, 0.9), torch.Generator().manual_seed(1)),
    "anisotropic": lambda: BlockMask.random(2, (3, 2, 2), (2, 4, 8), 0.6, torch.Generator().manual_seed(2)),
    "nothing visible": lambda: BlockMask.random(2, 2, 4, 1.0),
    "everything visible": lambda: BlockMask.random(2, 2, 4, 0.0),
    "one empty sample": lambda: BlockMask.from_grid(
        torch.stack([torch.zeros(2, 2, 2, dtype=torch.bool), torch.eye(2, dtype=torch.bool).expand(2, 2, 2)]), 4
    ),
}
mask_names = pytest.mark.parametrize("name", MASKS)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


@mask_names
def test_smaller_blocks_are_the_same_voxels(name: str) -> None:
    mask = MASKS[name]()
    x = draw(mask.batch, 3, *mask.shape).requires_grad_()
    features = BlockSparseTensor.from_dense(x, mask)
    fine = features.split((1, 2, 4))
    assert fine.mask.block == (1, 2, 4)
    assert torch.equal(fine.mask.to_dense(), mask.to_dense())
    assert torch.equal(fine.to_dense(), features.to_dense())
    seed = draw(*x.shape)
    (got,) = torch.autograd.grad(fine.to_dense(), x, seed)
    assert torch.equal(got, torch.where(mask.to_dense(), seed, 0))
    assert features.split(mask.block) is features


def test_smaller_blocks_of_voxel_masks() -> None:
    torch.manual_seed(0)
    mask = BlockMask.from_voxels(torch.rand(2, 8, 8, 8) < 0.05, 8)
    x = draw(2, 3, *mask.shape).requires_grad_()
    fine = BlockSparseTensor.from_dense(x, mask).split(2)
    assert fine.mask.num_blocks < 64 * mask.num_blocks  # parts without a visible voxel are not stored
    assert torch.equal(fine.mask.to_dense(), mask.to_dense())
    shown = torch.where(mask.to_dense(), x, 0)
    assert torch.equal(fine.to_dense(), shown)
    (got,) = torch.autograd.grad(fine.to_dense().square().sum(), x)
    assert torch.equal(got, 2 * shown)


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block must divide the present block \(8, 8, 8\), got 3"):
        MASKS["half"]().split(3)


@mask_names
def test_a_mask_grows_by_whole_blocks(name: str) -> None:
    mask = MASKS[name]()
    near = F.max_pool3d(mask.tables.grid.double(), (3, 1, 5), 1, (1, 0, 2)) > 0
    assert torch.equal(mask.grow((1, 0, 2)).tables.grid, near)
    with pytest.raises(ValueError, match="must be made of whole blocks"):
        BlockMask.from_voxels(torch.ones(1, 5, 4, 4, dtype=torch.bool), 4).grow(1)


def test_no_samples_grow() -> None:
    mask = BlockMask.from_grid(torch.ones(0, 2, 3, 2, dtype=torch.bool), 4)
    assert mask.grow(1).tables.grid.shape == (0, 2, 3, 2)


@pytest.mark.parametrize("backend", list(REGISTRY))
@mask_names
def test_output_in_other_blocks_than_the_input(name: str, backend: str) -> None:
    """The oracle is the dense convolution of the visible voxels, cut out where output is wanted."""
    mask = MASKS[name]()
    problem = backends.ConvProblem("cpu", torch.float32, 5, 7, 1, (3, 3, 3), (1, 1, 1), (1, 1, 1), mask.block, False)
    reason = REGISTRY[backend].why_not(problem)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    # Larger, and elsewhere: some blocks of the input have no output.
    for target in (mask.grow(1), BlockMask.from_grid(~mask.tables.grid, mask.block)):
        x, weight, bias = draw(mask.batch, 5, *mask.shape), draw(7, 5, 3, 3, 3), draw(7)
        seed = draw(mask.batch, 7, *mask.shape)
        results = []
        for dtype in (torch.float64, torch.float32):
            operands = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
            if dtype == torch.float64:
                dense = F.conv3d(torch.where(mask.to_dense(), operands[0], 0), *operands[1:], padding=1)
                y = torch.where(target.to_dense(), dense, 0)
            else:
                source = BlockSparseTensor.from_dense(operands[0], mask)
                y = sparse_conv3d(source, *operands[1:], 1, 1, backend=backend, target=target).to_dense()
            results.append([y, *torch.autograd.grad(y, operands, seed.to(dtype))])
        for i, (truth, got) in enumerate(zip(*results, strict=True)):
            assert (got.double() - truth).norm() <= 1e-5 * truth.norm(), i


def test_targets_elsewhere_are_refused() -> None:
    mask = MASKS["half"]()
    x = BlockSparseTensor.from_dense(draw(2, 3, *mask.shape), mask)
    with pytest.raises(ValueError, match="target must lie on the grid of blocks of"):
        sparse_conv3d(x, draw(2, 3, 3, 3, 3), None, 1, 1, target=mask.split(4))


def test_targets_of_other_volumes_with_as_many_blocks_are_refused() -> None:
    """A last block may reach beyond the volume."""
    mask = BlockMask.from_voxels(torch.ones(1, 5, 4, 4, dtype=torch.bool), 4)
    x = BlockSparseTensor.from_dense(draw(1, 3, *mask.shape), mask)
    with pytest.raises(ValueError, match="target must lie on the grid of blocks of"):
        sparse_conv3d(x, draw(2, 3, 3, 3, 3), None, 1, 1, target=BlockMask.random(1, (2, 1, 1), 4, 0.0))


@pytest.mark.parametrize("kernels", [[(3, 3, 3)], [(3, 3, 3)] * 3, [(1, 3, 5), (3, 1, 1)]], ids=str)
@pytest.mark.parametrize("tile", [2, 4])
@mask_names
def test_convolutions_of_filled_volumes(name: str, tile: int, kernels: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(0)
    mask = MASKS[name]()
    tiles = tuple(min(tile, b) for b in mask.block)
    x, fill = draw(mask.batch, 3, *mask.shape).requires_grad_(), draw(3).requires_grad_()
    dense = torch.where(mask.to_dense(), x, fill.view(1, 3, 1, 1, 1))
    difference = BlockSparseTensor.from_dense(x - fill.view(1, 3, 1, 1, 1), mask)
    filled = FilledTensor(difference.split(tiles), Background.constant(fill, mask.shape))
    torch.testing.assert_close(filled.to_dense(), dense)
    operands = [x, fill]
    stored = []
    for kernel in kernels:
        weight, bias = draw(3, 3, *kernel).requires_grad_(), draw(3).requires_grad_()
        operands += [weight, bias]
        dense = F.conv3d(dense, weight, bias, padding=[k // 2 for k in kernel])
        filled = filled.conv3d(weight, bias)
        stored.append(filled.correction.mask.num_blocks)
        torch.testing.assert_close(filled.to_dense(), dense)
    if len(kernels) == 3 and tile == 4 and min(mask.block) >= 4:
        assert len(set(stored)) == 1  # three shells of one voxel fit into one of tiles
    seed = draw(*dense.shape)
    got, truth = (torch.autograd.grad(y, operands, seed) for y in (filled.to_dense(), dense))
    for i, (a, b) in enumerate(zip(got, truth, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda text, i=i: f"operand {i}: {text}")


def test_what_lies_at_masked_voxels_of_stored_blocks_means_nothing() -> None:
    torch.manual_seed(0)
    mask = BlockMask.from_voxels(torch.rand(2, 8, 8, 8) < 0.3, 4)
    assert mask.voxels is not None
    x, fill = draw(mask.batch, 3, *mask.shape).requires_grad_(), draw(3)
    dense = torch.where(mask.to_dense(), x, fill.view(1, 3, 1, 1, 1))
    blocks = BlockSparseTensor.from_dense(x - fill.view(1, 3, 1, 1, 1), mask).blocks
    spoilt = torch.where(mask.voxels[..., None], blocks, torch.nan).detach().requires_grad_()
    filled = FilledTensor(BlockSparseTensor(spoilt, mask), Background.constant(fill, mask.shape))
    torch.testing.assert_close(filled.to_dense(), dense)
    (grad,) = torch.autograd.grad(filled.to_dense().sum(), spoilt)
    assert torch.equal(grad, mask.voxels[..., None].expand_as(grad).to(grad.dtype))


def test_volumes_that_do_not_fit_are_refused() -> None:
    mask = BlockMask.from_voxels(torch.ones(1, 5, 4, 4, dtype=torch.bool), 4)
    x = BlockSparseTensor.from_dense(draw(1, 3, *mask.shape), mask)
    with pytest.raises(ValueError, match=r"^correction must be of volumes that are made of whole blocks"):
        FilledTensor(x, Background.constant(draw(3), mask.shape))
    with pytest.raises(ValueError, match=r"^background must be of the volume \(5, 4, 4\) of correction"):
        FilledTensor(x.split((1, 4, 4)), Background.constant(draw(3), (8, 4, 4)))


def test_volumes_of_another_shape_are_not_added_to() -> None:
    mask = MASKS["half"]()
    filled = FilledTensor(
        BlockSparseTensor.from_dense(draw(2, 3, *mask.shape), mask), Background.constant(draw(3), mask.shape)
    )
    with pytest.raises(ValueError, match=r"^volume must be \[2, 16, 24, 16, 3\], got \[3, 16, 24, 16, 3\]"):
        filled.add_beyond_centre(draw(3, *mask.shape, 3))
