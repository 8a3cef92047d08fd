"""Features that backward computes again: the same gradients, less memory, and never those of other features."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from s3d_kernels import (
    BlockMask,
    BlockSparseTensor,
    functional,
    fused_norm,
    recompute,
    to_sparse,
    use_backend,
)

from .test_operators import ON_CPU

MASKS = {
    "blocks": BlockMask.random(2, (3, 2, 2), 4, 0.5, torch.Generator().manual_seed(0)),
    "voxels": BlockMask.from_voxels(torch.rand(2, 8, 12, 8, generator=torch.Generator().manual_seed(1)) < 0.4, 4),
}
NARROW, WIDE = 4, 6


class Block(nn.Module):
    """A residual block as they are usually written."""

    def __init__(self, channels: int, out: int, stride: int = 1, activation: bool = True) -> None:
        super().__init__()
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            projection = nn.Conv3d(channels, out, 1, bias=False)
            self.skip = nn.Sequential(nn.AvgPool3d(stride), projection, nn.InstanceNorm3d(out, affine=True))
        self.first = nn.Sequential(
            nn.Conv3d(channels, out, 3, stride, 1), nn.InstanceNorm3d(out, affine=True), nn.LeakyReLU(0.1)
        )
        self.second = nn.Sequential(nn.Conv3d(out, out, 3, 1, 1), nn.InstanceNorm3d(out, affine=True))
        self.activation = nn.LeakyReLU(0.1) if activation else nn.Identity()

    def forward(self, x: Any) -> Any:
        residual = self.skip(x)
        y = self.second(self.first(x))
        y += residual
        return self.activation(y)


def network(*, rows: int = 2, activation: bool = True) -> nn.Sequential:
    """Stem of one channel, a block, a block of half the resolution and `rows` - 1 behind it, a convolution."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Sequential(nn.Conv3d(1, NARROW, 3, padding=1), nn.InstanceNorm3d(NARROW, affine=True), nn.LeakyReLU(0.1)),
        Block(NARROW, NARROW, activation=activation),
        Block(NARROW, WIDE, 2, activation),
        *(Block(WIDE, WIDE, activation=activation) for _ in range(rows - 1)),
        nn.Conv3d(WIDE, 2, 3, padding=1),
    )
    for module in layers.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return to_sparse(layers)


