"""Convolutions that do the work of the norms around them: nobody must be able to tell, but by time and memory."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s3d_kernels import (
    BlockMask,
    BlockSparseTensor,
    SparseBatchNorm3d,
    SparseConv3d,
    SparseGroupNorm,
    SparseInstanceNorm3d,
    functional,
    fused_norm,
    to_sparse,
    use_backend,
)
from s3d_kernels.backends.native import NativeBackend
from s3d_kernels.operators import conv, norm

from . import emulated_cuda
from .test_emulated_cuda import MASKS, check
from .test_operators import Case
from .test_recompute import _Storages

CHANNELS = 8
MASK = MASKS["side 4, unequal"]()


@contextmanager
def unfused() -> Iterator[None]:
    """Every operator by itself."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (functional, fused_norm):
            patch.setattr(module, "fusing", lambda *arguments: None)
        yield


@pytest.fixture(autouse=True)
def backend(emulated: NativeBackend) -> Iterator[NativeBackend]:
    with use_backend(emulated.name), emulated_cuda.exactly():
        emulated_cuda.take_launches(emulated)
        yield emulated


def features(seed: int = 1, mask: BlockMask = MASK) -> BlockSparseTensor:
    x = torch.randn(mask.batch, CHANNELS, *mask.shape, generator=torch.Generator().manual_seed(seed))
    return BlockSparseTensor(BlockSparseTensor.from_dense(x, mask, "torch").blocks.requires_grad_(), mask)


def layer(out: int = CHANNELS, seed: int = 0, *, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    normal = SparseInstanceNorm3d(out, affine=True)
    nn.init.normal_(normal.weight, 1.0, 0.3)
    nn.init.normal_(normal.bias, 0.0, 0.3)
    return nn.Sequential(SparseConv3d(CHANNELS, out, 3, padding=1), normal, nn.LeakyReLU(0.1, inplace=inplace))


# ---- numbers


def _block(x: BlockSparseTensor, w: Sequence[Tensor]) -> BlockSparseTensor:
    # The gradient of a bias in front of a norm is zero.
    y = functional.sparse_conv3d(x, w[0], w[0].detach().sum((1, 2, 3, 4)), 1, 1)
    y = F.leaky_relu(functional.sparse_instance_norm(y, w[1], w[2]), 0.1)
    y = functional.sparse_conv3d(y, w[3], None, 1, (0, 1, 1))
    return F.leaky_relu(functional.sparse_instance_norm(y, w[4]) + x, 0.1)


def _dense_block(x: Tensor, m: Tensor, w: Sequence[Tensor]) -> Tensor:
    y = oracle.conv3d(x, m, w[0], w[0].detach().sum((1, 2, 3, 4)), (1, 1, 1), (1, 1, 1), 1)
    y = F.leaky_relu(oracle.norm(y, m, w[1], w[2], 1e-5, y.shape[1]), 0.1)
    y = oracle.conv3d(y, m, w[3], None, (1, 1, 1), (0, 1, 1), 1)
    return F.leaky_relu(oracle.norm(y, m, w[4], None, 1e-5, CHANNELS) + oracle.select(x, m), 0.1)


INNER = 40  # no multiple of a tile
SHAPES = ((INNER, CHANNELS, 3, 3, 3), (INNER,), (INNER,), (CHANNELS, INNER, 1, 3, 3), (CHANNELS,))
BLOCK = Case("residual block", _block, _dense_block, SHAPES, CHANNELS)


@pytest.mark.parametrize("name", ["side 8", "side 4, unequal", "empty sample", "nothing", "voxels"])
def test_residual_block_against_the_oracle(name: str, emulated: NativeBackend) -> None:
    """Output and gradients, with NaN at masked voxels, and the same bits from any order of blocks and warps."""
    check(emulated, BLOCK, MASKS[name](), torch.float32, 3e-5, name)


Gradients = list[Tensor]


def gradients(run: Callable[[BlockSparseTensor], Tensor], layers: nn.Module, x: BlockSparseTensor) -> Gradients:
    """The result, and the gradients of its squares with respect to x and all parameters that have one."""
    y = run(x)
    parameters = [p for p in layers.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x.blocks, *parameters])]


