"""The count of a step's floating-point operations, against loops and against the dense network."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from cases import Case
from step_flops import PARTS, PHASE_WEIGHTS, SKIP, UP, step_flops, table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from s3d.loss import masked_mse
from s3d.model import build_unet
from s3d_kernels import BlockMask, BlockSparseTensor, fused_upconv3d, sparse_conv3d, sparse_conv_transpose3d
from s3d_kernels.backends import REGISTRY
from s3d_kernels.flops import ALL, FORMULAS, FlopCount

CASE = Case("step", "", "tiny", 16, 1, 8, "blocks", 0.5, "float32")


def counted(function) -> tuple[float, float]:
    """Operations of forward alone and of forward and backward."""
    with FlopCount() as count:
        y = function()
        forward = count.flops[ALL]
        (y.blocks if isinstance(y, BlockSparseTensor) else y).sum().backward()
    return forward, count.flops[ALL]


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (1, 1, 1)])
def test_convolution_under_a_mask(grown: bool, kernel: tuple[int, int, int]) -> None:
    grid = torch.rand(2, 2, 3, 2, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = BlockMask.from_grid(grid, 2)
    target = mask.grow(1) if grown else mask
    x = BlockSparseTensor(torch.randn(mask.num_blocks, 2, 2, 2, 3, requires_grad=True), mask)
    weight = torch.randn(5, 3, *kernel, requires_grad=True)
    sees, seen = target.to_dense()[:, 0], mask.to_dense()[:, 0]
    pairs = 0
    for n, *o in sees.nonzero().tolist():
        for tap in itertools.product(*map(range, kernel)):
            i = [a + t - k // 2 for a, t, k in zip(o, tap, kernel)]
            pairs += all(0 <= a < size for a, size in zip(i, mask.shape)) and bool(seen[(n, *i)])
    padding = [k // 2 for k in kernel]
    forward, both = counted(lambda: sparse_conv3d(x, weight, None, 1, padding, target=target))
    assert 0 < pairs < seen.numel() * math.prod(kernel)
    assert forward == 2 * pairs * 3 * 5
    assert both == 3 * forward


def test_convolution_under_a_mask_of_voxels_and_its_transpose() -> None:
    visible = torch.rand(1, 4, 6, 4, generator=torch.Generator().manual_seed(0)) < 0.3
    mask = BlockMask.from_voxels(visible, 2)
    x = BlockSparseTensor(torch.randn(mask.num_blocks, 2, 2, 2, 3, requires_grad=True), mask)
    weight = torch.randn(3, 5, 2, 2, 2, requires_grad=True)
    forward, both = counted(lambda: sparse_conv_transpose3d(x, weight))
    assert forward == 2 * int(visible.sum()) * 8 * 3 * 5
    assert both == 3 * forward


def test_up_convolution() -> None:
    x = torch.randn(2, 3, 1, 2, 3, requires_grad=True)
    up_weight, weight = torch.randn(3, 4, 2, 2, 2, requires_grad=True), torch.randn(5, 4, 3, 3, 3, requires_grad=True)

    def meets(size: int) -> int:  # coarse voxels that the window of each fine voxel reaches, along an axis
        return sum(len({(o + k) // 2 for k in (-1, 0, 1) if 0 <= o + k < 2 * size}) for o in range(2 * size))

    pairs = 2 * meets(1) * meets(2) * meets(3)
    product = 2 * 64 * 5 * 4 * 3
    transforms = 2 * 64 * (27 * 5 * 4 + 8 * 4 * 3 + 64 * 5 * 3)  # by constants, which have no gradient
    forward, both = counted(lambda: fused_upconv3d(x, up_weight, None, weight, None))
    assert forward == 2 * pairs * 3 * 5 + product + transforms
    assert both == 3 * forward - transforms


class Dense(nn.Module):
    """The autoencoder's dense network, in layers of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = build_unet("tiny")
        channels = self.unet.encoder.output_channels[1:]
        self.densify = nn.ModuleList([nn.Identity(), *(nn.Conv3d(c, c, 3, padding=1) for c in channels)])

    def forward(self, x: Tensor) -> Tensor:
        skips = [layer(skip) for layer, skip in zip(self.densify, self.unet.encoder(x), strict=True)]
        y: Tensor = self.unet.decoder(skips)
        return y


