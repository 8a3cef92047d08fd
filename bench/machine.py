"""The machine that figures come from: what it is, and what it can do at best."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("triton", "spconv-cu120", "numpy", "dynamic-network-architectures", "pytest-benchmark", "s3d")


def device() -> str:
    """Where benchmarks run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe_machine() -> dict[str, Any]:
    """Processor, accelerator, clocks, threads and versions, as they are written beside results."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    clocks: list[float] = []
    if information.exists():
        text = information.read_text()
        match = re.search(r"model name\s*: (.*)", text)
        processor = match.group(1) if match else processor
        clocks = [float(clock) for clock in re.findall(r"cpu MHz\s*: (.*)", text)]
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else f"{processor}, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__}  # with the CUDA version, which the package's metadata does not have
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": name,
        "slug": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "processor": processor,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cpu_mhz": clocks,
        "gpu_clocks": _gpu_clocks() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
    }


def _gpu_clocks() -> str:
    """Clocks and power limit, as the driver's tool says them."""
    query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip()


def multiplication_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the most that this machine can do in a dtype; float32 as TF32 on a GPU."""
    size = 8192 if device() == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device() == "cuda" else before)
    try:
        return 2 * size**3 / _median_seconds(lambda: a @ b)
    finally:
        torch.set_float32_matmul_precision(before)


def copy_rate() -> float:
    """Bytes/s of a large copy, read and written."""
    source = torch.zeros(1 << 26, dtype=torch.float32, device=device())
    target = torch.empty_like(source)
    return 2 * source.numel() * source.itemsize / _median_seconds(lambda: target.copy_(source))


def _median_seconds(function: Callable[[], object], rounds: int = 3) -> float:
    seconds = []
    for _ in range(rounds + 1):
        synchronise()
        begin = time.perf_counter()
        function()
        synchronise()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])
