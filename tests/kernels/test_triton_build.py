"""What Triton makes of its kernels for GPUs that are not there: tensor cores, asynchronous copies, few registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from s3d_kernels.backends.triton_kernels.configs import MAX_SHARED_BYTES

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "triton_resources.py"
TENSOR_CORES = {80: ("mma",), 90: ("mma", "wgmma"), 100: ("mma", "tcgen05")}


def run(folder: Path, *arguments: str, timeout: int = 500) -> list[str]:
    """Lines that the script prints, in a process of its own, for here Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def compile_kernels(folder: Path, *arguments: str, timeout: int = 500) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(folder, "--json", *arguments, timeout=timeout)]


def check(found: list[dict[str, Any]]) -> None:
    for kernel in found:
        name = f"{kernel['kernel']} of {kernel['what']}, {kernel['dtype']}, {kernel['tiles']}, sm_{kernel['target']}"
        # ptxas keeps a few numbers in local memory where one more program fits on a multiprocessor for it.
        allowed = 24 if kernel["at_step"] else 0
        assert kernel["stack_bytes"] <= allowed, f"{name} has {kernel['stack_bytes']} bytes in local memory"
        assert kernel["shared_bytes"] <= MAX_SHARED_BYTES, (
            f"{name} needs {kernel['shared_bytes']} bytes of shared memory"
        )
        assert kernel["programs"] >= 1, f"{name} does not fit on a multiprocessor"
        if kernel["kernel"] not in ("conv3d_kernel", "conv3d_grad_weight_kernel"):
            continue
        instructions = kernel["instructions"]
        assert any(instructions[i] for i in TENSOR_CORES[kernel["target"]]), f"{name}: no tensor cores"
        if "stem" not in kernel["what"]:  # one channel is copied number by number
            assert instructions["cp.async 16"], f"{name}: no asynchronous copies of 16 bytes"


def test_default_configurations(tmp_path: Path) -> None:
    found = compile_kernels(tmp_path, "--targets", "80", "--dtypes", "bfloat16", "--stages", "0")
    found += compile_kernels(tmp_path, "--targets", "90", "100", "--dtypes", "bfloat16", "--stages", "3")
    kernels = {kernel["kernel"] for kernel in found}
    assert len(kernels) >= 15, f"only {kernels}"
    check(found)
    for target, instruction in ((90, "wgmma"), (100, "tcgen05")):
        forward = [k for k in found if k["target"] == target and k["kernel"] == "conv3d_kernel"]
        assert all(kernel["instructions"][instruction] for kernel in forward), f"sm_{target} without {instruction}"


def test_another_mask_compiles_nothing_anew(tmp_path: Path) -> None:
    kernels = [line.split()[0] for line in run(tmp_path, "--variants", "--stages", "3")]
    # Some do two things: a convolution has two directions and is fused or not, parts are merged on two levels, a sum is
    # of both directions of pooling or of winners, a maximum is a value or a tap, gradients have an activation or not.
    expected = {"conv3d_kernel": 3, "merge_kernel": 2, "sum_kernel": 3, "maximum_kernel": 2, "grad_sums_kernel": 2}
    for name in sorted(set(kernels)):
        short = name.rpartition(".")[2]
        assert kernels.count(name) <= expected.get(short, 1), f"{kernels.count(name)} variants of {name}"
    assert len(set(kernels)) >= 14


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", range(6))
def test_default_configurations_of_every_stage(stage: int, tmp_path: Path) -> None:
    check(compile_kernels(tmp_path, "--stages", str(stage), timeout=3500))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", range(6))
def test_every_configuration(stage: int, tmp_path: Path) -> None:
    check(compile_kernels(tmp_path, "--every-configuration", "--stages", str(stage), timeout=7000))
