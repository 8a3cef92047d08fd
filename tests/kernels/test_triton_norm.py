"""The Triton kernels for normalisation, pooling and blocks under Triton's interpreter, on CPU tensors.

Volumes are small, for the interpreter takes as long for a tile of one number as for one of thousands.
"""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor

from s3d_kernels import BlockMask, BlockSparseTensor, functional, use_backend
from s3d_kernels.backends.interface import BlockGeometry, WindowGeometry
from s3d_kernels.backends.reference import ReferenceBackend
from s3d_kernels.backends.triton_kernels import TritonBackend
from s3d_kernels.block_sparse import block_geometry

from .test_operators import CASES, TOLERANCE, Case, assert_close, draw, expected, run, seeded, tolerances

pytest.importorskip("triton")
moments, norm, tiles = (
    pytest.importorskip(f"s3d_kernels.backends.triton_kernels.{name}") for name in ("moments", "norm", "tiles")
)

REFERENCE = ReferenceBackend()
HALVES = [torch.bfloat16, torch.float16]
MASKS: dict[str, Callable[[], BlockMask]] = {
    "side 4, unequal": lambda: BlockMask.random(2, (1, 2, 2), 4, (0.25, 0.75), seeded(1)),
    "side 1": lambda: BlockMask.random(2, (3, 4, 3), 1, 0.7, seeded(3)),
    "anisotropic": lambda: BlockMask.random(2, (3, 1, 2), (1, 4, 6), 0.5, seeded(4)),
    "empty sample": lambda: BlockMask.from_grid(torch.tensor([1, 0, 0, 0, 1, 1]).view(3, 1, 2, 1) > 0, 4),
    "nothing": lambda: BlockMask.random(2, (1, 1, 2), 4, 1.0),
    "voxels": lambda: BlockMask.from_voxels(torch.rand(1, 3, 4, 3, generator=seeded(5)) < 0.4, 2),
}
NORMS = [case for case in CASES if "norm" in case.name and not case.name.startswith("conv")]
POOLS = [case for case in CASES if case.name.startswith(("average", "maximum"))]
SLOW = "average 3 without padding"  # in both directions 27 taps, and the count of each


def check(backend: TritonBackend, case: Case, name: str, dtype: torch.dtype) -> None:
    """Compare with the oracle, and NaN at masked voxels of stored blocks with zeros."""
    mask = MASKS[name]()
    if case.needs_even and any(side % 2 for side in mask.shape):
        return
    truth = expected(case, mask)
    allowed = tolerances(case, mask, dtype, truth)
    got = run(case, mask, dtype, backend.name)
    for i, (a, b) in enumerate(zip(got, truth, strict=True)):
        assert_close(a, b, dtype, allowed[i], f"{name}, result {i}")
    if mask.voxels is not None:
        for i, (a, b) in enumerate(zip(got, run(case, mask, dtype, backend.name, masked=0.0), strict=True)):
            assert torch.equal(a, b), f"{name}, result {i}: NaN at masked voxels changed it"


@pytest.mark.parametrize("case", [*NORMS, *POOLS], ids=lambda c: c.name)
def test_against_the_oracle(case: Case, interpreted: TritonBackend) -> None:
    for name in ["voxels"] if case.name == SLOW else MASKS:
        check(interpreted, case, name, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [NORMS[0], NORMS[-1], POOLS[0], POOLS[-1]], ids=lambda c: c.name)
def test_half_precision(case: Case, dtype: torch.dtype, interpreted: TritonBackend) -> None:
    for name in ("anisotropic", "voxels"):
        check(interpreted, case, name, dtype)


def geometry_of(name: str) -> BlockGeometry:
    return block_geometry(MASKS[name]())


