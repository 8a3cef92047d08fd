"""to_sparse: what it keeps, what it refuses, and whole encoders against a dense masked oracle."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
import torch._dynamo.testing
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import Tensor, nn

from s3d_kernels import BlockMask, BlockSparseTensor, SparseConv3d, to_sparse, use_backend

from .test_operators import able_on_cpu


def build_encoder(kernel: Any = 3, strides: Any = (1, 2, 2, 2, 2, 2)) -> nn.Module:
    torch.manual_seed(0)
    stages = len(strides)
    return ResidualEncoderUNet(
        input_channels=1,
        n_stages=stages,
        features_per_stage=[4, 6, 8, 8, 8, 8][:stages],
        conv_op=nn.Conv3d,
        kernel_sizes=kernel,
        strides=list(strides),
        n_blocks_per_stage=[1, 2, 1, 1, 1, 1][:stages],
        num_classes=1,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    ).encoder


@contextmanager
def densely_masked(encoder: nn.Module, mask: Tensor) -> Iterator[None]:
    """Give the layers of a plain encoder the oracle's meaning, for volumes masked by `mask` [N, 1, D, H, W]."""
    levels = {tuple(mask.shape[2:]): mask}

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        shown = levels[tuple(x.shape[2:])]
        if isinstance(layer, nn.Conv3d):
            stride: Any = layer.stride
            y = oracle.conv3d(x, shown, layer.weight, layer.bias, stride, layer.padding, layer.groups)
        elif isinstance(layer, nn.AvgPool3d):
            stride = tuple(layer.kernel_size) if not isinstance(layer.kernel_size, int) else (layer.kernel_size,) * 3
            y = oracle.pool3d(x, shown, "avg", stride, stride, (0, 0, 0), True)
        else:
            return oracle.norm(x, shown, layer.weight, layer.bias, layer.eps, layer.num_features)
        levels[tuple(y.shape[2:])] = oracle.downsample(shown, stride)
        return y

    layers = [m for m in encoder.modules() if isinstance(m, nn.Conv3d | nn.AvgPool3d | nn.InstanceNorm3d)]
    for layer in layers:
        layer.forward = lambda x, layer=layer: forward(layer, x)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _masks() -> dict[str, tuple[BlockMask, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    return {
        "block 32 to 1, non-cubic, unequal": (BlockMask.random(2, (2, 3, 2), 32, (0.4, 0.8), generator), {}),
        "block 16, merging": (BlockMask.random(2, (4, 2, 2), 16, (0.4, 0.8), generator), {}),
        "anisotropic": (
            BlockMask.random(2, (4, 3, 2), (2, 8, 8), 0.6, generator),
            {"kernel": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [1, [1, 2, 2], [1, 2, 2], [2, 2, 2]]},
        ),
        "voxels": (
            BlockMask.from_voxels(torch.rand(2, 16, 24, 16, generator=generator) < 0.15, 8),
            {"strides": (1, 2, 2, 2)},
        ),
    }


@functools.cache
def dense_results(name: str, dtype: torch.dtype, nudge: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the plain encoder under the oracle's meaning, of an input that is off by a rounding."""
    mask, plan = _masks()[name]
    encoder = build_encoder(**plan).to(dtype)
    x = torch.randn(mask.batch, 1, *mask.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if nudge:
        x = x * (1 + torch.finfo(dtype).eps * torch.randn(x.shape, generator=torch.Generator().manual_seed(nudge)))
    with densely_masked(encoder, mask.to_dense()):
        outputs = encoder(x)
    return backward(encoder, outputs)


def sparse_results(name: str, dtype: torch.dtype, backend: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the converted encoder, with NaN at every masked voxel of the input."""
    mask, plan = _masks()[name]
    encoder = to_sparse(build_encoder(**plan)).to(dtype)
    x = torch.randn(mask.batch, 1, *mask.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    spoiled = torch.where(mask.to_dense(), x, float("nan"))
    with use_backend(backend):
        return backward(encoder, [y.to_dense() for y in encoder(BlockSparseTensor.from_dense(spoiled, mask))])


def backward(encoder: nn.Module, outputs: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, upstream)
    gradients = {}
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return [y.detach() for y in outputs], gradients


def errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative l2 errors of gradients."""
    scales = {name: float(value.norm()) for name, value in truth.items()}
    for name in truth:
        if name.endswith(("conv.bias", "all_modules.0.bias")):
            # In front of a norm the gradient of a bias is zero in exact arithmetic: compare with that of the weight.
            scales[name] = scales[name.removesuffix("bias") + "weight"]
    return {name: float((got[name].double() - value).norm()) / scales[name] for name, value in truth.items()}


@functools.cache
def rounding(name: str) -> float:
    """Error of the gradients that the dense computation itself makes in float32, the worst of three.

    Rounding flips the sign of some activations near zero, where LeakyReLU has a kink, and norms over a few voxels
    magnify it. Which signs flip is chance and differs between processors.
    """
    _, truth = dense_results(name, torch.float64)
    rounded = [dense_results(name, torch.float32, nudge)[1] for nudge in range(3)]
    return max(root_mean_square(errors(gradients, truth)) for gradients in rounded)


@pytest.mark.parametrize("name", list(_masks()))
def test_encoder_equals_the_dense_oracle(name: str) -> None:
    truth, true_gradients = dense_results(name, torch.float64)
    for backend in able_on_cpu():
        for dtype in (torch.float64, torch.float32):
            outputs, gradients = sparse_results(name, dtype, backend)
            for got, expected in zip(outputs, truth, strict=True):
                limit = 1e-12 if dtype == torch.float64 else 1e-5
                assert float((got.double() - expected).norm() / expected.norm()) <= limit
            found = errors(gradients, true_gradients)
            for parameter, error in found.items():
                assert error <= (1e-8 if dtype == torch.float64 else 1e-3), f"{backend}, {dtype}, {parameter}"
            if dtype == torch.float32:
                error = root_mean_square(found)
                assert error <= 1e-5 or error <= 2 * rounding(name), backend


def root_mean_square(values: dict[str, float]) -> float:
    return (sum(value**2 for value in values.values()) / len(values)) ** 0.5


def test_everything_is_kept() -> None:
    encoder = build_encoder()
    encoder.eval()
    encoder.stages[0].train()
    seen: list[str] = []
    encoder.stages[1].register_forward_hook(lambda *arguments: seen.append("hook"))
    before = dict(encoder.named_parameters())
    modules = {id(m): m.training for m in encoder.modules()}
    state = copy.deepcopy(encoder.state_dict())
    x = torch.randn(1, 1, 64, 64, 64)
    dense = encoder(x)
    assert to_sparse(encoder) is encoder
    after = dict(encoder.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert {id(m): m.training for m in encoder.modules()} == modules
    assert all(torch.equal(a, b) for a, b in zip(encoder(x), dense, strict=True))
    assert seen == ["hook", "hook"]
    assert list(encoder.state_dict()) == list(state)
    build_encoder().load_state_dict(encoder.state_dict())
    encoder.load_state_dict(state)
    to_sparse(encoder)  # converting twice changes nothing


def test_tied_modules_stay_tied_and_are_computed_sparsely() -> None:
    shared = nn.Conv3d(2, 2, 3, padding=1)
    network = to_sparse(nn.Sequential(shared, nn.ReLU(), shared))
    assert network[0] is network[2] is shared
    assert isinstance(shared, SparseConv3d)
    assert len(list(network.parameters())) == 2


class Doubled(nn.Conv3d):
    """A convolution of somebody's own."""


def test_refusals_name_every_layer_and_change_nothing() -> None:
    network = nn.Sequential(
        nn.Conv3d(1, 2, 3, padding=1),
        nn.Conv3d(2, 2, 3, padding=2, dilation=2),
        nn.Upsample(scale_factor=2),
        nn.SyncBatchNorm(2),
        nn.Sequential(nn.Linear(4, 4), Doubled(2, 2, 1), nn.ReLU()),
    )
    with pytest.raises(ValueError, match="layers without a sparse form") as error:
        to_sparse(network)
    message = str(error.value)
    assert "\n  1: Conv3d: dilation must be 1" in message
    assert "\n  2: Upsample has no sparse form" in message
    assert "\n  3: SyncBatchNorm would not synchronise on dense tensors" in message
    assert "\n  4.0: Linear has no sparse form" in message
    assert "\n  4.1: Doubled is a subclass of Conv3d" in message
    assert type(network[0]) is nn.Conv3d


def test_a_single_layer_and_every_kind_of_norm() -> None:
    assert type(to_sparse(nn.Conv3d(1, 1, 1))) is SparseConv3d
    network = to_sparse(nn.Sequential(nn.BatchNorm3d(2), nn.GroupNorm(1, 2), nn.MaxPool3d(2)))
    assert [type(m).__name__ for m in network] == [
        "SparseBatchNorm3d",
        "SparseGroupNorm",
        "SparseMaxPool3d",
    ]


def compiled_equals_eager(compiler: str) -> None:
    torch._dynamo.reset()
    encoder = to_sparse(build_encoder())
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(lambda x: encoder(x), fullgraph=True, backend=counter)
    for seed in range(5):
        mask = BlockMask.random(2, 2, 32, (0.3, 0.8), torch.Generator().manual_seed(seed))
        x = torch.randn(2, 1, 64, 64, 64)
        results = []
        for function in (encoder, compiled):
            encoder.zero_grad()
            ys = function(BlockSparseTensor.from_dense(x, mask))
            sum(y.blocks.square().sum() for y in ys[:3]).backward()
            # The loss does not reach the last stages: no gradient in eager mode, zeros from a compiled graph.
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in encoder.parameters()]
            results.append([*(y.blocks.detach() for y in ys), *gradients])
            assert ys[2].mask.tables is mask.tables
        for a, b in zip(*results, strict=True):
            assert float((a - b).norm()) <= 1e-4 * float(a.norm()) + 1e-3
    # Static, then once more with a symbolic number of blocks.
    assert counter.frame_count <= 3


def test_compiled_encoder_has_one_graph_for_all_masks() -> None:
    compiled_equals_eager("aot_eager")


@pytest.mark.slow
def test_inductor() -> None:
    compiled_equals_eager("inductor")