def assert_the_same(ours: Gradients, plain: Gradients, tolerance: float = 2e-5) -> None:
    scale = max(float(t.detach().norm()) for t in plain[1:])
    for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
        assert a.dtype == b.dtype
        # The gradient of a bias in front of a norm is zero but for rounding.
        allowed = tolerance * max(float(b.norm()), 0.1 * scale)
        assert float((a - b).norm()) <= allowed, f"{i}: {float((a - b).norm())}, allowed is {allowed}"


def compare(run: Callable[[BlockSparseTensor], Tensor], layers: nn.Module, tolerance: float = 2e-5) -> None:
    ours = gradients(run, layers, features())
    with unfused():
        plain = gradients(run, layers, features())
    assert_the_same(ours, plain, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    layers = nn.Sequential(layer(), layer(16, 1)).to(dtype)
    compare(lambda x: layers(x.to(dtype)).blocks, layers, 2e-2)


def test_autocast(backend: NativeBackend) -> None:
    layers = nn.Sequential(layer(), layer(16, 1))

    def run(x: BlockSparseTensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = layers(x).blocks
        assert y.dtype == torch.bfloat16
        return y

    compare(run, layers, 2e-2)


def test_statistics_are_safe_far_from_zero(backend: NativeBackend) -> None:
    layers = layer()[:2]
    with torch.no_grad():
        expected = layers(features()).blocks
        layers[0].bias.add_(1e3)
        got = layers(features()).blocks
    assert "norm_statistics" not in " ".join(emulated_cuda.take_launches(backend))
    assert float((got - expected).norm() / expected.norm()) < 1e-6 * 1e3 / 4


@pytest.mark.parametrize("kind", [SparseGroupNorm, SparseBatchNorm3d], ids=lambda k: k.__name__)
def test_other_norms(kind: type[nn.Module], backend: NativeBackend) -> None:
    first, second = layer(), layer(16, 1)
    first[1] = kind(2, CHANNELS) if kind is SparseGroupNorm else kind(CHANNELS)
    layers = nn.Sequential(first, second)
    compare(lambda x: layers(x).blocks, layers)
    emulated_cuda.take_launches(backend)
    layers(features()).blocks.sum()
    assert emulated_cuda.take_launches(backend) == [*CONVOLUTION, *CONVOLUTION, "norm_apply"]


# ---- work

CONVOLUTION = ["conv3d_pack_weight", "conv3d_halo", "conv3d_halo_moments"]


def residual_block(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    block = BasicBlockD(
        nn.Conv3d, CHANNELS, CHANNELS, 3, 1, True, nn.InstanceNorm3d, {"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    return to_sparse(block)


def test_launches_of_a_residual_block(backend: NativeBackend) -> None:
    block, x = residual_block(), features()
    y = block(x).blocks
    assert emulated_cuda.take_launches(backend) == [*CONVOLUTION, *CONVOLUTION, "norm_apply"]
    y.sum().backward()
    # The input of the second convolution is computed once more.
    backward = Counter(emulated_cuda.take_launches(backend))
    assert (backward["norm_apply"], backward["norm_grad_input"], backward["conv3d_halo"]) == (1, 2, 2)
    with unfused():
        block(x).blocks.sum()
    assert len(emulated_cuda.take_launches(backend)) == 10


def test_a_residual_block_of_a_library() -> None:
    layers = nn.Sequential(layer(inplace=True), residual_block(), residual_block(1))
    compare(lambda x: layers(x).blocks, layers)


def test_what_is_kept_for_backward() -> None:
    layers, x = nn.Sequential(layer(inplace=True), residual_block(), layer(16, 1)), features()
    kept = []
    for path in (unfused, torch.enable_grad):
        with path(), _Storages() as storages:
            loss = layers(x).blocks.sum()
        kept.append(storages.alive([x.blocks, *layers.parameters()]))
        del loss
    voxels = MASK.num_blocks * 4**3
    plain, ours = ({size: n for size, n in one.items() if size >= 4 * voxels} for one in kept)
    assert ours == plain == {4 * voxels * CHANNELS: 3, 4 * voxels * 16: 1}


# ---- what others see


class Shared(nn.Module):
    """What is activated is read by two convolutions and a sum, in some order."""

    def __init__(self, order: str, *, inplace: bool) -> None:
        super().__init__()
        self.first, self.order = layer(inplace=inplace), order
        self.convolutions = nn.ModuleDict({name: layer(seed=1)[0] for name in order if name != "y"})

    def forward(self, x: BlockSparseTensor) -> BlockSparseTensor:
        y = self.first(x)
        total = x
        for reader in self.order:
            total = total + (y if reader == "y" else self.convolutions[reader](y))
        return total


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("order", ["ab", "ya", "ay", "aby"])
def test_several_readers(order: str, inplace: bool, backend: NativeBackend) -> None:
    layers = Shared(order, inplace=inplace)
    compare(lambda x: layers(x).blocks, layers)
    y = layers(features()).blocks
    emulated_cuda.take_launches(backend)
    y.sum().backward()
    assert Counter(emulated_cuda.take_launches(backend))["norm_grad_input"] == 1


def test_other_names_see_what_was_activated_in_place() -> None:
    block, activation, second = layer()[:2], nn.LeakyReLU(0.1, inplace=True), layer(seed=1)
    with torch.no_grad():
        expected = F.leaky_relu(block(features()).blocks, 0.1)
        y = block(features())
        second(activation(y))
        assert torch.equal(y.blocks, expected)
        z = block(features())
        F.leaky_relu(z, 0.1)
        assert float(z.blocks.min()) < float(expected.min())


def test_looking_computes_nothing() -> None:
    y = layer()(features())
    assert (y.shape, y.dtype, y.device.type) == ((MASK.batch, CHANNELS, *MASK.shape), torch.float32, "cpu")
    assert y._deferred is not None


CHAINS: dict[str, Callable[[nn.Module, BlockSparseTensor], BlockSparseTensor]] = {
    "activated twice": lambda last, y: last(F.leaky_relu(y, 0.2)),
    "activated twice in place": lambda last, y: last(F.leaky_relu(y, 0.2, inplace=True)),
    "scaled": lambda last, y: last(y * 2),
    "scaled in place": lambda last, y: last(operator.imul(y, 2)),
    "scaled in place later": lambda last, y: (lambda z: z + operator.imul(y, 2))(last(y)),
    "a sum of both": lambda last, y: last(y) + y,
    "itself": lambda last, y: last(y + y),
    "concatenated": lambda last, y: functional.sparse_conv3d(
        torch.cat([y, y], 1), torch.cat([last.weight] * 2, 1), None, 1, 1
    ),
    "an addition that fuses": lambda last, y: y + functional.sparse_instance_norm(last(y)),
    "a stride": lambda last, y: functional.sparse_conv3d(y, last.weight, last.bias, 2, 1),
    "one tap": lambda last, y: functional.sparse_conv3d(y, last.weight[..., :1, :1, :1], last.bias),
    "groups": lambda last, y: functional.sparse_conv3d(y, last.weight[:, :4], None, 1, 1, 2),
    "depthwise": lambda last, y: functional.sparse_conv3d(y, last.weight[:, :1], None, 1, 1, CHANNELS),
    "another backend": lambda last, y: functional.sparse_conv3d(y, last.weight, None, 1, 1, backend="torch"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CHAINS))
def test_chains(name: str) -> None:
    layers = nn.Sequential(layer(), SparseConv3d(CHANNELS, CHANNELS, 3, padding=1))
    layers[1].bias.requires_grad_(name not in ("concatenated", "groups", "depthwise", "another backend"))
    compare(lambda x: CHAINS[name](layers[1], layers[0](x)).blocks, layers)


def test_a_norm_of_another_backend_finds_its_own_statistics(backend: NativeBackend) -> None:
    layers = layer()
    layers[1].backend = "torch"
    layers(features()).blocks.sum()
    assert emulated_cuda.take_launches(backend) == CONVOLUTION
    layers[0].backend, layers[1].backend = "torch", backend.name
    layers(features()).blocks.sum()
    assert "norm_apply" in emulated_cuda.take_launches(backend)[1:]


# ---- modifications


@pytest.mark.parametrize("how", ["directly", "by method", "by function"])
def test_statistics_of_what_was_modified_since(how: str) -> None:
    convolution, normal = layer()[:2]
    with torch.no_grad():
        y = convolution(features())
        changed = y.with_blocks(y.blocks * 3 + 1)
        if how == "directly":
            y.blocks.mul_(3).add_(1)
        elif how == "by method":
            y *= 3
            y += 1
        else:
            F.leaky_relu(y, 0.1, inplace=True)
            changed = y.with_blocks(y.blocks.clone())
        torch.testing.assert_close(normal(y).blocks, normal(changed).blocks)


@pytest.mark.parametrize("read", [lambda last, y: last(y), lambda last, y: y.blocks], ids=["on the way", "alone"])
def test_an_input_that_was_modified_behind_our_back_is_an_error(read: Callable[[Any, Any], Any]) -> None:
    convolution, normal, activation = layer()
    z = convolution(features())
    y = activation(normal(z))
    with torch.no_grad():
        z.blocks.mul_(2)
    with pytest.raises(RuntimeError, match="the input of a normalisation was modified in place"):
        read(layer(seed=1)[0], y)


def test_parameters_may_change_after_the_activation() -> None:
    block, last = layer(), layer(seed=1)[0]
    with torch.no_grad():
        expected = last(block(features())).blocks
        y = block(features())
        block[1].weight.mul_(2)
        assert torch.equal(last(y).blocks, expected)


def test_an_input_that_is_modified_by_a_function_of_the_tensor() -> None:
    convolution, normal, activation = layer()
    last = layer(seed=1)[0]
    with torch.no_grad():
        expected = last(activation(normal(convolution(features())))).blocks
        z = convolution(features())
        y = activation(normal(z))
        z *= 3
        torch.testing.assert_close(last(y).blocks, expected)


def test_an_input_that_is_modified_before_backward_is_an_error() -> None:
    convolution, normal, activation = layer()
    z = convolution(features())
    loss = layer(seed=1)[0](activation(normal(z))).blocks.sum()
    with torch.no_grad():
        z.blocks.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        loss.backward()


# ---- modes of autograd


def test_gradients_are_recorded_as_they_were_when_norm_and_convolution_were_called() -> None:
    first, last = layer(), layer(seed=1)[0]
    with torch.no_grad():
        y = first(features())
    assert last(y).blocks.requires_grad
    assert not y.blocks.requires_grad
    y = first(features())
    with torch.no_grad():
        assert not last(y).blocks.requires_grad
        assert y.blocks.requires_grad
    torch.autograd.grad(y.blocks.sum(), first[1].bias)
    with torch.inference_mode():
        z = last(first(features()))
    torch.testing.assert_close(z.blocks.clone(), last(y).blocks.detach())


@pytest.mark.parametrize("frozen", ["0.0", "0.1", "1.0", "1.0.weight", "1"])
def test_frozen_layers(frozen: str) -> None:
    layers = nn.Sequential(layer(), layer(16, 1))
    for name, parameter in layers.named_parameters():
        parameter.requires_grad_(not f"{name}.".startswith(f"{frozen}."))
    compare(lambda x: layers(x).blocks, layers)


def test_hooks_of_others_see_what_they_always_saw() -> None:
    layers, x = nn.Sequential(layer(), residual_block()), features()

    def packed() -> tuple[Counter[Any], Gradients]:
        seen: Counter[Any] = Counter()

        def pack(t: Tensor) -> Tensor:
            seen[tuple(t.shape), t.stride()] += 1
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layers(x).blocks
        return seen, list(torch.autograd.grad(y.square().sum(), list(layers.parameters())))

    (ours, of_ours), plain = packed(), None
    with unfused():
        plain, of_plain = packed()
    assert ours == plain
    assert_the_same(of_ours, of_plain)


def test_hooks_that_are_set_between_activation_and_convolution() -> None:
    layers = nn.Sequential(layer(), layer(16, 1))

    def run(x: BlockSparseTensor) -> Tensor:
        y = layers[0](x)
        with torch.autograd.graph.save_on_cpu():
            return layers[1](y).blocks

    compare(run, layers)


def test_checkpointing() -> None:
    first, block = layer(inplace=True), residual_block()

    def run(x: BlockSparseTensor) -> Tensor:
        # The block is the first to ask for what it is given.
        return checkpoint(lambda t: block(t).blocks, first(x), use_reentrant=False)

    compare(run, nn.ModuleList([first, block]))


def test_second_derivatives() -> None:
    first, last = layer(), layer(seed=1)[0]

    def second() -> Gradients:
        loss = last(first(features())).blocks.square().sum()
        (once,) = torch.autograd.grad(loss, last.weight, create_graph=True)
        parameters = [last.weight, first[0].weight, first[1].weight, first[1].bias]
        return list(torch.autograd.grad(once.square().sum(), parameters))

    ours = second()
    with unfused():
        assert_the_same(ours, second(), 1e-4)


# Dynamo itself reads .grad of what it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_an_eager_activation_before_a_compiled_convolution() -> None:
    first, last = layer(), layer(seed=1)[0]
    compiled = torch.compile(lambda t: last(t).blocks, fullgraph=True, backend="aot_eager")
    y = first(features())
    got = compiled(y)
    torch.testing.assert_close(got, last(first(features())).blocks)


def test_no_gradient_comes_from_what_follows(backend: NativeBackend) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    convolution = layer()[0]
    Stop.apply(convolution(features()).blocks).sum().backward()
    assert convolution.weight.grad is None


# ---- operators


def operator_calls(name: str) -> list[tuple[Any, tuple[Any, ...]]]:
    x = features().blocks
    weight, bias = torch.randn(6, CHANNELS, 3, 3, 3, requires_grad=True), torch.randn(6, requires_grad=True)
    window = functional._window_geometry(MASK, MASK, (3, 3, 3), (1, 1, 1), (1, 1, 1))
    arguments = (weight, bias, *functional._arguments(window), 1, name, MASK.sample_offsets)
    table = torch.rand(MASK.batch, CHANNELS)
    block = (MASK.index, MASK.voxels, MASK.sample_offsets, functional.block_geometry(MASK).sizes())
    vector = torch.randn(CHANNELS, requires_grad=True)
    deferred = (x, vector, vector, None, table, table, table, *block, 0.1, "sample", CHANNELS, False, name)
    return [
        (conv.conv3d_fused, (x, *arguments, None, None, None, None, 1.0)),
        (conv.conv3d_fused, (x, *arguments, x.detach(), table, table, table, 0.1)),
        (norm.normalize_deferred, deferred),
        (norm.compute_deferred, (x, x.detach(), table, table, table, *block, 0.1, name)),
    ]


def test_opcheck(emulated: NativeBackend) -> None:
    for function, arguments in operator_calls(emulated.name):
        # They are for eager mode, and the values of normalize_deferred are anything.
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(function.definition, arguments, test_utils=utils)


def test_what_cannot_be_fused_is_refused(emulated: NativeBackend) -> None:
    function, arguments = operator_calls("torch")[0]
    with pytest.raises(ValueError, match="backend 'torch' does not fuse"):
        function(*arguments)
    x, mask = torch.zeros(1, 2, 2, 2, CHANNELS), BlockMask.random(1, 1, 2, 0.0)
    window = functional._window_geometry(mask, mask, (3, 3, 3), (1, 1, 1), (1, 1, 1))
    with pytest.raises(ValueError, match="conv3d_fused cannot compute this convolution"):
        emulated.conv3d_fused(x, torch.zeros(3, CHANNELS, 3, 3, 3), None, None, 1.0, window, mask.sample_offsets, 1)
    table = torch.zeros(MASK.batch, CHANNELS + 1)
    window = functional._window_geometry(MASK, MASK, (3, 3, 3), (1, 1, 1), (1, 1, 1))
    weight = torch.zeros(3, CHANNELS, 3, 3, 3)
    with pytest.raises(ValueError, match=r"x_mean must have shape \[2, 8\]"):
        emulated.conv3d_fused(
            features().blocks, weight, None, (table, table, table), 1.0, window, MASK.sample_offsets, 1
        )