def features(geometry: BlockGeometry, channels: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[V, *block, C], NaN at masked voxels."""
    x = draw((len(geometry.index), *geometry.block, channels), seed, dtype)
    return x if geometry.voxels is None else torch.where(geometry.voxels[..., None], x, float("nan"))


def assert_agree(got: object, truth: object, tolerance: float = TOLERANCE[torch.float32]) -> None:
    """Results of a raw kernel and of the reference, both one tensor or several; NaN stands where NaN stood."""
    pairs = zip(*(t if isinstance(t, tuple) else (t,) for t in (got, truth)), strict=True)
    for i, (a, b) in enumerate(pairs):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")


def norm_results(backend: object, geometry: BlockGeometry, channels: int, slope: float) -> list[object]:
    """Of every raw kernel, with features that are not contiguous."""
    x, grad, y = (features(geometry, 2 * channels, seed)[..., ::2] for seed in (1, 2, 3))
    tables = [draw((geometry.batch, channels), 4 + i, torch.float32) for i in range(5)]
    return [
        backend.norm_statistics(x, geometry),  # type: ignore[attr-defined]
        backend.norm_apply(x, *tables[:3], None, slope, geometry),  # type: ignore[attr-defined]
        backend.norm_apply(x, *tables[:3], y, slope, geometry),  # type: ignore[attr-defined]
        backend.norm_grad_sums(grad, x, *tables[:2], geometry),  # type: ignore[attr-defined]
        backend.norm_grad_activation(grad, x, None, *tables[:4], slope, geometry),  # type: ignore[attr-defined]
        backend.norm_grad_activation(grad, x, y, *tables[:4], slope, geometry),  # type: ignore[attr-defined]
        backend.norm_grad_input(grad, x, *tables, geometry),  # type: ignore[attr-defined]
    ]


@pytest.mark.parametrize("channels", [1, 3, 40])
@pytest.mark.parametrize("steps", [1, 8])
def test_raw_norms(channels: int, steps: int, interpreted: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels that fill tiles and do not; a program for each tile of a sample and one for all of them."""
    monkeypatch.setattr(norm, "STEPS", steps)
    for name, slope in (("side 4, unequal", 0.1), ("voxels", 0.0)):
        geometry = geometry_of(name)
        got, truth = (norm_results(backend, geometry, channels, slope) for backend in (interpreted, REFERENCE))
        for a, b in zip(got, truth, strict=True):
            # A sum over voxels is as wrong as its largest terms are.
            assert_agree(a, b, 1e-4)


def test_samples_are_cut_into_splits(interpreted: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "STEPS", 1)
    geometry = geometry_of("side 4, unequal")
    x = features(geometry, 128, 0)
    assert norm._shares(geometry, norm.MOST_SUMMING_PROGRAMS, x).splits == 12
    assert norm._shares(geometry, 4, x).splits == 2
    assert_agree(interpreted.norm_statistics(x, geometry), REFERENCE.norm_statistics(x, geometry), 1e-4)


@pytest.mark.parametrize("name", ["side 4, unequal", "voxels"])
def test_statistics_are_safe_far_from_zero(name: str, interpreted: TritonBackend) -> None:
    mask = MASKS[name]()
    x = torch.randn(mask.batch, 3, *mask.shape, generator=seeded(0)) + 1e4
    with use_backend(interpreted.name):
        y = functional.sparse_instance_norm(BlockSparseTensor.from_dense(x, mask)).to_dense()
    truth = oracle.norm(x.double(), mask.to_dense(), None, None, 1e-5, 3)
    assert float((y - truth).norm() / truth.norm()) < 1e-6 * 1e4 / 4


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, of what is not chosen
def test_relu_of_infinity_is_zero_and_of_nan_nan(interpreted: TritonBackend) -> None:
    geometry = geometry_of("side 1")
    specials = torch.tensor([float("inf"), -float("inf"), float("nan"), -1.0, 0.0])
    x = specials[torch.arange(len(geometry.index) * 2) % 5].view(-1, 1, 1, 1, 2)
    grad = specials[torch.arange(len(geometry.index) * 2) % 4].view(-1, 1, 1, 1, 2)
    zeros, ones = torch.zeros(geometry.batch, 2), torch.ones(geometry.batch, 2)
    for slope in (0.0, 0.1):
        got, truth = (b.norm_apply(x, zeros, ones, zeros, None, slope, geometry) for b in (interpreted, REFERENCE))
        assert_agree(got, truth)
        before, expected_before = (
            b.norm_grad_activation(grad, x, y, zeros, ones, ones, zeros, slope, geometry)[0]
            for b, y in ((interpreted, None), (REFERENCE, x))
        )
        assert_agree(before, expected_before)


def test_samples_without_voxels_sum_to_zero(interpreted: TritonBackend) -> None:
    geometry = geometry_of("empty sample")
    x, mean = features(geometry, 3, 0), torch.zeros(geometry.batch, 3)
    empty = geometry.sample_offsets.diff() == 0
    rstd = torch.where(empty[:, None], float("inf"), 1.0).expand(-1, 3)
    for sums in (*interpreted.norm_statistics(x, geometry), *interpreted.norm_grad_sums(x, x, mean, rstd, geometry)):
        assert torch.equal((sums == 0).all(1), empty)


@pytest.mark.parametrize("parts_per_block", [1, 300])
def test_merging_of_moments(parts_per_block: int, interpreted: TritonBackend) -> None:
    """On one level and on two; a sample without blocks, parts that count nothing, a sample of only such parts."""
    offsets = torch.tensor([0, 2, 2, 4, 5], dtype=torch.int32)
    channels, parts = 5, 5 * parts_per_block
    assert (parts > 4 * moments.ONE_LEVEL) == (parts_per_block == 300)
    counts = torch.randint(0, 4, (parts,), generator=seeded(1)).float()
    counts[-parts_per_block:] = 0
    values = torch.randn(parts, 3, channels, generator=seeded(2)) + 1e3
    shown = torch.arange(3) < counts[:, None]  # [parts, 3]
    means, squares = torch.full((2, parts, channels), float("nan"))
    for part in counts.nonzero()[:, 0].tolist():
        of_part = values[part, shown[part]].double()
        means[part] = of_part.mean(0)
        squares[part] = (of_part - of_part.mean(0)).square().sum(0)
    mean, spread = moments.merge(counts, means, squares, offsets, parts_per_block, 4)
    for sample in range(4):
        rows = slice(int(offsets[sample]) * parts_per_block, int(offsets[sample + 1]) * parts_per_block)
        of_sample = values[rows][shown[rows]].double()
        if len(of_sample) == 0:
            assert not mean[sample].any()
            assert not spread[sample].any()
            continue
        torch.testing.assert_close(mean[sample].double(), of_sample.mean(0), rtol=1e-7, atol=0)
        truth = (of_sample - of_sample.mean(0)).square().sum(0)
        torch.testing.assert_close(spread[sample].double(), truth, rtol=1e-3, atol=0)  # means are rounded to 6e-5


def far_faces() -> BlockGeometry:
    """Whole blocks that reach beyond a volume."""
    grid = torch.rand(2, 2, 2, 3, generator=seeded(0)) < 0.6
    mask = BlockMask.from_grid(grid, (4, 3, 2))
    return BlockGeometry(mask.index, None, mask.sample_offsets, 2, (5, 6, 5), (4, 3, 2))


@pytest.mark.parametrize("name", [*MASKS, "far faces"])
@pytest.mark.parametrize("channels", [1, 5])
def test_blocks_of_any_volume_and_back(channels: int, name: str, interpreted: TritonBackend) -> None:
    geometry = far_faces() if name == "far faces" else geometry_of(name)
    d, h, w = geometry.shape
    wider = draw((geometry.batch, 2 * d, channels, w, h + 1), 1, torch.bfloat16)
    view = wider[:, 1::2, :, :, 1:].permute(0, 2, 1, 4, 3)
    for dense in (view, view.contiguous(), view.contiguous(memory_format=torch.channels_last_3d)):
        got = interpreted.gather_blocks(dense, geometry)
        assert torch.equal(got, REFERENCE.gather_blocks(dense, geometry))
    x = features(geometry, 2 * channels, 2, torch.float16)[..., 1::2]
    fill = draw((channels,), 3, torch.float16)
    back = interpreted.scatter_blocks(x, fill, geometry)
    assert torch.equal(back, REFERENCE.scatter_blocks(x, fill, geometry))
    assert back.permute(0, 2, 3, 4, 1).is_contiguous()


def test_wide_offsets(interpreted: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as with those of 32 bits."""
    geometry, window = geometry_of("voxels"), window_of("voxels", (2, 2, 2), (1, 1, 1), (0, 0, 0))
    dense = draw((geometry.batch, 3, *geometry.shape), 1, torch.float32)

    def results() -> list[Tensor]:
        blocks = interpreted.gather_blocks(dense, geometry)
        return [
            blocks,
            interpreted.scatter_blocks(blocks, dense[0, :, 0, 0, 0], geometry),
            interpreted.pool3d(blocks, window, "avg", 8),
            interpreted.pool3d_grad(blocks, blocks, window, "max", 0),
        ]

    narrow = results()
    monkeypatch.setattr(tiles, "WIDE_FROM", 0)
    assert tiles.is_wide(dense)
    for a, b in zip(narrow, results(), strict=True):
        assert torch.equal(a, b)


Triple = tuple[int, int, int]


def window_of(name: str, kernel: Triple, stride: Triple, padding: Triple) -> WindowGeometry:
    mask = MASKS[name]()
    return functional._window_geometry(mask, mask.downsample(stride), kernel, stride, padding)


@pytest.mark.parametrize("name", ["anisotropic", "voxels"])
def test_maximum_of_equal_infinite_and_missing_numbers(name: str, interpreted: TritonBackend) -> None:
    """The first of equal numbers gets the gradient, NaN wins, minus infinity counts where there is nothing else."""
    stride, padding = ((1, 2, 3), (1, 1, 0)) if name == "anisotropic" else ((1, 2, 1), (1, 1, 1))
    window = window_of(name, (3, 3, 3), stride, padding)
    shape = (len(window.source_index), *window.source_block, 3)
    x = torch.randint(-2, 3, shape, generator=seeded(1)).float()
    x[torch.rand(shape, generator=seeded(2)) < 0.3] = -float("inf")
    x[torch.rand(shape, generator=seeded(3)) < 0.05] = float("nan")
    grad = torch.randint(-9, 9, (len(window.target_index), *window.target_block, 3), generator=seeded(4)).float()
    got = interpreted.pool3d(x, window, "max", 0)
    torch.testing.assert_close(got, REFERENCE.pool3d(x, window, "max", 0), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(
        interpreted.pool3d_grad(grad, x, window, "max", 0), REFERENCE.pool3d_grad(grad, x, window, "max", 0)
    )


def test_a_maximum_over_too_many_taps_is_refused(interpreted: TritonBackend) -> None:
    window = window_of("nothing", (33, 32, 32), (1, 1, 1), (16, 16, 16))
    grad = torch.zeros(0, 4, 4, 4, 1)
    with pytest.raises(ValueError, match=r"kernel_size must have at most 32768 taps, got \(33, 32, 32\)"):
        interpreted.pool3d_grad(grad, grad, window, "max", 0)
