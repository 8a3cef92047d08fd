"""The stand-alone C++ tests of the native kernels, see csrc/tests/run.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import emulated_cuda

SCRIPT = Path(__file__).resolve().parents[2] / "csrc" / "tests" / "run.sh"

pytestmark = [
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"),
]


def run(timeout: float, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("CXXFLAGS", "PYTHONPATH")}
    environment["PYTHON"] = sys.executable
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=timeout,
    )
    if done.returncode == 77:
        pytest.skip(next(line for line in done.stdout.splitlines() if line.startswith("skipped: ")))
    assert done.returncode == 0, done.stdout[-8000:]
    assert " ok\n" in done.stdout or " passed" in done.stdout, done.stdout[-8000:]


def test_kernels() -> None:
    run(500, "plain")


@pytest.mark.parametrize("variant", ["emulator", "cuda"])
def test_cuda_kernels_and_their_emulator(variant: str, emulated_library: Path) -> None:
    run(500, "--objects", str(emulated_cuda.objects_of(emulated_library)), variant)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", ["address", "thread", "neon", "python", "emulator_ucontext"])
def test_kernels_under_sanitizers_and_on_arm(variant: str) -> None:
    run(3500, variant)
