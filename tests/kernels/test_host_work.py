"""How much a layer asks of the host: on a GPU, small operators take longer to launch than to compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from s3d_kernels import BlockMask, BlockSparseTensor, to_sparse, use_backend

from .test_operators import seeded

CHANNELS = 8

# Operators of torch that launch no kernel on a GPU.
VIEWS = {"detach", "to", "_to_copy", "as_strided", "select", "view", "expand", "reshape"}
MEMORY = {"empty", "empty_like", "empty_strided", "new_empty"}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layer(), layer()[:2]
        self.activation = nn.LeakyReLU(inplace=True)

    def forward(self, x: BlockSparseTensor) -> BlockSparseTensor:
        y = self.second(self.first(x))
        y += x
        return self.activation(y)


def layer() -> nn.Sequential:
    convolution = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1)
    return nn.Sequential(convolution, nn.InstanceNorm3d(CHANNELS, affine=True), nn.LeakyReLU(inplace=True))


def operators_of_torch(network: nn.Module) -> Counter[str]:
    """In forward and backward under a mask that was in use before."""
    to_sparse(network)
    mask = BlockMask.random(1, 2, 4, 0.5, seeded(0))
    x = BlockSparseTensor(torch.randn(mask.num_blocks, *mask.block, CHANNELS), mask)
    with use_backend("native"):
        network(x).blocks.sum().backward()
        network.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            network(x).blocks.sum().backward()
    names = ((event.key, event.count) for event in profile.key_averages())
    return Counter({name.removeprefix("aten::"): count for name, count in names if name.startswith("aten::")})


# Those of a backend (the native one allocates its results) count, too. The first number has a margin of three.
@pytest.mark.parametrize(("part", "all_", "kernels"), [(layer, 56, 9), (Residual, 117, 19)])
def test_a_further_layer_adds_few_operators(part: Callable[[], nn.Module], all_: int, kernels: int) -> None:
    few, more = (operators_of_torch(nn.Sequential(layer(), *(part() for _ in range(n)))) for n in (1, 2))
    added = more - few
    assert sum(added.values()) <= all_, added
    computing = {name: count for name, count in added.items() if name not in VIEWS | MEMORY}
    assert sum(computing.values()) <= kernels, computing
