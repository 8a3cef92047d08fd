"""`pytest bench/ --benchmark` measures; without the option every benchmark runs once, tiny, as a smoke test."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contenders import CONTENDERS, able
from report import write_report
from settings import Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("s3d benchmarks")
    group.addoption("--benchmark", action="store_true", help="measure (without it: run once, tiny)")
    group.addoption("--patch-size", type=int, default=96, help="voxels along each axis; 160 as published")
    group.addoption("--mask-ratios", default="0,0.6,0.75,0.9", help="comma-separated")
    group.addoption(
        "--contenders",
        default="",
        help=f"comma-separated, of {', '.join(CONTENDERS)}; default: all that can compute here",
    )
    group.addoption("--rounds", type=int, default=3, help="timed rounds of each case")
    group.addoption("--results", default="", help="folder; default: bench/results/<machine>")


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    option = request.config.getoption
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = tuple(option("--contenders").split(",")) if option("--contenders") else able(device, torch.float32)
    unknown = set(names) - set(CONTENDERS)
    if unknown:
        raise pytest.UsageError(f"--contenders must be of {', '.join(CONTENDERS)}, got {', '.join(sorted(unknown))}")
    if not option("--benchmark"):
        return Settings(False, "tiny", 16, 8, (0.75,), names, 1)
    ratios = tuple(float(ratio) for ratio in option("--mask-ratios").split(","))
    return Settings(True, "resenc-l", option("--patch-size"), 32, ratios, names, option("--rounds"))


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows that benchmarks add; written as JSON, Markdown and a plot at the end of a measured run."""
    rows: list[dict[str, Any]] = []
    yield rows
    if request.config.getoption("--benchmark") and rows:
        machine = describe_machine()
        given = request.config.getoption("--results")
        folder = Path(given) if given else Path(__file__).parent / "results" / machine["slug"]
        text = write_report(rows, machine, folder)
        reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\n{text}\nwritten to {folder}")


def describe_machine() -> dict[str, Any]:
    """Processor, accelerator, versions and threads."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        match = re.search(r"model name\s*: (.*)", information.read_text())
        processor = match.group(1) if match else processor
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor}, {torch.get_num_threads()} threads"
    )
    return {
        "device": device,
        "slug": re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
