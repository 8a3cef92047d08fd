"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from s3d_kernels import REGISTRY, backends
from s3d_kernels.backends.measurements import drop_dependents
from s3d_kernels.backends.native import NativeBackend
from s3d_kernels.backends.triton_kernels import TritonBackend

from . import emulated_cuda


@pytest.fixture(scope="session")
def emulated_library(pytestconfig: pytest.Config) -> Path:
    """The CUDA kernels, compiled for the CPU once for all tests."""
    assert pytestconfig.cache is not None
    return emulated_cuda.build(pytestconfig.cache.mkdir("emulated_cuda"))


@pytest.fixture(scope="module")
def emulated(emulated_library: Path) -> Iterator[NativeBackend]:
    """The CUDA kernels as one more backend, for CPU tensors."""
    backend = emulated_cuda.backend(emulated_library)
    backends.register(backend, first=False)
    yield backend
    del REGISTRY[backend.name]
    drop_dependents()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[TritonBackend]:
    """The Triton kernels under Triton's interpreter, as one more backend for CPU tensors."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles for a GPU here: tests/kernels/test_gpu.py runs its kernels")
    backend = TritonBackend("interpreted triton", ("cpu",))
    backends.register(backend, first=False)
    yield backend
    del REGISTRY[backend.name]
    drop_dependents()
