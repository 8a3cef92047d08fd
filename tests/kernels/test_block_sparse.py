"""BlockSparseTensor: conversion, arithmetic, elementwise functions, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from s3d_kernels import BlockMask, BlockSparseTensor

CHANNELS = 5


@pytest.fixture(params=["blocks", "voxels"])
def mask(request: pytest.FixtureRequest) -> BlockMask:
    generator = torch.Generator().manual_seed(0)
    if request.param == "blocks":
        return BlockMask.random(3, (2, 3, 2), 4, (0.2, 1.0), generator)
    return BlockMask.from_voxels(torch.rand(3, 7, 9, 6, generator=generator) < 0.2, 4)


def dense(mask: BlockMask, seed: int = 1) -> torch.Tensor:
    x = torch.randn(mask.batch, CHANNELS, *mask.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(mask.to_dense(), x, float("nan"))


def test_roundtrip_with_fill(mask: BlockMask) -> None:
    x, visible = dense(mask), mask.to_dense()
    sparse = BlockSparseTensor.from_dense(x, mask)
    assert sparse.shape == x.shape
    assert torch.equal(sparse.to_dense(), torch.where(visible, x, 0.0))
    assert torch.equal(sparse.to_dense(fill=-2.5), torch.where(visible, x, -2.5))
    token = torch.randn(CHANNELS)
    assert torch.equal(sparse.to_dense(fill=token), torch.where(visible, x, token.view(1, -1, 1, 1, 1)))
    assert sparse.to_dense().is_contiguous(memory_format=torch.channels_last_3d)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(BlockSparseTensor.from_dense(last, mask).to_dense(), sparse.to_dense())


def test_gradients_of_blocks_and_fill(mask: BlockMask) -> None:
    x, visible = dense(mask).requires_grad_(), mask.to_dense()
    token = torch.randn(CHANNELS, requires_grad=True)
    upstream = torch.randn(x.shape)
    y = BlockSparseTensor.from_dense(x, mask).to_dense(fill=token)
    grad_x, grad_token = torch.autograd.grad(y, [x, token], upstream)
    assert torch.equal(grad_x, torch.where(visible, upstream, 0.0))
    torch.testing.assert_close(grad_token, torch.where(visible, 0.0, upstream).sum((0, 2, 3, 4)))


UNARY: list[Callable[[Any], Any]] = [
    torch.relu,
    F.relu,
    lambda t: F.leaky_relu(t, 0.1),
    lambda t: F.leaky_relu(t * 1, 0.1, inplace=True),
    F.gelu,
    F.silu,
    torch.sigmoid,
    torch.exp,
    torch.abs,
    lambda t: torch.clamp(t, -0.5, 0.5),
    lambda t: t.clamp(max=0.25),
    lambda t: t.relu(),
    lambda t: -t,
    lambda t: 2.0 - t,
    lambda t: 1.0 / (t + 10),
    lambda t: t**2,
    lambda t: t * torch.arange(1.0, 1 + CHANNELS).view(1, -1, 1, 1, 1),
    lambda t: t + torch.arange(1.0, 1 + CHANNELS).view(-1, 1, 1, 1),
    lambda t: torch.mul(t, torch.arange(3.0 * CHANNELS).view(3, CHANNELS, 1, 1, 1)),
    lambda t: F.dropout(t, 0.5, training=False),
    lambda t: torch.where(torch.isnan(t), 0.0, t),
    lambda t: t.to(torch.float64).to(torch.float32),
]


@pytest.mark.parametrize("function", UNARY)
def test_elementwise_functions(function: Callable[[Any], Any], mask: BlockMask) -> None:
    x, visible = dense(mask), mask.to_dense()
    got = function(BlockSparseTensor.from_dense(x, mask))
    assert isinstance(got, BlockSparseTensor)
    torch.testing.assert_close(got.to_dense(), torch.where(visible, function(x), 0.0))


def test_binary_functions_and_in_place_residuals(mask: BlockMask) -> None:
    x, y, visible = dense(mask), dense(mask, 2), mask.to_dense()
    a, b = BlockSparseTensor.from_dense(x, mask), BlockSparseTensor.from_dense(y, mask)
    torch.testing.assert_close((a + b * 2 - a / 3).to_dense(), torch.where(visible, x + y * 2 - x / 3, 0.0))
    torch.testing.assert_close(torch.minimum(a, b).to_dense(), torch.where(visible, torch.minimum(x, y), 0.0))
    out, blocks = a, a.blocks
    out += b
    assert out.blocks is blocks
    torch.testing.assert_close(out.to_dense(), torch.where(visible, x + y, 0.0))


def test_concatenation(mask: BlockMask) -> None:
    x, y = dense(mask), dense(mask, 2)
    a, b = BlockSparseTensor.from_dense(x, mask), BlockSparseTensor.from_dense(y, mask)
    expected = torch.where(mask.to_dense(), torch.cat((x, y), 1), 0.0)
    assert torch.equal(torch.cat((a, b), 1).to_dense(), expected)
    assert torch.equal(torch.cat([a, b], dim=-4).to_dense(), expected)
    with pytest.raises(ValueError, match=r"along channels \(dim=1\) only, got dim=2"):
        torch.cat((a, b), 2)
    with pytest.raises(ValueError, match="same mask"):
        torch.cat((a, x), 1)


def test_dropout(mask: BlockMask) -> None:
    a = BlockSparseTensor.from_dense(torch.ones(3, CHANNELS, *mask.shape), mask)
    values = F.dropout(a, 0.5, training=True).blocks
    assert set(values.unique().tolist()) <= {0.0, 2.0}
    torch.manual_seed(0)
    channels = F.dropout3d(a, 0.5, training=True).to_dense()
    visible = mask.to_dense()
    for sample in range(3):
        kept = [channels[sample, c][visible[sample, 0]].unique().tolist() for c in range(CHANNELS)]
        assert all(len(values) <= 1 for values in kept)
    assert len(channels[visible.expand_as(channels)].unique()) == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda t: F.softmax(t, 2),
        torch.mean,
        lambda t: torch.flip(t, (2,)),
        lambda t: F.interpolate(t, scale_factor=2),
        lambda t: F.conv3d(t, torch.zeros(1, CHANNELS, 1, 1, 1)),
        lambda t: F.layer_norm(t, (1,)),
    ],
)
def test_functions_that_mix_voxels_are_refused(function: Callable[[Any], Any], mask: BlockMask) -> None:
    with pytest.raises(TypeError, match=r"not defined for a BlockSparseTensor: it may mix voxels.*to_dense"):
        function(BlockSparseTensor.from_dense(dense(mask), mask))


def test_refusals_are_clear(mask: BlockMask) -> None:
    x = dense(mask)
    a = BlockSparseTensor.from_dense(x, mask)
    with pytest.raises(AttributeError, match=r"no attribute 'view'.*dense tensor"):
        a.view(-1)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = a.nonsense
    with pytest.raises(ValueError, match="same mask"):
        _ = a + BlockSparseTensor.from_dense(x, BlockMask.from_voxels(mask.to_dense(), 4))
    with pytest.raises(ValueError, match="a dense operand beside a BlockSparseTensor"):
        _ = a + x
    with pytest.raises(ValueError, match="fill must be a number or a vector of 5 channels"):
        a.to_dense(fill=torch.zeros(3))
    with pytest.raises(ValueError, match=r"x must be \[N, C, D, H, W\]"):
        BlockSparseTensor.from_dense(x[:, :, 1:], mask)


@pytest.mark.parametrize(
    "function",
    [
        lambda t, g: t.log() * g,
        lambda t, g: torch.sqrt(t + g),
        lambda t, g: torch.mul(t.log(), g.view(1, -1, 1, 1, 1).expand(3, -1, -1, -1, -1)),
    ],
)
def test_masked_voxels_do_not_reach_gradients_of_channel_operands(
    function: Callable[[Any, torch.Tensor], Any], mask: BlockMask
) -> None:
    x, visible = dense(mask).abs() + 1, mask.to_dense()
    sparse = BlockSparseTensor.from_dense(x, mask)
    variants = [sparse]
    if mask.voxels is not None:
        variants += [sparse.with_blocks(torch.where(mask.voxels[..., None], sparse.blocks, v)) for v in (-5, torch.nan)]
    expected = torch.full((CHANNELS, 1, 1, 1), 0.5, requires_grad=True)
    torch.where(visible, function(torch.where(visible, x, 1.0), expected), 0.0).sum().backward()
    for variant in variants:
        got = torch.full((CHANNELS, 1, 1, 1), 0.5, requires_grad=True)
        function(variant, got).to_dense().sum().backward()
        torch.testing.assert_close(got.grad, expected.grad)


def test_operands_of_a_wrong_size_are_named(mask: BlockMask) -> None:
    a = BlockSparseTensor.from_dense(dense(mask), mask)
    with pytest.raises(ValueError, match=r"with N=3 and C=5 \(or 1\), got \(1, 7, 1, 1, 1\)"):
        _ = a * torch.ones(1, 7, 1, 1, 1)
    with pytest.raises(ValueError, match=r"blocks must have the \d+ rows of mask"):
        BlockSparseTensor(a.blocks[1:], mask)
    with pytest.raises(ValueError, match=r"blocks must be \[V, 4, 4, 4, C\]"):
        BlockSparseTensor(a.blocks[:, 1:], mask)
