"""Masks of a run and the loss over them."""

import pytest
import torch

from s3d.loss import masked_mse, masked_voxels, visible_mean_mse
from s3d.masking import MaskSampler
from s3d_kernels import BlockMask


def test_a_step_has_one_mask_and_steps_differ() -> None:
    sampler = MaskSampler((64, 64, 64), 16, 0.75, seed=5)
    first, again, other = sampler(2, 7), sampler(2, 7), sampler(2, 8)
    assert torch.equal(first.tables.grid, again.tables.grid)
    assert not torch.equal(first.tables.grid, other.tables.grid)
    assert first.tables.grid.shape == (2, 4, 4, 4)
    assert (first.tables.grid.flatten(1).sum(1) == 16).all()
    assert not torch.equal(first.tables.grid, MaskSampler((64, 64, 64), 16, 0.75, seed=6)(2, 7).tables.grid)


def test_a_range_of_ratios_is_drawn_for_each_sample() -> None:
    counts = MaskSampler((160, 160, 160), 32, (0.6, 0.9), seed=0)(64, 0).tables.grid.flatten(1).sum(1)
    assert counts.min() >= 12
    assert counts.max() <= 50
    assert len(counts.unique()) > 10


def test_patch_must_be_a_multiple_of_the_block() -> None:
    with pytest.raises(ValueError, match="patch_size must be a multiple of mask_block=32"):
        MaskSampler((160, 150, 160), 32, 0.75, seed=0)


def test_loss_sees_masked_voxels_only() -> None:
    mask = MaskSampler((16, 16, 16), 8, 0.5, seed=0)(2, 0)
    visible = mask.to_dense()
    target = torch.randn(2, 1, 16, 16, 16)
    guess = torch.randn(2, 1, 16, 16, 16)
    expected = ((guess - target)[~visible] ** 2).mean()
    torch.testing.assert_close(masked_mse(guess, target, mask), expected)
    spoiled = torch.where(visible, float("nan"), guess)
    torch.testing.assert_close(masked_mse(spoiled, target, mask), expected)


def test_loss_of_the_visible_mean() -> None:
    mask = MaskSampler((16, 16, 16), 8, 0.5, seed=0)(2, 0)
    visible = mask.to_dense()
    target = torch.randn(2, 1, 16, 16, 16) + torch.tensor([3.0, -5.0]).view(2, 1, 1, 1, 1)
    errors = [((t[~v] - t[v].mean()) ** 2) for t, v in zip(target, visible, strict=True)]
    torch.testing.assert_close(visible_mean_mse(target, mask), torch.cat(errors).mean())


def test_nothing_masked_is_no_loss() -> None:
    mask = BlockMask.random(1, 2, 4, 0.0)
    target = torch.randn(1, 1, 8, 8, 8)
    assert masked_mse(target + 1, target, mask) == 0


def test_loss_leaves_out_what_is_not_valid() -> None:
    """Recomputed by hand; what the target holds there, NaN included, changes nothing. A count divides instead."""
    generator = torch.Generator().manual_seed(0)
    target, guess = torch.randn(2, 2, 1, 8, 8, 8, generator=generator).unbind(0)
    mask = BlockMask.random(2, 2, 4, 0.5, generator)
    valid = torch.rand(2, 1, 8, 8, 8, generator=generator) < 0.7
    taken = ~mask.to_dense() & valid
    squares = (guess - target)[taken].square()
    spoiled = torch.where(valid, target, float("nan"))
    torch.testing.assert_close(masked_mse(guess, spoiled, mask, valid), squares.mean())
    torch.testing.assert_close(masked_mse(guess, spoiled, mask, valid, count=100.0), squares.sum() / 100)
    assert masked_voxels(mask, valid) == taken.sum()
    assert masked_voxels(mask) == (~mask.to_dense()).sum()
