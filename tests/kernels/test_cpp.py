"""The stand-alone C++ tests of the native kernels, see csrc/tests/run.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "csrc" / "tests" / "run.sh"

pytestmark = [
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"),
]


def run(variant: str, timeout: float) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("CXXFLAGS", "PYTHONPATH")}
    environment["PYTHON"] = sys.executable
    done = subprocess.run(
        ["bash", str(SCRIPT), variant],
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
    run("plain", 500)


def test_emulator() -> None:
    run("emulator", 500)


def test_cuda_kernels_on_the_emulator() -> None:
    run("cuda", 500)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", ["address", "thread", "neon", "python", "emulator_ucontext"])
def test_kernels_under_sanitizers_and_on_arm(variant: str) -> None:
    run(variant, 3500)
