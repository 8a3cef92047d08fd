"""What nvcc makes of `csrc/cuda`, on every architecture: tensor-core instructions and no spills."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from s3d_kernels.backends.native import CUDA

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# The multiplication, the load of its fragments, and the copy of 16 bytes from global to shared memory.
INSTRUCTIONS = (r"\bHMMA\.", r"\bLDSM\.", r"\bLDGSTS\.(?:\w+\.)*128\b")


class Kernel(NamedTuple):
    name: str
    stack_bytes: int
    sass: str


def tool(name: str) -> str:
    """A program of the CUDA toolkit: on the path, or from Triton's package."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton", reason=f"no {name}: neither on the path nor with triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
        if not os.access(found, os.X_OK):
            pytest.skip(f"no {name}: neither on the path nor with triton")
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def known_architectures(nvcc: str) -> list[str]:
    known = set(run(nvcc, "--list-gpu-code").split())
    return [architecture for architecture in ARCHITECTURES if architecture in known]


def compile_cubin(nvcc: str, source: Path, architecture: str, folder: Path) -> Path:
    cubin = folder / f"{source.stem}_{architecture}.cubin"
    flags = f"-std=c++17 -Werror=all-warnings -cubin -arch={architecture}".split()
    run(nvcc, *flags, f"-I{CSRC}", f"-I{CSRC / 'include'}", "-o", str(cubin), str(source))
    return cubin


def kernels_of(cubin: Path) -> list[Kernel]:
    """Each kernel's resources and disassembly."""
    dump = tool("cuobjdump")
    usage = run(dump, "--dump-resource-usage", str(cubin))
    sass = run(tool("nvdisasm"), "-c", str(cubin))
    kernels = []
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        start = sass.index(f".text.{name}:")
        end = sass.find("//--------------------- .text.", start)
        kernels.append(Kernel(name, resources["STACK"] + resources["LOCAL"], sass[start:end]))
    return kernels


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc")
    return found if found is not None else pytest.skip("no nvcc")


def test_gemm_uses_tensor_cores_and_does_not_spill(nvcc: str, tmp_path: Path) -> None:
    source = CSRC / "emulator" / "tests" / "gemm.cu"
    architectures = known_architectures(nvcc)
    assert architectures, "nvcc knows none of the architectures"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = list(pool.map(lambda architecture: compile_cubin(nvcc, source, architecture, tmp_path), architectures))
    for architecture, cubin in zip(architectures, cubins):
        kernels = kernels_of(cubin)
        assert len(kernels) == 3, f"{architecture}: bfloat16, half and TF32"
        for kernel in kernels:
            where = f"{kernel.name} for {architecture}"
            assert kernel.stack_bytes == 0, f"{where} uses local memory"
            for instruction in INSTRUCTIONS:
                assert re.search(instruction, kernel.sass), f"{where}: no {instruction}"


def test_every_wrapper_compiles(nvcc: str, tmp_path: Path) -> None:
    cubin = compile_cubin(nvcc, CSRC / "emulator" / "tests" / "every_wrapper.cu", "sm_80", tmp_path)
    kernels = kernels_of(cubin)
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.stack_bytes == 0
        for instruction in (
            r"\bLDSM\.16\.MT88\.4\b",
            r"\bLDSM\.16\.M88\.2\b",
            r"\bLDGSTS\.E\.64\b",
            r"\bSTG\.E\.128\b",
        ):
            assert re.search(instruction, kernel.sass), f"{kernel.name}: no {instruction}"


def check_kernels(cubins: list[Path], architecture: str) -> None:
    """No kernel uses local memory; those that multiply use tensor cores, except in exact float32."""
    kernels = [kernel for cubin in cubins for kernel in kernels_of(cubin)]
    multiplying = set()
    for kernel in kernels:
        where = f"{kernel.name} for {architecture}"
        assert kernel.stack_bytes == 0, f"{where} uses local memory"
        found = re.search("conv3d_(gather|halo|pairs|grad_weight|grad_weight_halo|stem|stem_grad_weight)_kernel", where)
        if found is None:
            continue
        multiplying.add(found[1])
        # The forward stem reads number by number.
        if found[1] != "stem":
            assert re.search(INSTRUCTIONS[2], kernel.sass), f"{where}: no asynchronous copies of 16 bytes"
        exact = "MathE1E" in kernel.name
        assert bool(re.search(INSTRUCTIONS[0], kernel.sass)) != exact, f"{where}: tensor cores"
        # ldmatrix does not transpose float, so the gradient of the weight loads it number by number.
        if not exact and not ("grad_weight" in found[1] and "kernelIf" in kernel.name):
            assert re.search(INSTRUCTIONS[1], kernel.sass), f"{where}: no ldmatrix"
    assert len(multiplying) == 7, f"{architecture}: {multiplying}"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_kernels_of_the_installed_library(architecture: str, tmp_path: Path) -> None:
    if not CUDA.path.exists():
        pytest.skip(f"not built: {CUDA.missing}")
    command = [tool("cuobjdump"), "--extract-elf", "all", "--gpu-architecture", architecture, str(CUDA.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_kernels(sorted(tmp_path.glob("*.cubin")), architecture)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_without_warnings_on_every_architecture(nvcc: str, tmp_path: Path, architecture: str) -> None:
    if architecture not in known_architectures(nvcc):
        pytest.skip(f"this nvcc does not know {architecture}")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = list(pool.map(lambda source: compile_cubin(nvcc, source, architecture, tmp_path), sources))
    check_kernels(cubins, architecture)
