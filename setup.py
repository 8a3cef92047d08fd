"""Builds the native libraries; everything else is declared in pyproject.toml.

Both are plain C++ or CUDA C++ behind the tensor ABI of apache-tvm-ffi: neither torch nor Python's headers are needed,
and one build serves every version of both.

The library for CPU tensors: S3D_NATIVE=0 leaves it out, S3D_NATIVE=1 makes a missing compiler an error; without either,
a missing compiler is reported and the package installs without it. CXX names the compiler, CXXFLAGS adds flags.

The library for CUDA tensors: the same with S3D_CUDA, and nvcc, which is looked for in NVCC, PATH, CUDA_HOME,
/usr/local/cuda and the packages nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt and nvidia-cuda-runtime, where pip's
--no-build-isolation lets us see them. NVCC_APPEND_FLAGS adds flags.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"

CPU_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-trapping-math", "-fno-math-errno"]
CPU_FLAGS += ["-Wall", "-Wno-unknown-pragmas"]

# Source file: flags of its instruction set. The linker takes the first of several copies of a template function, so
# what every processor can run comes first.
CPU_SOURCES: dict[str, list[str]] = {"bindings.cc": [], "isa_generic.cc": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    CPU_SOURCES["isa_avx2.cc"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_SOURCES["isa_avx512.cc"] = ["-mavx512f", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]

CUDA_SOURCES = [*sorted(path.name for path in (CSRC / "cuda").glob("*.cu")), "bindings.cc"]
# Code for 8.0 runs on 8.6 and 8.9 too; what comes after 9.0 compiles the last one when it is loaded first.
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_FLAGS += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]


def cxx() -> list[str] | None:
    """The C++ compiler and its first arguments, or None."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return None if found is None else [found]


def nvcc() -> list[str] | None:
    """The CUDA compiler and its first arguments, or None."""
    if os.environ.get("NVCC"):
        return shlex.split(os.environ["NVCC"])
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders += sorted(str(path) for entry in sys.path if entry for path in Path(entry).glob("nvidia/cu*"))
    places = ["nvcc", *(str(Path(folder) / "bin" / "nvcc") for folder in folders if folder)]
    return next(([place] for place in places if shutil.which(place)), None)


def hash_of_sources(*folders: str) -> str:
    """What `s3d_kernels.backends.native_library` compares where it runs beside the sources."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in (CSRC / folder).glob("**/*") if p.suffix in (".h", ".inl", ".cc", ".cu", ".cuh")):
            if "tests" not in path.parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether a small program compiles and links with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cc"
        source.write_text("int main() { return 0; }\n")
        command = [*compiler, *flags, str(source), "-o", str(Path(folder) / "try")]
        return subprocess.run(command, capture_output=True).returncode == 0


def include_flags() -> list[str]:
    import tvm_ffi.libinfo

    return [f"-I{path}" for path in (*tvm_ffi.libinfo.include_paths(), CSRC, CSRC / "include")]


def ffi_flags() -> list[str]:
    """libtvm_ffi is loaded before our libraries, by its Python package, and found by its name."""
    import tvm_ffi.libinfo

    return ["-shared", f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi"]


def compile_all(commands: list[list[str]]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))


def build_cpu(library: Path, objects: Path) -> None:
    compiler = cxx()
    assert compiler is not None
    flags = [*CPU_FLAGS, *include_flags(), f'-DS3D_SOURCES="{hash_of_sources("cpu", "include")}"']
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    openmp = ["-fopenmp"] if accepts(compiler, ["-fopenmp"]) else []
    if not openmp:
        print("the compiler has no OpenMP: native kernels will use one thread")
    compiled = {name: str(objects / f"{Path(name).stem}.o") for name in CPU_SOURCES}
    compile_all(
        [
            [*compiler, *flags, *openmp, *CPU_SOURCES[name], "-c", str(CSRC / "cpu" / name), "-o", compiled[name]]
            for name in CPU_SOURCES
        ]
    )
    subprocess.run([*compiler, *compiled.values(), *ffi_flags(), *openmp, "-o", str(library)], check=True)


def build_cuda(library: Path, objects: Path) -> None:
    compiler = nvcc()
    assert compiler is not None
    flags = [*CUDA_FLAGS, *include_flags(), f'-DS3D_SOURCES="{hash_of_sources("cuda", "include")}"']
    compiled = {name: str(objects / f"{Path(name).stem}.o") for name in CUDA_SOURCES}
    compile_all(
        [
            [*compiler, *flags, "-x", "cu", "-c", str(CSRC / "cuda" / name), "-o", compiled[name]]
            for name in CUDA_SOURCES
        ]
    )
    # The runtime is linked statically, so that any torch and any driver of the same major version will do.
    subprocess.run([*compiler, *compiled.values(), *ffi_flags(), "-cudart=static", "-o", str(library)], check=True)


@dataclass(frozen=True)
class Library:
    """One library: the switch that forces or forbids it, what it needs, how it is built."""

    name: str
    switch: str
    compiler: Callable[[], list[str] | None]
    missing: str
    build: Callable[[Path, Path], None]

    @property
    def module(self) -> str:
        return f"s3d_kernels.libs3d_{self.name.lower()}"


LIBRARIES = [
    Library("CPU", "S3D_NATIVE", cxx, "no C++ compiler: c++, g++, clang++ or CXX", build_cpu),
    Library("CUDA", "S3D_CUDA", nvcc, "no nvcc in NVCC, PATH, CUDA_HOME, /usr/local/cuda or from pip", build_cuda),
]


class BuildLibraries(build_ext):
    """Builds each library, or says why not and leaves it out."""

    def run(self) -> None:
        for library in LIBRARIES:
            if os.environ.get(library.switch) == "0":
                self.leave_out(library, f"{library.switch}=0")
            elif library.compiler() is None:
                self.leave_out(library, library.missing)
        super().run()

    def build_extensions(self) -> None:
        for library in LIBRARIES:
            for ext in [ext for ext in self.extensions if ext.name == library.module]:
                try:
                    self.build_extension(ext)
                except (OSError, subprocess.CalledProcessError) as error:
                    self.leave_out(library, f"the compiler failed: {error}")

    def leave_out(self, library: Library, why: str) -> None:
        if os.environ.get(library.switch) == "1":
            raise RuntimeError(f"{library.switch}=1, but {why}")
        self.announce(f"without the native {library.name} library ({why}); other backends compute", level=4)
        # One of an earlier build must not pass for this one.
        for path in (
            self.get_ext_fullpath(library.module),
            Path(self.build_lib) / self.get_ext_filename(library.module),
        ):
            Path(path).unlink(missing_ok=True)
        self.extensions = [ext for ext in self.extensions if ext.name != library.module]
        self.distribution.ext_modules = self.extensions

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        objects = Path(self.build_temp).absolute() / ext.name
        objects.mkdir(parents=True, exist_ok=True)
        path = Path(self.get_ext_fullpath(ext.name)).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        next(library for library in LIBRARIES if library.module == ext.name).build(path, objects)


class AnyPython(bdist_wheel):
    """The libraries do not depend on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2] if self.distribution.ext_modules else "any"


setup(
    ext_modules=[Extension(library.module, []) for library in LIBRARIES],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython},
)
