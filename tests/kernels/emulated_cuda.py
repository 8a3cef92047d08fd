"""The CUDA kernels as one more device: compiled as C++ and run by the emulator of `csrc/emulator` on CPU tensors."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import tvm_ffi.libinfo

from s3d_kernels.backends.native import CUDA, NativeBackend
from s3d_kernels.backends.native_library import NativeLibrary, hash_of_sources

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FOLDERS = ("cuda", "emulator", "include")
NAME = "emulated cuda"


def build(folder: Path) -> Path:
    """Compile the library into a folder, if it is not there yet. Returns: its path; beside it lie `objects_of` it."""
    sources = hash_of_sources(FOLDERS, CSRC)
    library = folder / f"libs3d_emulated_{sources}.so"
    objects = objects_of(library)
    if library.exists():
        return library
    for old in folder.glob("objects*"):
        shutil.rmtree(old)
    objects.mkdir(parents=True)
    cxx = os.environ.get("CXX", "c++").split()
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DS3D_EMULATOR"]
    flags += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += [f"-I{path}" for path in (*tvm_ffi.libinfo.include_paths(), CSRC, CSRC / "include")]
    flags.append(f'-DS3D_SOURCES="{sources}"')
    files = [*(CSRC / "emulator").glob("*.cc"), *(CSRC / "cuda").glob("*.cu"), CSRC / "cuda" / "bindings.cc"]

    def compile_one(source: Path) -> str:
        target = str(objects / f"{source.parent.name}_{source.name}.o")
        subprocess.run([*cxx, *flags, "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_one, files))
    ffi = Path(tvm_ffi.libinfo.find_libtvm_ffi())
    # Renamed at the end, so that a build that was cut off is not taken for one.
    unfinished = library.with_suffix(".unfinished")
    subprocess.run([*cxx, "-shared", *compiled, f"-L{ffi.parent}", "-ltvm_ffi", "-o", str(unfinished)], check=True)
    return unfinished.rename(library)


def objects_of(library: Path) -> Path:
    """The folder of what a library was linked from, which csrc/tests/run.sh can link with its tests."""
    return library.with_name(library.name.replace("libs3d_emulated", "objects").removesuffix(".so"))


def backend(library: Path) -> NativeBackend:
    """The backend that computes on CPU tensors with the emulated library."""
    missing = "not compiled"
    cpu = NativeLibrary(NAME, library, FOLDERS, CUDA.dtypes, CUDA.setting, missing, fuses=CUDA.fuses)
    return NativeBackend(NAME, {"cpu": cpu})


def use_seed(backend: NativeBackend, seed: int) -> None:
    """Fix the order in which blocks and warps run."""
    backend._libraries["cpu"].functions().use_seed(seed)


def take_launches(backend: NativeBackend) -> list[str]:
    """Names of the kernels that were launched since the last call."""
    return [str(name) for name in backend._libraries["cpu"].functions().take_launches()]


def exactly() -> torch.backends.cudnn.flags:  # type: ignore[name-defined]
    """A context in which float32 may not be rounded to TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
