"""A whole S3D training step: sparse encoder, tokens, densification, dense decoder, loss, gradients."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from settings import Settings

from s3d.loss import masked_mse
from s3d.model import S3D, build_unet
from s3d_kernels import REGISTRY, BlockMask, use_backend


@pytest.mark.timeout(0)
def test_training_step(settings: Settings, results: list[dict[str, Any]], benchmark: BenchmarkFixture) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = S3D(build_unet(settings.preset)).to(device)
    x = torch.randn(1, 1, *(settings.patch_size,) * 3, device=device)
    grid = settings.patch_size // settings.block
    mask = BlockMask.random(1, grid, settings.block, 0.75, torch.Generator().manual_seed(0), device=device)
    models = {name: copy.deepcopy(model) for name in settings.contenders if name in REGISTRY}

    def step(name: str) -> tuple[float, float]:
        models[name].zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        with use_backend(name):
            loss = masked_mse(models[name](x, mask), x, mask)
        loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin, loss.item()

    def run() -> list[dict[str, Any]]:
        seconds: dict[str, list[float]] = {name: [] for name in models}
        losses: dict[str, float] = {}
        for _ in range(settings.rounds + 1):
            for name in models:
                taken, losses[name] = step(name)
                seconds[name].append(taken)
        for name, loss in losses.items():
            assert loss == pytest.approx(losses["reference"], rel=1e-4) if "reference" in losses else True, name
        return [
            {
                "question": "training step",
                "contender": name,
                "preset": settings.preset,
                "patch_size": settings.patch_size,
                "mask_ratio": 0.75,
                "step_seconds": statistics.median(measured[1:]),
            }
            for name, measured in seconds.items()
        ]

    rows = benchmark.pedantic(run, rounds=1, iterations=1)
    assert all(row["step_seconds"] > 0 for row in rows)
    benchmark.extra_info["rows"] = rows
    results.extend(rows)
