"""What convolutions make of a constant volume."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s3d_kernels.background import Background

SHAPES = [(9, 8, 7), (1, 9, 2), (3, 5, 4), (6, 1, 1), (2, 2, 2), (12, 3, 12)]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("kernels", [[(3, 3, 3)], [(3, 3, 3)] * 2, [(1, 3, 3), (5, 3, 1)], [(1, 1, 1)]], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolutions_of_a_constant(shape: tuple[int, int, int], kernels: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(0)
    vector = draw(3).requires_grad_()
    background = Background.constant(vector, shape)
    dense = vector.view(1, 3, 1, 1, 1).expand(2, 3, *shape)
    operands = [vector]
    for kernel in kernels:
        weight, bias = draw(3, 3, *kernel).requires_grad_(), draw(3).requires_grad_()
        operands += [weight, bias]
        background = background.conv3d(weight, bias)
        dense = F.conv3d(dense, weight, bias, padding=[k // 2 for k in kernel])
    assert background.to_dense().shape == (3, *shape)
    torch.testing.assert_close(background.to_dense().expand(2, 3, *shape), dense)
    torch.testing.assert_close(background.centre, dense[0, :, shape[0] // 2, shape[1] // 2, shape[2] // 2])

    # In the volume: the centre everywhere, then the border.
    volume = draw(2, *shape, 3).requires_grad_()
    got = background.add_border(volume + background.centre)
    expected = volume + dense.permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(got, expected)
    seed = draw(*got.shape)
    for a, b in zip(
        torch.autograd.grad(got, [volume, *operands], seed, allow_unused=True),
        torch.autograd.grad(expected, [volume, *operands], seed),
        strict=True,
    ):
        assert a is not None
        torch.testing.assert_close(a, b)


def test_what_is_stored_does_not_grow_with_the_volume() -> None:
    weight = torch.ones(1, 1, 3, 3, 3)
    background = Background.constant(torch.ones(1), (100, 100, 2)).conv3d(weight)
    assert background.values.shape == (1, 3, 3, 2)
    assert [background.values[0, z, y, 0].item() for z, y in itertools.product((0, 1), (0, 1))] == [8, 12, 12, 18]


def test_two_backgrounds_as_one() -> None:
    shape = (7, 6, 5)
    thin, thick = Background.constant(draw(2), shape), Background.constant(draw(3), shape)
    thick = thick.conv3d(draw(3, 3, 3, 3, 3))
    torch.testing.assert_close(thin.cat(thick).to_dense(), torch.cat([thin.to_dense(), thick.to_dense()]))
    torch.testing.assert_close(thick.cat(thin).to_dense(), torch.cat([thick.to_dense(), thin.to_dense()]))


def test_even_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^weight must be .* with odd sides, got \(3, 2, 3, 2, 3\)"):
        Background.constant(draw(2), (7, 6, 5)).conv3d(draw(3, 2, 3, 2, 3))
