"""How long does a training step of the encoder take, and how much memory, against dense masked convolution?"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from contenders import CONTENDERS, able
from pytest_benchmark.fixture import BenchmarkFixture
from settings import Settings

from s3d.model import build_unet
from s3d_kernels import BlockMask


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed_step(network: torch.nn.Module, forward: Any) -> tuple[float, float]:
    """Seconds of forward, and of forward and backward."""
    network.zero_grad(set_to_none=True)
    _synchronise()
    begin = time.perf_counter()
    loss = forward()
    _synchronise()
    middle = time.perf_counter()
    loss.backward()
    _synchronise()
    return middle - begin, time.perf_counter() - begin


@pytest.mark.timeout(0)
def test_encoder_step(settings: Settings, results: list[dict[str, Any]], benchmark: BenchmarkFixture) -> None:
    """Contenders take turns, round by round, so that whatever else the machine does meets all alike."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    encoder = build_unet(settings.preset).encoder.to(device)
    x = torch.randn(1, 1, *(settings.patch_size,) * 3, device=device)
    grid = settings.patch_size // settings.block

    def run() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for ratio in settings.mask_ratios:
            mask = BlockMask.random(1, grid, settings.block, ratio, torch.Generator().manual_seed(0), device=device)
            prepared = {name: CONTENDERS[name](encoder, x, mask) for name in settings.contenders}
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in prepared}
            for _ in range(settings.rounds + 1):
                for name, (network, forward) in prepared.items():
                    seconds[name].append(_timed_step(network, forward))
            for name, measured in seconds.items():
                forward_seconds, step_seconds = (list(column) for column in zip(*measured[1:], strict=True))
                row = {
                    "question": "encoder",
                    "contender": name,
                    "preset": settings.preset,
                    "patch_size": settings.patch_size,
                    "mask_ratio": ratio,
                    "masked": 1 - mask.num_blocks / mask.tables.grid.numel(),
                    "forward_seconds": statistics.median(forward_seconds),
                    "step_seconds": statistics.median(step_seconds),
                    "step_seconds_all": step_seconds,
                    "peak_mebibytes": _peak(name, settings, ratio) if settings.measure else None,
                }
                rows.append(row)
                results.append(row)  # at once, so that a run that is stopped reports what it has
        return rows

    rows = benchmark.pedantic(run, rounds=1, iterations=1)
    assert len(rows) == len(settings.mask_ratios) * len(settings.contenders)
    benchmark.extra_info["rows"] = rows


def _peak(contender: str, settings: Settings, ratio: float) -> float:
    """In a process of its own, so that nothing of another contender is counted."""
    command = [sys.executable, str(Path(__file__).parent / "memory.py"), contender, settings.preset]
    command += [str(settings.patch_size), str(settings.block), str(ratio)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_contenders_agree(settings: Settings) -> None:
    """What is compared must compute the same: equal sums of all features (the plain dense encoder sees no mask)."""
    torch.manual_seed(0)
    encoder = build_unet("tiny").encoder.double()
    mask = BlockMask.random(1, 3, 8, 0.5, torch.Generator().manual_seed(0))
    x = torch.randn(1, 1, *mask.shape, dtype=torch.float64)
    names = [name for name in able("cpu", x.dtype) if name != "dense"]
    losses = {name: CONTENDERS[name](encoder, x, mask)[1]() for name in names}
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(losses["reference"].item(), rel=1e-9), name


def test_memory_is_measured(settings: Settings) -> None:
    if settings.measure:
        pytest.skip("measured with the step")
    assert _peak("torch", Settings(False, "tiny", 64, 32, (0.5,), ("torch",), 1), 0.5) > 1
