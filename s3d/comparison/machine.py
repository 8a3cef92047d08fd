"""The machine that a comparison runs on, as it stands beside the results."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from s3d.data.workers import available_cores

PACKAGES = ("s3d", "numpy", "scipy", "monai", "dynamic-network-architectures", "triton")  # torch says its own version


def machine_rows() -> list[tuple[str, str]]:
    """Processor, cores, accelerators and versions, each with its name."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        match = re.search(r"model name\s*: (.*)", information.read_text(encoding="utf-8"))
        processor = match.group(1) if match else processor
    rows = [
        ("processor", f"{processor}, {available_cores()} cores, {torch.backends.cpu.get_cpu_capability()}"),
        ("system", f"{platform.system()}, Python {platform.python_version()}"),
    ]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        rows.append(("accelerators", f"{', '.join(names)}; CUDA {torch.version.cuda}"))
    versions = [f"torch {torch.__version__}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return [*rows, ("versions", ", ".join(versions))]
