"""Which layers gain: every distinct convolution, norm and pooling of the encoder, forward and backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from settings import Settings
from torch import nn

from s3d.model import PRESETS
from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, to_sparse, use_backend


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


@pytest.mark.timeout(0)
def test_layers(settings: Settings, results: list[dict[str, Any]], benchmark: BenchmarkFixture) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ratio = 0.75
    base = BlockMask.random(
        1, settings.patch_size // settings.block, settings.block, ratio, torch.Generator().manual_seed(0), device=device
    )
    names = [name for name in settings.contenders if name in REGISTRY]

    def step(layer: nn.Module, x: BlockSparseTensor, backend: str) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        with use_backend(backend):
            y = layer(x)
            y.blocks.backward(torch.ones_like(y.blocks))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def run() -> list[dict[str, Any]]:
        rows = []
        for name, stage, channels, make in _layers(settings.preset):
            mask = base
            for _ in range(stage):
                mask = mask.downsample(2)
            layer = to_sparse(make()).to(device)
            blocks = torch.randn(mask.num_blocks, *mask.block, channels, device=device, requires_grad=True)
            x = BlockSparseTensor(blocks, mask)
            seconds: dict[str, list[float]] = {backend: [] for backend in names}
            for _ in range(settings.rounds + 1):
                for backend in names:
                    seconds[backend].append(step(layer, x, backend))
            for backend, measured in seconds.items():
                rows.append(
                    {
                        "question": "layer",
                        "layer": name,
                        "block": mask.block[0],
                        "contender": backend,
                        "patch_size": settings.patch_size,
                        "mask_ratio": ratio,
                        "step_seconds": statistics.median(measured[1:] or measured),
                    }
                )
        return rows

    rows = benchmark.pedantic(run, rounds=1, iterations=1)
    assert all(row["step_seconds"] > 0 for row in rows)
    benchmark.extra_info["rows"] = rows
    results.extend(rows)
