"""Depthwise convolutions in bfloat16 have the gradients that they have in float32."""

import pytest
import torch
from torch import nn

from s3d.networks.depthwise import with_sound_gradients


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv3d(16, 16, 7, padding=3, groups=16), (4, 5, 4)),
        (nn.Conv3d(16, 16, 5, padding=2, groups=16), (3, 6, 6)),
        (nn.Conv3d(16, 16, 5, stride=2, padding=2, groups=16), (4, 4, 4)),
        (nn.ConvTranspose3d(16, 16, 5, stride=2, padding=2, groups=16), (3, 3, 3)),
        (nn.ConvTranspose3d(16, 16, 5, stride=2, padding=2, groups=16), (6, 6, 6)),
    ],
    ids=str,
)
def test_volumes_that_are_shorter_than_the_kernel(layer: nn.Module, size: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, *size, generator=generator).contiguous(memory_format=torch.channels_last_3d)
    with_sound_gradients(nn.Sequential(layer))
    expected = layer(x)
    factor = torch.randn(expected.shape, generator=generator).contiguous(memory_format=torch.channels_last_3d)
    (exact,) = torch.autograd.grad((expected * factor).sum(), layer.weight)
    for _ in range(5):  # what is not written may be right by chance
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        (gradient,) = torch.autograd.grad((y.float() * factor).sum(), layer.weight)
        assert (gradient - exact).norm() < 0.02 * exact.norm()
