"""Norms that wait for what follows: nobody must be able to tell, but by time and memory."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from s3d_kernels import (
    BlockMask,
    BlockSparseTensor,
    SparseBatchNorm3d,
    SparseConv3d,
    SparseInstanceNorm3d,
    to_sparse,
    use_backend,
)

from .test_operators import ON_CPU, able_on_cpu

CHANNELS = 4
MASK = BlockMask.random(2, 3, 4, 0.5, torch.Generator().manual_seed(0))


def features(seed: int = 1) -> BlockSparseTensor:
    x = torch.randn(2, CHANNELS, *MASK.shape, generator=torch.Generator().manual_seed(seed))
    return BlockSparseTensor.from_dense(x.requires_grad_(), MASK)


def norm_layer() -> SparseInstanceNorm3d:
    layer = SparseInstanceNorm3d(CHANNELS, affine=True)
    nn.init.normal_(layer.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(2))
    nn.init.normal_(layer.bias, 0.0, 0.3, generator=torch.Generator().manual_seed(3))
    return layer


def computed_at_once(layer: nn.Module, x: BlockSparseTensor) -> BlockSparseTensor:
    """What the layer gives when nothing waits."""
    return x.with_blocks(layer(x).blocks)


Chain = Callable[[Callable[[BlockSparseTensor], BlockSparseTensor], BlockSparseTensor], BlockSparseTensor]

CHAINS: dict[str, Chain] = {
    "relu": lambda norm, x: F.relu(norm(x)),
    "relu in place": lambda norm, x: F.relu(norm(x), inplace=True),
    "leaky relu": lambda norm, x: F.leaky_relu(norm(x), 0.1),
    "slope above one": lambda norm, x: F.leaky_relu(norm(x), 3.0),
    "negative slope": lambda norm, x: F.leaky_relu(norm(x), -0.5),
    "residual": lambda norm, x: F.leaky_relu(norm(x) + x, 0.1),
    "residual first": lambda norm, x: F.leaky_relu(x + norm(x), 0.1),
    "itself": lambda norm, x: (lambda y: F.relu(y + y))(norm(x)),
    "two norms": lambda norm, x: F.relu(norm(x) + norm(x * 2)),
    "two residuals": lambda norm, x: F.relu(norm(x) + x + x),
    "used twice": lambda norm, x: (lambda y: F.relu(y) * y + F.leaky_relu(y, 0.3))(norm(x)),
    "residual changed in place": lambda norm, x: (
        lambda r: (lambda y: (operator.imul(r, 5), F.relu(y))[1])(norm(x) + r)
    )(x * 1.0),
    "changed after residual": lambda norm, x: operator.imul(F.leaky_relu(norm(x) + x, 0.1), 2),
    "dropout between": lambda norm, x: F.relu(F.dropout(norm(x), 0.0)),
}


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", list(CHAINS))
def test_chains_equal_those_computed_at_once(name: str, backend: str) -> None:
    layer, conv = norm_layer(), SparseConv3d(CHANNELS, 3, 3, padding=1)
    results = []
    with use_backend(backend):
        for norm in (layer, lambda t: computed_at_once(layer, t)):
            x = features()
            y = CHAINS[name](norm, x)
            z = conv(y)
            inputs = [x.blocks, layer.weight, layer.bias, conv.weight, conv.bias]
            results.append([y.blocks.detach().clone(), *torch.autograd.grad(z.blocks.square().sum(), inputs)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_looking_does_not_compute_and_does_not_stop_gradients() -> None:
    network = to_sparse(nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU()))

    def look(module: nn.Module, arguments: object, y: BlockSparseTensor) -> None:
        with torch.no_grad():
            assert y.shape == (2, 4, 12, 12, 12)
            assert (y.dtype, y.device.type, y.is_floating_point()) == (torch.float32, "cpu", True)
            assert y._pending is not None
            y.blocks.sum()

    network[1].register_forward_hook(look)
    network(features()).blocks.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_norm_called_without_gradients_has_none() -> None:
    layer = norm_layer()
    with torch.no_grad():
        y = layer(features())
    assert not F.relu(y).blocks.requires_grad
    assert not y.blocks.requires_grad
    with torch.inference_mode():
        z = layer(features())
    assert torch.equal(F.relu(z).blocks, F.relu(y).blocks)


def test_operands_that_were_modified_behind_our_back_are_an_error() -> None:
    layer = norm_layer()
    for change in ("input", "weight", "residual"):
        x, r = features() * 1.0, features(5) * 1.0
        y = layer(x) + r
        with torch.no_grad():
            {"input": x.blocks, "weight": layer.weight, "residual": r.blocks}[change].mul_(2)
        with pytest.raises(RuntimeError, match=f"the {change} of a normalisation was modified in place"):
            F.relu(y)


def test_input_and_sum_that_are_modified_by_functions_of_the_tensor() -> None:
    layer = norm_layer()
    with torch.no_grad():
        x = features()
        expected = F.relu(computed_at_once(layer, x) + x).blocks
        z = x * 1.0
        y = layer(z) + x
        z *= 3
        assert torch.equal(F.relu(y).blocks, expected)
        z = x * 1.0
        y = layer(z)
        F.relu(z, inplace=True)
        torch.testing.assert_close(F.relu(y + x).blocks, expected)


def test_running_statistics_may_change_before_the_result_is_used() -> None:
    layer = SparseBatchNorm3d(CHANNELS).eval()
    one = BlockSparseTensor.from_dense(torch.randn(1, CHANNELS, 8, 8, 8), BlockMask.random(1, 2, 4, 0.5))
    expected = layer(one).blocks
    y = layer(one)
    layer.train()(one)
    assert torch.equal(y.blocks, expected)


def test_features_whose_origin_changed_are_not_computed_again() -> None:
    conv, layer = SparseConv3d(CHANNELS, 3, 3, padding=1), norm_layer()
    x = features() * 1.0
    y = F.leaky_relu(layer(x))
    expected = torch.autograd.grad(conv(y).blocks.square().sum(), conv.weight, retain_graph=True)[0]
    x += torch.randn(4, 1, 1, 1)
    got = torch.autograd.grad(conv(y).blocks.square().sum(), conv.weight)[0]
    torch.testing.assert_close(got, expected)


def test_minus_infinity_and_zero() -> None:
    layer = norm_layer()
    for backend in able_on_cpu():
        with use_backend(backend):
            x = features()
            y = F.relu(layer(x) + BlockSparseTensor(torch.full_like(x.blocks, -torch.inf), MASK))
            assert torch.equal(y.blocks, torch.zeros_like(x.blocks))


def test_an_activation_that_needs_torch_s_own_argument_names() -> None:
    y = norm_layer()(features())
    assert torch.equal(torch.relu(input=y).blocks, F.relu(input=features_like(y)).blocks)


def features_like(y: BlockSparseTensor) -> BlockSparseTensor:
    return y.with_blocks(y.blocks)


def test_leaky_relu_with_an_underscore_is_in_place() -> None:
    y = norm_layer()(features())
    with torch.no_grad():
        z = F.leaky_relu_(y, 0.1)
    assert torch.equal(y.blocks, z.blocks)
    assert float(y.blocks.detach().min()) > -1


def test_checkpointing_of_finished_features() -> None:
    layer, conv = norm_layer(), SparseConv3d(CHANNELS, 3, 3, padding=1)
    gradients = []
    for kept in (False, True):
        y = layer(features())
        y.blocks  # noqa: B018  # as docs/backends.md says
        z = conv(y).blocks if kept else checkpoint(lambda t: conv(t).blocks, y, use_reentrant=False)
        gradients.append(torch.autograd.grad(z.square().sum(), [layer.weight, conv.weight]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# Dynamo itself reads .grad of what it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_an_eager_norm_before_a_compiled_convolution() -> None:
    layer, conv = norm_layer(), SparseConv3d(CHANNELS, 3, 3, padding=1)
    compiled = torch.compile(lambda t: conv(t).blocks, fullgraph=True, backend="aot_eager")
    y = F.leaky_relu(layer(features()))
    torch.testing.assert_close(compiled(y), conv(y).blocks)


class _Stop(torch.autograd.Function):
    """The identity, without gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


def test_no_gradient_comes_from_what_follows() -> None:
    layer, x = norm_layer(), features()
    _Stop.apply(F.leaky_relu(layer(x), 0.1).blocks).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
