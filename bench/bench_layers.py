"""Which layers gain: every distinct convolution, norm and pooling of the encoder, forward and backward."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peers
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from settings import Settings
from torch import Tensor, nn

from s3d.model import PRESETS
from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, to_sparse, use_backend
from s3d_kernels.backends import native

Forward = Callable[[], Tensor]

DIRECT = "native direct"  # without Winograd


def _layers(preset: str) -> list[tuple[str, int, int, Callable[[], nn.Module]]]:
    """(name, stage of the input, input channels, constructor) of every distinct layer."""
    features = PRESETS[preset].features
    layers: list[tuple[str, int, int, Callable[[], nn.Module]]] = [
        ("stem conv 3", 0, 1, lambda: nn.Conv3d(1, features[0], 3, padding=1))
    ]
    for stage, channels in enumerate(features):
        layers.append((f"stage {stage} conv 3", stage, channels, lambda c=channels: nn.Conv3d(c, c, 3, padding=1)))
        layers.append((f"stage {stage} norm", stage, channels, lambda c=channels: nn.InstanceNorm3d(c, affine=True)))
        if stage > 0:
            before = features[stage - 1]
            layers.append(
                (
                    f"stage {stage} conv 3 stride 2",
                    stage - 1,
                    before,
                    lambda b=before, c=channels: nn.Conv3d(b, c, 3, 2, 1),
                )
            )
            layers.append((f"stage {stage} pool", stage - 1, before, lambda: nn.AvgPool3d(2)))
            if before != channels:
                layers.append((f"stage {stage} conv 1", stage, before, lambda b=before, c=channels: nn.Conv3d(b, c, 1)))
    return layers


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(forward: Forward) -> tuple[float, float]:
    """Seconds of forward, and of forward and backward."""
    _synchronise()
    begin = time.perf_counter()
    y = forward()
    _synchronise()
    middle = time.perf_counter()
    y.backward(torch.ones_like(y))
    _synchronise()
    return middle - begin, time.perf_counter() - begin


@contextmanager
def _as(contender: str) -> Iterator[None]:
    if contender != DIRECT:
        with use_backend(contender):
            yield
        return
    native.use_method("direct")
    try:
        with use_backend("native"):
            yield
    finally:
        native.use_method("auto")


def _sparse(layer: nn.Module, x: BlockSparseTensor, contender: str) -> Forward:
    def forward() -> Tensor:
        y: Tensor = layer(x).blocks
        return y

    return forward


def _take_turns(contenders: dict[str, Forward], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of forward and of the step, after one round that is not counted."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, forward in contenders.items():
            with _as(name) if name in (*REGISTRY, DIRECT) else use_backend("auto"):
                seconds[name].append(_timed(forward))
    medians = {}
    for name, measured in seconds.items():
        forward_seconds, step_seconds = zip(*(measured[1:] or measured), strict=True)
        medians[name] = (statistics.median(forward_seconds), statistics.median(step_seconds))
    return medians


def _pairs(mask: BlockMask) -> float:
    """Pairs of visible voxels of a 3x3x3 convolution."""
    ones = torch.ones(mask.num_blocks, *mask.block, 1, device=mask.device)
    layer = to_sparse(nn.Conv3d(1, 1, 3, padding=1, bias=False)).to(mask.device)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        return float(layer(BlockSparseTensor(ones, mask)).blocks.double().sum())


def _multiplication_rate() -> float:
    """FLOP/s of a large float32 matrix product: what this machine can do."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    seconds = []
    for _ in range(6):
        _synchronise()
        begin = time.perf_counter()
        a @ b
        _synchronise()
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048**3 / statistics.median(seconds[1:])


@pytest.mark.timeout(0)
def test_layers(settings: Settings, results: list[dict[str, Any]], benchmark: BenchmarkFixture) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name for name in settings.contenders if name in REGISTRY]

    def run() -> list[dict[str, Any]]:
        rows = []
        for ratio in (0.75, 0.0):
            grid = math.ceil(settings.patch_size / settings.block)
            base = BlockMask.random(1, grid, settings.block, ratio, torch.Generator().manual_seed(0), device=device)
            for name, stage, channels, make in _layers(settings.preset):
                square = name.startswith("stage") and name.endswith(" conv 3")
                if ratio == 0.0 and not square:
                    continue
                mask = base
                for _ in range(stage):
                    mask = mask.downsample(2)
                layer = to_sparse(make()).to(device)
                blocks = torch.randn(mask.num_blocks, *mask.block, channels, device=device, requires_grad=True)
                x = BlockSparseTensor(blocks, mask)
                # Weights of their own, so that none finds them in the cache because of the one before.
                contenders = {backend: _sparse(copy.deepcopy(layer), x, backend) for backend in names}
                if square and device == "cpu" and "native" in names:
                    contenders[DIRECT] = _sparse(copy.deepcopy(layer), x, DIRECT)
                    contenders["dense"] = peers.dense_convolution(channels, mask, torch.contiguous_format)
                    contenders["dense, channels last"] = peers.dense_convolution(channels, mask, torch.channels_last_3d)
                    layer_of_spconv = peers.spconv_convolution(channels, mask)
                    if layer_of_spconv is not None:
                        contenders["spconv's own layer"] = layer_of_spconv
                rate = _multiplication_rate()
                for contender, (forward_seconds, step_seconds) in _take_turns(contenders, settings.rounds).items():
                    row = {
                        "question": "layer",
                        "layer": name,
                        "block": mask.block[0],
                        "contender": contender,
                        "patch_size": settings.patch_size,
                        "mask_ratio": ratio,
                        "forward_seconds": forward_seconds,
                        "step_seconds": step_seconds,
                    }
                    if square:
                        row["pair_flop"] = 2 * _pairs(mask) * channels * channels
                        row["multiplication_flop_per_second"] = rate
                    rows.append(row)
        return rows

    rows = benchmark.pedantic(run, rounds=1, iterations=1)
    assert all(row["step_seconds"] > 0 for row in rows)
    benchmark.extra_info["rows"] = rows
    results.extend(rows)
