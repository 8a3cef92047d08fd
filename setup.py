"""Builds the native CPU library; everything else is declared in pyproject.toml.

The library is plain C++ behind the tensor ABI of apache-tvm-ffi: neither torch nor Python's headers are needed, and one
build serves every version of both. S3D_NATIVE=0 leaves it out, S3D_NATIVE=1 makes a missing compiler an error; without
either, a missing compiler is reported and the package installs without the library. CXX names the compiler, CXXFLAGS
adds flags.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-trapping-math", "-fno-math-errno"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas"]

# Source file: flags of its instruction set. The linker takes the first of several copies of a template function, so
# what every processor can run comes first.
SOURCES: dict[str, list[str]] = {"bindings.cc": [], "isa_generic.cc": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    SOURCES["isa_avx2.cc"] = ["-mavx2", "-mfma", "-mf16c"]
    SOURCES["isa_avx512.cc"] = ["-mavx512f", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]


def compiler() -> list[str] | None:
    """The C++ compiler and its first arguments, or None."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return None if found is None else [found]


def hash_of_sources() -> str:
    """What `s3d_kernels.backends.native` compares where it runs beside the sources."""
    digest = hashlib.sha256()
    for folder in ("cpu", "include"):
        for path in sorted(p for p in (CSRC / folder).rglob("*") if p.suffix in (".h", ".inl", ".cc")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def accepts(cxx: list[str], flags: list[str]) -> bool:
    """Whether a small program compiles and links with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cc"
        source.write_text("int main() { return 0; }\n")
        command = [*cxx, *flags, str(source), "-o", str(Path(folder) / "try")]
        return subprocess.run(command, capture_output=True).returncode == 0


class BuildLibrary(build_ext):
    """Compiles csrc/cpu to one shared library, each instruction set with its own flags."""

    def run(self) -> None:
        wish = os.environ.get("S3D_NATIVE", "")
        missing = "S3D_NATIVE=0" if wish == "0" else None if compiler() else "no C++ compiler: c++, g++, clang++ or CXX"
        if not missing:
            try:
                super().run()
                return
            except (OSError, subprocess.CalledProcessError) as error:
                missing = f"the compiler failed: {error}"
        if wish == "1":
            raise RuntimeError(f"S3D_NATIVE=1, but {missing}")
        self.announce(f"without the native CPU library ({missing}); the torch backend computes", level=4)
        for ext in self.extensions:  # one of an earlier build must not pass for this one
            for path in (self.get_ext_fullpath(ext.name), Path(self.build_lib) / self.get_ext_filename(ext.name)):
                Path(path).unlink(missing_ok=True)
        self.distribution.ext_modules = []
        self.extensions = []

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        import tvm_ffi.libinfo

        cxx = compiler()
        assert cxx is not None
        flags = [*FLAGS, *(f"-I{path}" for path in tvm_ffi.libinfo.include_paths())]
        flags.append(f'-DS3D_SOURCES="{hash_of_sources()}"')
        flags += [f"-I{CSRC}", f"-I{CSRC / 'include'}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
        openmp = ["-fopenmp"] if accepts(cxx, ["-fopenmp"]) else []
        if not openmp:
            self.announce("the compiler has no OpenMP: native kernels will use one thread", level=4)
        objects = Path(self.build_temp).absolute()
        objects.mkdir(parents=True, exist_ok=True)

        def compile_one(name: str) -> str:
            target = objects / f"{Path(name).stem}.o"
            command = [*cxx, *flags, *openmp, *SOURCES[name], "-c", str(CSRC / "cpu" / name), "-o", str(target)]
            subprocess.run(command, check=True)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, SOURCES))
        library = Path(self.get_ext_fullpath(ext.name)).absolute()
        library.parent.mkdir(parents=True, exist_ok=True)
        # libtvm_ffi is loaded before this library, by its Python package, and found by its name.
        ffi = Path(tvm_ffi.libinfo.find_libtvm_ffi())
        link = ["-shared", f"-L{ffi.parent}", "-ltvm_ffi", *openmp]
        subprocess.run([*cxx, *compiled, *link, "-o", str(library)], check=True)


class AnyPython(bdist_wheel):
    """The library does not depend on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2] if self.distribution.ext_modules else "any"


setup(
    ext_modules=[Extension("s3d_kernels.libs3d_cpu", [str(Path("csrc/cpu") / name) for name in SOURCES])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
)
