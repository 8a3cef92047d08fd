"""What the installed distribution promises: its version, what it brings along and how light the library imports."""

import ast
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import s3d
import s3d_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("s3d", "s3d_kernels")


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements(*, of_extras: bool) -> set[str]:
    """Names of the distributions that the base installation, or any of the extras, asks for."""
    requirements = metadata.requires("s3d") or []
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements if ("extra ==" in line) == of_extras]
    return {_normalised(name) for name in names} - {"s3d"}  # an extra may name another extra of ours


def _modules_of(distribution: str) -> set[str]:
    """Top-level modules of a distribution; none where it is not installed and so cannot be imported."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return set()
    return {path.parts[0].removesuffix(".py") for path in files if path.suffix == ".py" and ".." not in path.parts}


def _import_in_new_process(*names: str) -> tuple[float, set[str]]:
    """Seconds that importing `names` takes once torch and numpy are there, and the top-level modules it brings."""
    program = f"""
import sys, time
import numpy, torch
before = set(sys.modules)
start = time.perf_counter()
import {", ".join(names)}
seconds = time.perf_counter() - start
print((seconds, {{name.partition(".")[0] for name in set(sys.modules) - before}}))
"""
    # -I: neither the current folder nor PYTHONPATH, so that what is installed is what is measured.
    run = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True, timeout=120)
    seconds, modules = ast.literal_eval(run.stdout)
    return seconds, modules


def test_version_stands_in_one_place() -> None:
    assert metadata.version("s3d") == s3d_kernels.__version__ == s3d.__version__
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "CITATION.cff"]
    files += [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    # Not a part of a longer number, nor the bound of a requirement.
    version = re.compile(r"(?<![\d.<>=~])" + re.escape(s3d_kernels.__version__) + r"(?![\d.])")
    assert [path for path in files if version.search(path.read_text())] == [ROOT / "s3d_kernels" / "_version.py"]


def test_base_dependencies() -> None:
    assert _requirements(of_extras=False) == {"torch", "numpy", "apache-tvm-ffi"}


def test_console_script_is_registered() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="s3d")
    assert script.value == "s3d.cli:main"
    assert callable(script.load())


def test_library_imports_nothing_of_the_method_or_the_extras() -> None:
    names_of_extras = _requirements(of_extras=True)
    assert {"nibabel", "tyro", "matplotlib", "dynamic-network-architectures"} <= names_of_extras
    forbidden = set().union(*(_modules_of(name) for name in names_of_extras))
    assert {"nibabel", "tyro", "matplotlib", "dynamic_network_architectures"} <= forbidden

    _, modules = _import_in_new_process("s3d_kernels")
    assert "s3d_kernels" in modules
    assert not modules & (forbidden | {"s3d"})


def test_library_imports_quickly() -> None:
    fastest = min(_import_in_new_process("s3d_kernels")[0] for _ in range(3))
    assert fastest < 0.3, f"import s3d_kernels takes {fastest:.2f} s beyond torch and numpy"


def test_library_declares_its_types() -> None:
    assert (Path(s3d_kernels.__file__).parent / "py.typed").is_file()


def test_installation_holds_the_packages_and_nothing_else() -> None:
    distribution = metadata.distribution("s3d")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable", False):
        pytest.skip("an editable installation holds no copy of the packages")
    assert Path(s3d_kernels.__file__).parent == Path(str(distribution.locate_file("s3d_kernels")))
    assert Path(s3d.__file__).parent == Path(str(distribution.locate_file("s3d")))

    here = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    files = [path.as_posix() for path in distribution.files or () if ".." not in path.parts]
    installed = {path for path in files if path.endswith(".py")}
    assert "s3d_kernels/libs3d_cpu.so" in files, "the native library was not built"
    assert installed == here, "the installation is not of this working copy, or a package is missing from it"
    assert {path.partition("/")[0] for path in files if ".dist-info/" not in path} == set(PACKAGES)
