"""Layers named by `s3d profile` where a backend fuses: norms bear their own names and are deferred as without."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from s3d.layer_ranges import layer_ranges
from s3d_kernels import BlockSparseTensor, SparseConv3d, SparseInstanceNorm3d, use_backend
from s3d_kernels.backends.native import NativeBackend

from .test_emulated_cuda import MASKS

MASK = MASKS["side 4, unequal"]()
CHANNELS = 8


def record(layers: nn.Module, named: bool) -> tuple[Counter[str], set[tuple[str, str]], list[Tensor]]:
    """Operators called and how often, each with the range around it, and the result with its gradients."""
    x = torch.randn(MASK.batch, CHANNELS, *MASK.shape, generator=torch.Generator().manual_seed(1))
    blocks = BlockSparseTensor.from_dense(x, MASK, "torch").blocks.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorder:
        if named:
            with layer_ranges(layers):
                y = layers(BlockSparseTensor(blocks, MASK)).blocks
        else:
            y = layers(BlockSparseTensor(blocks, MASK)).blocks
        gradients = torch.autograd.grad(y.square().sum(), [blocks, *layers.parameters()])
    ours = [event for event in recorder.events() if event.name.startswith("s3d_kernels::")]
    around = {(event.name.removeprefix("s3d_kernels::"), event.cpu_parent.name) for event in ours if event.cpu_parent}
    return Counter(event.name for event in ours), around, [y.detach(), *gradients]


def test_deferred_norms_bear_their_names(emulated: NativeBackend) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential()
    for number in range(2):
        layers.add_module(f"conv{number}", SparseConv3d(CHANNELS, CHANNELS, 3, padding=1))
        layers.add_module(f"norm{number}", SparseInstanceNorm3d(CHANNELS, affine=True))
        layers.add_module(f"activation{number}", nn.LeakyReLU(0.1))
    with use_backend(emulated.name):
        record(layers, named=False)  # tables that the mask keeps
        plain, _, expected = record(layers, named=False)
        calls, around, got = record(layers, named=True)
    assert plain["s3d_kernels::conv3d_fused"] == 2
    assert plain["s3d_kernels::normalize_deferred"] == 2
    assert plain["s3d_kernels::compute_deferred"] == 1
    assert calls == plain
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    expected_names = {
        ("conv3d_fused", "conv0"),
        ("conv3d_fused", "conv1"),
        ("normalize_deferred", "norm0"),
        ("normalize_deferred", "norm1"),
        ("compute_deferred", "norm1"),
    }
    assert expected_names <= around
