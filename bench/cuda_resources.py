"""Prints what nvcc makes of every CUDA kernel, as the table in docs/performance.md.

Usage: python bench/cuda_resources.py [ARCHITECTURE ...]      (default: all that this nvcc knows from sm_80 on)
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def compiled(source: Path, architecture: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of stack and bytes spilled of each kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas=-v", f"-I{CSRC}"]
        command += [f"-I{CSRC / 'include'}", "-o", str(Path(folder) / "out.cubin"), str(source)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    pattern = r"entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    return {
        name: (int(registers), int(stack), int(spilled))
        for name, stack, spilled, registers in re.findall(pattern, log, flags=re.DOTALL)
    }


def kernel_of(mangled: str) -> str:
    """Name of a kernel without its namespaces and template arguments."""
    rest, name = mangled.partition("_ZN")[2], ""
    while rest[:1].isdigit():  # names stand behind their lengths
        length = re.match(r"\d+", rest)[0]  # type: ignore[index]
        name, rest = rest[len(length) :][: int(length)], rest[len(length) + int(length) :]
    return name


def main(architectures: list[str]) -> None:
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    jobs = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compiled(*job), jobs))
    rows: dict[tuple[str, str], dict[str, list[tuple[int, int, int]]]] = defaultdict(lambda: defaultdict(list))
    for (source, architecture), kernels in zip(jobs, results, strict=True):
        for name, resources in kernels.items():
            rows[source.name, kernel_of(name)][architecture].append(resources)
    print(f"| kernel | variants | {' | '.join(architectures)} | stack, spilled |")
    print(f"| --- | ---: | {' | '.join('---:' for _ in architectures)} | ---: |")
    for (_, kernel), found in sorted(rows.items()):
        cells = []
        for architecture in architectures:
            registers = [resources[0] for resources in found[architecture]]
            cells.append(f"{min(registers)}-{max(registers)}" if len(set(registers)) > 1 else str(registers[0]))
        worst = max(stack + spilled for each in found.values() for _, stack, spilled in each)
        variants = len(found[architectures[0]])
        print(f"| `{kernel}` | {variants} | {' | '.join(cells)} | {worst} |")


if __name__ == "__main__":
    known = subprocess.run(["nvcc", "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    main(sys.argv[1:] or [name for name in ARCHITECTURES if name in known])
