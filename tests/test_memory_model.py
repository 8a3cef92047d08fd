"""The memory of a step is predicted, and a step that does not fit is cut."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from s3d.memory_model import StepMemory, fewest_parts, free_memory, step_memory
from s3d.model import S3D, build_unet
from s3d.pretrain_config import PretrainConfig, machine_config

GIB = 2**30
MEASURE = """
import gc, sys, torch
from pathlib import Path
from s3d.loss import masked_mse
from s3d.masking import MaskSampler
from s3d.model import S3D, build_unet

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

torch.set_num_threads(2)
model = S3D(build_unet("small"), shortcuts=sys.argv[1] == "True")
def step(side):
    x = torch.randn(1, 1, side, side, side)
    mask = MaskSampler((side,) * 3, 16, 0.75, 0)(1, 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    masked_mse(model(x, mask, masked_only=True), x, mask).backward()
    return status("VmHWM") - before
step(32)
print(step(96))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("shortcuts", [True, False])
def test_prediction_is_near_what_a_step_takes(shortcuts: bool, tmp_path: Path) -> None:
    # What is freed goes back to the system at once: otherwise fragmentation decides.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
    command = [sys.executable, "-c", MEASURE, str(shortcuts)]
    taken = int(subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=environment).stdout)
    config = PretrainConfig(
        output_dir=tmp_path, preset="small", patch_size=(96, 96, 96), mask_block=16, shortcuts=shortcuts
    )
    assert step_memory(config, torch.device("cpu")).patch == pytest.approx(taken, rel=0.25)


def test_shortcuts_count_where_they_are_taken() -> None:
    """Not in compiled graphs, not without sparse, and where they were not measured not yet."""

    def patch(device: str = "cpu", **settings: Any) -> int:
        config = PretrainConfig(output_dir=Path("y"), preset="tiny", **settings)
        return step_memory(config, torch.device(device)).patch

    assert patch() < 0.9 * patch(shortcuts=False)
    for settings in (
        {"compile": True},
        {"sparse": False, "mask_tokens": False, "densify": False},
        {"backend": "torch"},
    ):
        assert patch(**settings) == patch(**settings, shortcuts=False)
    assert patch("cuda") == patch("cuda", shortcuts=False)


def test_weights_of_the_published_network() -> None:
    config = PretrainConfig(output_dir=Path("y"))
    parameters = sum(p.numel() for p in S3D(build_unet("resenc-l")).parameters())
    memory = step_memory(config, torch.device("cpu"))
    assert memory.weights == 3 * 4 * parameters
    more = PretrainConfig(output_dir=Path("y"), optimizer="adamw", ema_decay=0.9, precision="bfloat16")
    assert step_memory(more, torch.device("cpu")).weights == 5 * 4 * parameters
    assert step_memory(more, torch.device("cpu")).patch == pytest.approx(memory.patch / 2, rel=1e-6)


def test_a_step_is_cut_until_it_fits() -> None:
    memory = StepMemory(weights=1 * GIB, patch=3 * GIB)
    assert fewest_parts(memory, patches=6, free=40 * GIB) == 1
    assert fewest_parts(memory, patches=6, free=12 * GIB) == 2
    assert fewest_parts(memory, patches=6, free=8 * GIB) == 3
    assert fewest_parts(memory, patches=6, free=1 * GIB) == 6
    assert free_memory(torch.device("cpu")) > GIB // 4


@pytest.mark.parametrize(("machine", "gibibytes"), [("gpu-24gb", 23.5), ("gpu-80gb", 79)])
def test_a_machine_computes_its_preset_in_few_parts(machine: str, gibibytes: float) -> None:
    config = machine_config(machine, output_dir=Path("y"))
    memory = step_memory(config, torch.device("cuda"))
    assert fewest_parts(memory, config.batch_size, int(gibibytes * GIB)) <= 2


MEASURE_DENSE = """
import gc, sys, torch
from pathlib import Path
from s3d.model import build_unet

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

torch.set_num_threads(2)
network = build_unet(sys.argv[1])
network.decoder.seg_layers[:-1].requires_grad_(False)
def step(side):
    x = torch.randn(1, 1, side, side, side)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    network(x).square().mean().backward()
    return status("VmHWM") - before
step(32)
print(step(64))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("preset", ["mednext-small", "convnext-small"])
def test_prediction_knows_the_architecture(preset: str, tmp_path: Path) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE_DENSE, preset]
    taken = int(subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=environment).stdout)
    config = PretrainConfig(output_dir=tmp_path, method="models-genesis", preset=preset, patch_size=(64, 64, 64))
    assert step_memory(config, torch.device("cpu")).patch == pytest.approx(taken, rel=0.25)


def test_s3d_with_another_architecture_counts_all_voxels() -> None:
    def patch(**settings: Any) -> int:
        config = PretrainConfig(output_dir=Path("y"), preset="mednext-small", **settings)
        return step_memory(config, torch.device("cpu")).patch

    assert patch() == patch(method="models-genesis")
