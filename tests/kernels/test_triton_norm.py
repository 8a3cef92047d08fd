"""The Triton kernels for normalisation, pooling and blocks under Triton's interpreter, on CPU tensors.

Volumes are small, for the interpreter takes as long for a tile of one number as for one of thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import oracle
import pytest
import torch
from torch import Tensor

from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, backends, functional, use_backend
from s3d_kernels.backends.interface import BlockGeometry, WindowGeometry
from s3d_kernels.backends.reference import ReferenceBackend
from s3d_kernels.backends.triton_kernels import TritonBackend
from s3d_kernels.block_sparse import block_geometry

from .test_operators import CASES, TOLERANCE, Case, assert_close, draw, expected, run, seeded, tolerances

pytest.importorskip("triton")
moments = pytest.importorskip("s3d_kernels.backends.triton_kernels.moments")
norm = pytest.importorskip("s3d_kernels.backends.triton_kernels.norm")

REFERENCE = ReferenceBackend()
HALVES = [torch.bfloat16, torch.float16]
MASKS: dict[str, Callable[[], BlockMask]] = {
    "side 4, unequal": lambda: BlockMask.random(2, (1, 2, 2), 4, (0.25, 0.75), seeded(1)),
    "side 1": lambda: BlockMask.random(2, (3, 4, 3), 1, 0.7, seeded(3)),
    "anisotropic": lambda: BlockMask.random(2, (3, 1, 2), (1, 4, 6), 0.5, seeded(4)),
    "empty sample": lambda: BlockMask.from_grid(torch.tensor([1, 0, 0, 0, 1, 1]).view(3, 1, 2, 1) > 0, 4),
    "nothing": lambda: BlockMask.random(2, (1, 1, 2), 4, 1.0),
    "voxels": lambda: BlockMask.from_voxels(torch.rand(1, 5, 6, 7, generator=seeded(5)) < 0.3, 4),
}
NORMS = [case for case in CASES if "norm" in case.name and not case.name.startswith("conv")]
POOLS = [case for case in CASES if case.name.startswith(("average", "maximum"))]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[TritonBackend]:
    """The Triton kernels as one more backend, for CPU tensors."""
    backend = TritonBackend("interpreted triton", devices=("cpu",))
    backends.register(backend, first=False)
    yield backend
    del REGISTRY[backend.name]
    backends._chosen.clear()


def check(backend: TritonBackend, case: Case, name: str, dtype: torch.dtype) -> None:
    """Compare with the oracle, and NaN at masked voxels with zeros."""
    mask = MASKS[name]()
    if case.needs_even and any(side % 2 for side in mask.shape):
        return
    truth = expected(case, mask)
    allowed = tolerances(case, mask, dtype, truth)
    got = run(case, mask, dtype, backend.name)
    zeros = run(case, mask, dtype, backend.name, masked=0.0)
    for i, (a, b, c) in enumerate(zip(got, truth, zeros, strict=True)):
        assert torch.equal(a, c), f"{name}, result {i}: NaN at masked voxels changed it"
        assert_close(a, b, dtype, allowed[i], f"{name}, result {i}")


@pytest.mark.parametrize("name", list(MASKS))
@pytest.mark.parametrize("case", [*NORMS, *POOLS], ids=lambda c: c.name)
def test_against_the_oracle(case: Case, name: str, interpreted: TritonBackend) -> None:
    check(interpreted, case, name, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [NORMS[0], NORMS[-1], POOLS[0], POOLS[-1]], ids=lambda c: c.name)
def test_half_precision(case: Case, dtype: torch.dtype, interpreted: TritonBackend) -> None:
    for name in ("side 4, unequal", "voxels"):
        check(interpreted, case, name, dtype)


