"""Convolutions of small volumes in bfloat16 have the gradients that they have in float32."""

import copy

import pytest
import torch
from torch import nn

from s3d.model import build_unet
from s3d.sound_gradients import ensure_sound_gradients


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv3d(16, 8, 3, padding=1), (2, 2, 2)),
        (nn.Conv3d(16, 8, 3, padding=1), (4, 2, 4)),
        (nn.Conv3d(16, 8, 3, padding=1), (4, 4, 4)),
        (nn.Conv3d(16, 16, 7, padding=3, groups=16), (4, 5, 4)),
        (nn.Conv3d(16, 16, 5, stride=2, padding=2, groups=16), (4, 4, 4)),
        (nn.ConvTranspose3d(16, 16, 5, stride=2, padding=2, groups=16), (3, 3, 3)),
    ],
    ids=str,
)
def test_volumes_that_are_shorter_than_the_kernel(
    layer: nn.Module, size: tuple[int, int, int], memory: torch.memory_format
) -> None:
    layer = copy.deepcopy(layer)
    ensure_sound_gradients(layer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, *size, generator=generator).contiguous(memory_format=memory)
    expected = layer(x)
    factor = torch.randn(expected.shape, generator=generator).contiguous(memory_format=memory)
    (exact,) = torch.autograd.grad((expected * factor).sum(), layer.weight)
    for _ in range(5):  # what is not written may be right by chance
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert torch.is_autocast_enabled("cpu")
        (gradient,) = torch.autograd.grad((y.float() * factor).sum(), layer.weight)
        assert (gradient - exact).norm() < 0.02 * exact.norm()


def test_autocast_is_as_before_where_a_layer_fails() -> None:
    layer = nn.Conv3d(4, 4, 3)
    ensure_sound_gradients(layer)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="size"):
            layer(torch.zeros(1, 4, 2, 2, 2))
        assert torch.is_autocast_enabled("cpu")


def test_a_network_whose_lowest_resolution_is_smaller_than_its_kernels() -> None:
    torch.manual_seed(0)
    unet = build_unet("small")
    ensure_sound_gradients(unet)
    x = torch.randn(2, 1, 16, 16, 16)
    exact = torch.autograd.grad(unet(x).square().mean(), list(unet.encoder.stages[-1].parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        y = unet(x)
    rounded = torch.autograd.grad(y.float().square().mean(), list(unet.encoder.stages[-1].parameters()))
    norms = [torch.cat([g.flatten() for g in gradients]).norm() for gradients in (exact, rounded)]
    assert norms[1] == pytest.approx(float(norms[0]), rel=0.1)
