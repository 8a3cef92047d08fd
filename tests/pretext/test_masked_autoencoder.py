"""S3D behind the interface of methods: what it shows, what it wants, and that it is what the paper defines."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import configure

from s3d.loss import block_normalized
from s3d.pretext.masked_autoencoder import MaskedAutoencoder, MaskedProblem
from s3d.pretext.method import Draw
from s3d.pretext.registry import METHODS
from s3d_kernels import BlockMask


def problem(first: int = 0, wanted: int = 2, step: int = 3) -> MaskedProblem:
    image = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    method = MaskedAutoencoder(configure(None, Path(), patch_size=(16, 16, 16), mask_block=4))
    return method.pose(image[first : first + wanted], None, Draw(0, (0, step), 2, first, wanted))


def test_problems_depend_on_seed_step_and_sample_alone() -> None:
    whole = problem()
    assert torch.equal(whole.mask.to_dense(), problem().mask.to_dense())
    assert not torch.equal(whole.mask.to_dense(), problem(step=4).mask.to_dense())
    second = problem(first=1, wanted=1)
    assert torch.equal(whole.mask.to_dense()[1:], second.mask.to_dense())


def test_generators_are_those_of_the_samples() -> None:
    both = [generator.random(3) for generator in Draw(0, (0, 5), 2, 0, 2).generators()]
    (second,) = Draw(0, (0, 5), 2, 1, 1).generators()
    np.testing.assert_array_equal(second.random(3), both[1])
    assert not np.array_equal(*both)


def test_terms_are_the_masked_voxels() -> None:
    posed = problem()
    masked = 2 * math.floor(0.75 * 64) * 4**3
    assert posed.masked == masked == int((~posed.mask.to_dense()).sum())


def test_loss_is_the_mean_over_all_parts() -> None:
    method = MaskedAutoencoder(configure(None, Path(), patch_size=(16, 16, 16), mask_block=4))
    whole, parts = problem(), [problem(0, 1), problem(1, 1)]
    terms = method.terms(whole)
    answers = torch.randn(whole.image.shape, generator=torch.Generator().manual_seed(1))
    by_parts = sum(method.loss(answers[i : i + 1], part, terms) for i, part in enumerate(parts))
    masked = ~whole.mask.to_dense()
    expected = (answers - whole.image)[masked].square().mean()
    torch.testing.assert_close(method.loss(answers, whole, terms), expected)
    torch.testing.assert_close(torch.as_tensor(by_parts), expected)


def test_block_normalized_targets_by_hand() -> None:
    target = torch.arange(2 * 2 * 4, dtype=torch.float32).reshape(1, 1, 2, 2, 4)
    mask = BlockMask.from_grid(torch.tensor([True, False]).reshape(1, 1, 1, 2), 2)
    normalized = block_normalized(target, mask)
    for block in (slice(0, 2), slice(2, 4)):
        values = target[..., block]
        expected = (values - values.mean()) / torch.sqrt(values.var(correction=0) + 1e-6)
        torch.testing.assert_close(normalized[..., block], expected)
    assert float(normalized[..., 2:].mean()) == pytest.approx(0, abs=1e-6)


def test_voxels_that_are_not_valid_do_not_count_in_block_normalized_targets() -> None:
    target = torch.randn(1, 1, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    mask = BlockMask.from_grid(torch.tensor([True, False]).reshape(1, 1, 1, 2), 2)
    valid = torch.ones(1, 1, 2, 2, 4, dtype=torch.bool)
    torch.testing.assert_close(block_normalized(target, mask, valid), block_normalized(target, mask))
    valid[..., 2] = False
    disturbed = torch.where(valid, target, 1e3)
    normalized = block_normalized(disturbed, mask, valid)
    values = target[..., 3]
    expected = (values - values.mean()) / torch.sqrt(values.var(correction=0) + 1e-6)
    torch.testing.assert_close(normalized[..., 3], expected)
    assert block_normalized(target, mask, torch.zeros_like(valid)).isfinite().all()


def test_unknown_methods_and_settings_that_go_with_others_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"method must be one of s3d, .*got 'magic'"):
        configure(None, tmp_path, method="magic")
    for name in METHODS.keys() - {"s3d"}:
        with pytest.raises(ValueError, match=f"densify goes with method s3d, not with {name}"):
            configure(None, tmp_path, method=name, densify=False)