def volume(name: str = "blocks", dtype: torch.dtype = torch.float32) -> BlockSparseTensor:
    mask = MASKS[name]
    x = torch.randn(mask.batch, 1, *mask.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return BlockSparseTensor.from_dense(x, mask)


@contextmanager
def everything_kept() -> Iterator[None]:
    """Nothing is computed again."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (fused_norm, functional):
            patch.setattr(module, "compute_instead", lambda *arguments: False)
        yield


def gradients(layers: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(run(), list(layers.parameters())))


def plain_gradients(layers: nn.Module, x: BlockSparseTensor) -> list[Tensor]:
    with everything_kept():
        return gradients(layers, lambda: layers(x).blocks.square().sum())


def assert_equal(ours: list[Tensor], plain: list[Tensor]) -> None:
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("backend", ON_CPU)
def test_the_same_bits_as_with_everything_kept(backend: str, mask: str, activation: bool) -> None:
    layers, x = network(rows=5, activation=activation), volume(mask)
    with use_backend(backend):
        assert_equal(gradients(layers, lambda: layers(x).blocks.square().sum()), plain_gradients(layers, x))


def test_nothing_at_masked_voxels_is_computed_again() -> None:
    layers, x = network(), volume("voxels")
    assert x.mask.voxels is not None
    spoiled = x.with_blocks(torch.where(x.mask.voxels[..., None], x.blocks, torch.nan))
    assert_equal(gradients(layers, lambda: layers(spoiled).blocks.square().sum()), plain_gradients(layers, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layers, x = network().to(dtype), volume(dtype=dtype)
    assert_equal(gradients(layers, lambda: layers(x).blocks.square().sum()), plain_gradients(layers, x))


def test_autocast() -> None:
    layers, x = network(), volume()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(gradients(layers, lambda: layers(x).blocks.float().square().sum()), plain_gradients(layers, x))


class _Storages(TorchDispatchMode):
    """All memory that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                reference = StorageWeakRef(storage)
                self.seen[reference.cdata] = (reference, storage.nbytes())
        return result

    def alive(self, known: list[Tensor]) -> Counter[int]:
        """How many there still are of each size in bytes, but for that of known tensors."""
        ours = {StorageWeakRef(t.untyped_storage()).cdata for t in known}
        return Counter(n for key, (reference, n) in self.seen.items() if key not in ours and not reference.expired())


def test_what_is_kept_for_backward() -> None:
    layers, x = network(), volume()
    with _Storages() as storages:
        loss = layers(x).blocks.sum()
    voxels = x.mask.num_blocks * 4**3
    fine, coarse, pooled = voxels * NARROW * 4, voxels // 8 * WIDE * 4, voxels // 8 * NARROW * 4
    known = [x.blocks, *layers.parameters()]
    large = {size: count for size, count in storages.alive(known).items() if size >= pooled}
    # Of the block at full resolution its convolutions. Of two blocks behind it as much, the input of the projection,
    # and one output, where the recipe would be too long. Not the stem, the projection, activations and other outputs.
    assert large == {fine: 2, coarse: 5, pooled: 1}
    loss.backward()
    gradients = [p.grad for p in layers.parameters() if p.grad is not None]
    assert not {size for size in storages.alive([*known, *gradients]) if size >= pooled}


def test_recipes_do_not_hold_the_graph() -> None:
    layers, x = network(), volume()
    for depth in range(1, 5):
        y = layers[:depth](x)
        recipe, node = y.recipe, weakref.ref(y.blocks.grad_fn)
        del y
        assert recipe is not None
        assert node() is None


def test_a_recipe_is_never_long() -> None:
    x = network(rows=1)[:-1](volume())
    lengths = []
    for block in network(rows=8)[3:-1]:
        x = block(x)
        assert x.recipe is not None
        lengths.append(x.recipe.steps)
    assert max(lengths) <= recompute.MAX_STEPS
    assert lengths.count(0) < len(lengths) / 2


def scaled(t: Tensor) -> None:
    with torch.no_grad():
        t.mul_(3)


def by_method(x: BlockSparseTensor) -> None:
    with torch.no_grad():
        x *= 3


def directly(x: BlockSparseTensor) -> None:
    scaled(x.blocks)


# What is changed between forward and backward (the output of a layer), how, and whether backward starts from it.
CHANGES: dict[str, tuple[str, Callable[[BlockSparseTensor], None], bool]] = {
    "stem, computed again": ("0.0", directly, False),
    "convolution, kept": ("1.first.0", directly, True),
    "second convolution, kept": ("1.second.0", directly, True),
    "activated, computed again": ("1.first", directly, False),
    "block, computed again": ("1", directly, False),
    "block, by a method": ("1", by_method, False),
    "pooled, kept": ("2.skip.0", directly, True),
    "projection, computed again": ("2.skip.1", directly, False),
    "output of a long recipe, kept": ("3", directly, True),
    "output of a long recipe, by a method": ("3", by_method, False),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_changes_in_place_give_the_same_gradients_or_an_error(change: str) -> None:
    name, modify, kept = CHANGES[change]
    layers, x, seen = network(), volume(), []
    expected = plain_gradients(layers, x)
    layers.get_submodule(name).register_forward_hook(lambda module, arguments, y: seen.append(y))
    loss = layers(x).blocks.square().sum()
    modify(seen[0])
    if not kept:
        assert_equal(gradients(layers, lambda: loss), expected)
        return
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        gradients(layers, lambda: loss)


def test_a_changed_volume_is_an_error() -> None:
    layers, x = network(), volume()
    loss = layers(x).blocks.square().sum()
    scaled(x.blocks)
    with pytest.raises(RuntimeError, match=r"modified in place"):
        loss.backward()


def test_a_recipe_that_does_not_hold_is_not_used() -> None:
    layers, x = network(), volume()
    stem = layers[0](x)
    assert stem.recipe is not None
    scaled(x.blocks)
    assert stem.recipe is None
    y = stem.with_blocks(stem.blocks.detach()) * 1.0
    convolution = layers[1].first[0]
    ours, plain = (torch.autograd.grad(convolution(t).blocks.square().sum(), convolution.weight)[0] for t in (stem, y))
    assert torch.equal(ours, plain)


def test_changed_features_are_not_taken_for_what_they_were() -> None:
    layers, x = network(), volume()
    convolution, results = layers[2].first[0], []
    for relieved in (True, False):
        y = layers[1](layers[0](x))
        directly(y)
        assert y.recipe is None
        y = y if relieved else y.with_blocks(y.blocks)
        results.append(torch.autograd.grad(convolution(y).blocks.square().sum(), convolution.weight)[0])
    assert torch.equal(*results)


def test_parameters_may_change_where_only_a_recipe_reads_them() -> None:
    layers, x = network(), volume()
    chosen = [layers[2].first[0].weight, layers[3].first[0].weight]
    expected = torch.autograd.grad(layers(x).blocks.square().sum(), chosen)
    loss = layers(x).blocks.square().sum()
    for parameter in (layers[0][0].weight, layers[0][1].weight, layers[2].skip[1].weight):
        scaled(parameter)
    assert_equal(list(torch.autograd.grad(loss, chosen)), list(expected))


def test_backward_twice() -> None:
    layers, x = network(), volume()
    loss = layers(x).blocks.square().sum()
    parameters = list(layers.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert_equal(list(torch.autograd.grad(loss, parameters)), list(first))


def test_frozen_layers() -> None:
    layers, x = network(), volume()
    expected = dict(zip(layers.parameters(), plain_gradients(layers, x), strict=True))
    for frozen in (layers[0][0], layers[1].first[0], layers[2].skip[2], layers[2].first[1]):
        frozen.requires_grad_(False)
    trained = [p for p in layers.parameters() if p.requires_grad]
    got = torch.autograd.grad(layers(x).blocks.square().sum(), trained)
    assert_equal(list(got), [expected[p] for p in trained])


def test_hooks_of_others_come_first() -> None:
    layers, x = network(), volume()
    expected = plain_gradients(layers, x)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = layers(x).blocks.square().sum()
    assert any(t.shape[-1] == NARROW and t.dim() == 5 for t in packed)
    assert_equal(gradients(layers, lambda: loss), expected)


def test_checkpointing() -> None:
    layers, x = network(), volume()

    def run() -> Tensor:
        stem = layers[0](x)
        inner = checkpoint(lambda b: layers[1:4](stem.with_blocks(b)).blocks, stem.blocks, use_reentrant=False)
        y: Tensor = layers[-1](BlockSparseTensor(inner, x.mask.downsample(2))).blocks
        return y.square().sum()

    assert_equal(gradients(layers, run), plain_gradients(layers, x))


def test_second_derivatives_of_a_convolution_behind_a_norm() -> None:
    layers, x = network(), volume()
    convolution, stem = layers[1].first[0], layers[0]

    def second() -> list[Tensor]:
        loss = convolution(stem(x)).blocks.square().sum()
        (first,) = torch.autograd.grad(loss, convolution.weight, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [convolution.weight, stem[0].weight, stem[1].bias]))

    with everything_kept():
        expected = second()
    assert_equal(second(), expected)
    loss = stem(x).blocks.square().sum()
    (first,) = torch.autograd.grad(loss, stem[1].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="norm_grad_sums"):
        first.sum().backward()
