"""The compiled libraries of the backend "native": one for CPU tensors and one for CUDA tensors, beside the package."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parents[1]
SOURCES = PACKAGE.parent / "csrc"  # beside an editable installation only


def hash_of_sources(folders: tuple[str, ...], root: Path = SOURCES) -> str:
    """Of the files that a library is compiled from, as in setup.py."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in (root / folder).glob("**/*") if p.suffix in (".h", ".inl", ".cc", ".cu", ".cuh")):
            if "tests" not in path.parts:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class NativeLibrary:
    """One library, loaded when it is first asked for.

    Attributes:
        name: as messages call it.
        path: where it is built.
        folders: of `csrc`, from which it is compiled.
        dtypes: of features that it computes.
        setting: the last argument of its functions: the number of threads, or whether float32 may be rounded to TF32.
        missing: why there may be no file at `path`.
        device_reason: why the present device cannot run it, or None.
        on_load: called with the library once it is loaded.
        check_first_use: whether kernels are compared with `reference` before the first use of each in a process.
        fuses: whether it has convolutions that do the work of the norms around them.
        upconvolves: whether it has an up-convolution of its own; without, that is made of convolutions.
    """

    name: str
    path: Path
    folders: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    setting: Callable[[], int]
    missing: str
    device_reason: Callable[[], str | None] = lambda: None
    on_load: Callable[[Any], None] = lambda library: None
    check_first_use: bool = False
    fuses: bool = False
    upconvolves: bool = False

    def why_not(self) -> str | None:
        """None if it can be used, otherwise the reason in a short sentence."""
        return self.device_reason() or self._loaded[1]

    def functions(self) -> Any:
        """What the library exports.

        Raises:
            RuntimeError: it is not there; says why.
        """
        library, reason = self._loaded
        if library is None:
            raise RuntimeError(reason)
        return library

    @cached_property
    def _loaded(self) -> tuple[Any, str | None]:
        if not self.path.exists():
            return None, f"the native {self.name} library was not built: {self.missing}"
        try:
            import tvm_ffi

            library = tvm_ffi.load_module(str(self.path))
            sources = str(library.sources())
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reason = f"the native {self.name} library cannot be loaded: {str(error).splitlines()[0]}"
            warnings.warn(f"{reason}; the slower torch backend computes", stacklevel=2)
            return None, reason
        if SOURCES.is_dir() and sources != hash_of_sources(self.folders):
            reason = f"the native {self.name} library was built from other sources than those in csrc: install again"
            warnings.warn(f"{reason}; the slower torch backend computes", stacklevel=2)
            return None, reason
        self.on_load(library)
        return library, None
