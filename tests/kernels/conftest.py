"""Fixtures of several files."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from s3d_kernels import REGISTRY, backends
from s3d_kernels.backends import UnsupportedProblem
from s3d_kernels.backends.measurements import drop_dependents
from s3d_kernels.backends.native import NativeBackend
from s3d_kernels.backends.triton_kernels import TritonBackend

from . import emulated_cuda

# The backend whose package need not be there, and which has neither half precision on CPUs nor groups.
OPTIONAL = "spconv"
MAY_REFUSE = re.compile(
    r"on cpu it computes float32 and float64, not torch\.b?float16$"
    r"|on cuda it computes float32 and float16, not torch\.(bfloat16|float64)$"
    r"|spconv has no groups, and "
    r"|the package spconv is not installed"
    r"|\S*spconv.* cannot be imported by Python "
    r"|this build of spconv has no kernels for this GPU$"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """What the optional backend may refuse is skipped for its reason; any other refusal fails."""
    try:
        return (yield)
    except UnsupportedProblem as refusal:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if parameters.get("backend") != OPTIONAL or not MAY_REFUSE.match(refusal.reason):
            raise
        pytest.skip(refusal.reason)


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