def test_a_step_of_which_nothing_is_masked_costs_what_the_dense_network_does() -> None:
    sums = {"encoder": 0, "decoder": 0, "densify": 0}
    network = Dense()

    def pairs(sizes: torch.Size, layer: nn.Conv3d | nn.ConvTranspose3d) -> int:
        if isinstance(layer, nn.ConvTranspose3d):
            return math.prod(sizes) * math.prod(layer.kernel_size)
        per_axis = zip(sizes, layer.kernel_size, layer.stride, layer.padding)
        return math.prod(sum(0 <= o + t - p < n for o in range(0, n, s) for t in range(k)) for n, k, s, p in per_axis)

    def note(name: str):
        def hook(layer, inputs: tuple[Tensor], output: Tensor) -> None:
            products = 2 * pairs(inputs[0].shape[2:], layer) * layer.in_channels * layer.out_channels
            sums[name.removeprefix("unet.").split(".")[0]] += products * (2 + inputs[0].requires_grad)

        return hook

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(note(name))
    case = dataclasses.replace(CASE, mask_ratio=0.0)
    network(case.input(case.mask("cpu")))
    flops = step_flops(case, shortcuts=False)
    assert flops["encoder"] == sums["encoder"]
    assert flops["densification"] == sums["densify"]
    assert flops[UP] + flops[SKIP] + flops["head"] == sums["decoder"]
    assert flops[PHASE_WEIGHTS] == 0
    assert flops["head"] == 3 * 2 * 16**3 * 4


@pytest.mark.parametrize("shortcuts", [False, True])
def test_what_is_counted_is_what_runs(shortcuts: bool) -> None:
    """torch's counter on a step that is computed, with hooks that keep layers from computing features again."""

    def of_operator(formula):
        def flops(*args, out_val=None, **kwargs) -> float:
            return formula(args, out_val)

        flops._get_raw = True  # type: ignore[attr-defined]
        return flops

    model, mask = CASE.network(), CASE.mask("cpu")
    model.shortcuts = shortcuts  # type: ignore[assignment]
    x = CASE.input(mask)
    mapping = {operator: of_operator(formula) for operator, formula in FORMULAS.items()}
    with (
        FlopCounterMode(display=False, custom_mapping=mapping) as counter,
        saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        masked_mse(model(x, mask, masked_only=True), x, mask).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert counter.get_total_flops() == sum(step_flops(CASE, shortcuts).values()) > 0


def test_parts_of_a_step() -> None:
    plain, ours = step_flops(CASE, shortcuts=False), step_flops(CASE, shortcuts=True)
    assert ours["encoder"] == plain["encoder"]
    # Only the masked half is wanted of the head.
    assert ours["head"] == plain["head"] / 2
    assert 0 < ours[SKIP] < plain[SKIP]
    rows = table("tiny", 16, 8, [0.5]).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:-2]] == [f"| {part}" for part in PARTS]
    dense = step_flops(dataclasses.replace(CASE, mask_ratio=0.0), shortcuts=False)
    assert rows[-1].endswith(f"| {sum(dense.values()) / sum(ours.values()):.2f} |")


def test_what_is_counted_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*args: object) -> Tensor:
        raise AssertionError("it was computed")

    monkeypatch.setattr(REGISTRY["torch"], "conv3d", compute)
    mask = BlockMask.from_grid(torch.ones(1, 1, 1, 1, dtype=torch.bool), 2)
    x = BlockSparseTensor(torch.zeros(1, 2, 2, 2, 1), mask)
    with FlopCount() as count:
        assert sparse_conv3d(x, torch.ones(1, 1, 1, 1, 1), backend="torch").blocks.shape == x.blocks.shape
    assert count.flops == {ALL: 2 * 8}
    with pytest.raises(AssertionError, match="it was computed"):
        sparse_conv3d(x, torch.ones(1, 1, 1, 1, 1), backend="torch")


def test_only_integers_and_booleans_are_computed() -> None:
    """A step of which everything was computed would need the memory of a step."""
    floats, integers = torch.zeros(4), torch.arange(4)
    with FlopCount():
        floats.add_(1.0)
        view = floats[1:]
        assert (integers + 1).tolist() == [1, 2, 3, 4]
        assert (floats > -1).all()
        assert floats.long().tolist() == [0] * 4
        assert (floats + 1).shape == (4,)
    assert floats.tolist() == [0.0] * 4
    view.fill_(2.0)
    assert floats.tolist() == [0.0, 2.0, 2.0, 2.0]
