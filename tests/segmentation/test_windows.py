from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from s3d.model import build_network, preset_shape
from s3d.segmentation.windows import predict_logits


def pointwise(windows: Tensor) -> Tensor:
    """Logits of each voxel from that voxel alone: [N, 2, ...] -> [N, 3, ...]."""
    first, second = windows[:, 0], windows[:, 1]
    return torch.stack([first, 2 * second - 1, first * second], dim=1)


class Recorder:
    """Keeps the windows that it was shown."""

    def __init__(self) -> None:
        self.windows: list[Tensor] = []

    def __call__(self, windows: Tensor) -> Tensor:
        self.windows.append(windows.clone())
        return windows[:, :1]


@pytest.mark.parametrize("shape", [(20, 33, 17), (5, 30, 9), (4, 3, 7), (8, 8, 8)])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_of_a_pointwise_network_add_up_to_the_network(
    shape: tuple[int, int, int], mirror: bool, batch: int
) -> None:
    volume = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    logits = predict_logits(pointwise, volume, (8, 8, 8), mirror=mirror, batch=batch)
    assert logits.dtype == torch.float32
    assert logits.shape == (3, *shape)
    torch.testing.assert_close(logits, pointwise(volume[None])[0], atol=1e-5, rtol=1e-5)


def test_small_volumes_are_centred_in_the_minimum_of_each_channel() -> None:
    recorder = Recorder()
    volume = torch.stack([torch.linspace(-2, 3, 60).view(3, 4, 5), torch.linspace(10, 20, 60).view(3, 4, 5)])
    logits = predict_logits(recorder, volume, (8, 8, 8))
    (window,) = recorder.windows
    torch.testing.assert_close(window[0, :, 2:5, 2:6, 1:6], volume)
    window[0, :, 2:5, 2:6, 1:6] = torch.tensor([-2.0, 10.0])[:, None, None, None]
    assert (window[0, 0] == -2).all()
    assert (window[0, 1] == 10).all()
    torch.testing.assert_close(logits, volume[:1])


def test_windows_overlap_by_half_and_their_centres_count_most() -> None:
    """The n-th window answers n: between two the logits rise smoothly, and a voxel in the centre has its window's."""
    recorder = Recorder()

    def number(windows: Tensor) -> Tensor:
        recorder(windows)
        return torch.full_like(windows[:, :1], len(recorder.windows))

    logits = predict_logits(number, torch.zeros(1, 8, 8, 16), (8, 8, 8))
    assert len(recorder.windows) == 3
    row = logits[0, 4, 4]
    assert (row.diff() >= 0).all()
    assert row[0] == pytest.approx(1)
    assert row[4] == pytest.approx(1, abs=0.05)
    # Two voxels from the centre of the one and of the other.
    assert float(row[5] + row[6]) == pytest.approx(3, abs=0.01)
    assert row[15] == pytest.approx(3)


def test_mirroring_averages_all_flips_of_a_real_network() -> None:
    torch.manual_seed(0)
    network = build_network(preset_shape("tiny"), 1, 3).eval()
    for module in network.modules():  # the last norm of a residual branch begins with 0
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    volume = torch.randn(1, 8, 12, 16)
    flips = [[axis + 2 for axis in range(3) if flip[axis]] for flip in product((0, 1), repeat=3)]
    with torch.no_grad():
        expected = torch.stack([network(volume[None].flip(axes)).flip(axes)[0] for axes in flips]).mean(0)
        plain = network(volume[None])[0]
    logits = predict_logits(network, volume, (8, 12, 16), mirror=True)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert float((plain - expected).abs().max()) > 0.01
    torch.testing.assert_close(predict_logits(network, volume, (8, 12, 16)), plain, atol=1e-5, rtol=1e-4)


def test_logits_are_float32_under_autocast() -> None:
    network = build_network(preset_shape("tiny"), 1, 2).eval()
    volume = torch.randn(1, 16, 16, 24)
    exact = predict_logits(network, volume, (16, 16, 16), mirror=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = predict_logits(network, volume, (16, 16, 16), mirror=True)
    assert rounded.dtype == torch.float32
    assert not rounded.requires_grad
    assert 0 < float((rounded - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_half_precision_is_not_rounded_again() -> None:
    volume = torch.randn(2, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    expected = pointwise(volume[None].bfloat16())[0].float()
    logits = predict_logits(lambda windows: pointwise(windows.bfloat16()), volume, (8, 8, 8), mirror=True)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.0}, r"overlap must be at least 0 and below 1, got 1\.0"),
        ({"overlap": -0.1}, r"overlap must be at least 0 and below 1, got -0\.1"),
        ({"batch": 0}, "batch must be at least 1 window, got 0"),
    ],
)
def test_nonsense_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict_logits(pointwise, torch.zeros(2, 8, 8, 8), (8, 8, 8), **options)  # type: ignore[arg-type]
