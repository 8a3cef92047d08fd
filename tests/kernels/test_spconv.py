"""Backend "spconv": its lists of pairs, how long they live, what it refuses. The common suites check its results."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import itertools
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import s3d_kernels as sk
from s3d.model import build_unet
from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, functional, to_sparse, use_backend
from s3d_kernels.backends import BlocksProblem, ConvProblem, WindowGeometry, spconv_pairs

from .test_operators import MASKS, Case, assert_close, conv_case, expected, run, seeded

SPCONV = REGISTRY["spconv"]
ONE = (1, 1, 1)


def problem(device: str = "cpu", dtype: torch.dtype = torch.float32, groups: int = 1) -> ConvProblem:
    return ConvProblem(device, dtype, 4, 4, groups, ONE, ONE, (0, 0, 0), (4, 4, 4), partial=False)


# Asked only where it is absent, for the answer takes as long as importing it.
ABSENT = SPCONV.why_not(problem()) if importlib.util.find_spec("spconv") is None else None
needs_spconv = pytest.mark.skipif(ABSENT is not None, reason=ABSENT or "it is there")


# ---- what it computes


WINDOWS = [
    conv_case("submanifold", (3, 3, 3), padding=(1, 1, 1)),
    conv_case("submanifold 2x3x4", (2, 3, 4), padding="same"),
    conv_case("strided", (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    conv_case("strided 3x1x2", (3, 1, 2), (2, 1, 2), (1, 0, 0)),
    conv_case("kernel 1", (1, 1, 1)),
    conv_case("kernel 4 stride 2", (4, 4, 4), (2, 2, 2), (1, 1, 1)),
    conv_case("kernel 7", (7, 1, 1), padding=(3, 0, 0)),
]


@needs_spconv
@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: case.name)
def test_windows_against_the_oracle(case: Case) -> None:
    for name, make in MASKS.items():
        mask = make()
        if case.name in ("kernel 4 stride 2", "strided 3x1x2") and any(side % 2 for side in mask.shape):
            continue  # torch would drop an incomplete window
        truth = expected(case, mask)
        for i, (a, b) in enumerate(zip(run(case, mask, torch.float64, "spconv"), truth, strict=True)):
            assert_close(a, b, torch.float64, 1e-12, f"{name}, result {i}")


@needs_spconv
def test_the_output_set_is_ours() -> None:
    """spconv's own strided convolution has an output wherever a window meets a visible voxel."""
    grid = torch.zeros(1, 3, 1, 1, dtype=torch.bool)
    grid[0, 1] = True  # between two masked blocks
    mask = BlockMask.from_grid(grid, 4)
    x = BlockSparseTensor(torch.ones(1, 4, 4, 4, 1), mask)
    with use_backend("spconv"):
        y = functional.sparse_conv3d(x, torch.ones(1, 1, 3, 3, 3), torch.ones(1), 2, 1)
    shown = y.to_dense() != 0
    assert y.mask.same_layout(mask.downsample(2))
    assert torch.equal(shown, mask.downsample(2).to_dense())
    # With the bias every visible voxel is at least 1, so that none of them can be missing either.
    grown = nn.functional.conv3d(mask.to_dense().float(), torch.ones(1, 1, 3, 3, 3), None, 2, 1) > 0
    assert int(grown.sum()) > int(shown.sum())


@needs_spconv
def test_a_tiny_encoder_equals_reference() -> None:
    torch.manual_seed(0)
    encoder = to_sparse(build_unet("tiny").encoder).double()
    mask = BlockMask.random(2, (2, 2, 1), 16, 0.5, seeded(1))
    x = torch.randn(2, 1, *mask.shape, dtype=torch.float64)

    def results(backend: str) -> list[Tensor]:
        with use_backend(backend):
            outputs = [y.blocks for y in encoder(BlockSparseTensor.from_dense(x, mask))]
        loss = sum(y.square().mean() for y in outputs)
        assert isinstance(loss, Tensor)
        return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, list(encoder.parameters()))]

    truth = results("reference")
    largest = max(float(b.norm()) for b in truth)
    for a, b in zip(results("spconv"), truth, strict=True):
        assert float((a - b).norm()) <= 1e-9 * float(b.norm()) + 1e-13 * largest  # biases before norms have none


@needs_spconv
def test_compiled() -> None:
    layer, mask = sk.SparseConv3d(4, 4, 3, padding=1), MASKS["voxels"]()
    layer.backend = "spconv"
    x = torch.randn(2, 4, *mask.shape)
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for module in (layer, compiled):
        y = module(BlockSparseTensor.from_dense(x, mask)).blocks
        results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# ---- lists


def geometries(name: str) -> Iterator[WindowGeometry]:
    base = MASKS[name]()
    for kernel, stride, padding in (
        ((3, 3, 3), ONE, (1, 1, 1)),
        ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
        ((2, 1, 4), (1, 1, 2), (0, 0, 1)),
    ):
        source = base.merge(base.merge_factors(stride))[0]
        yield functional._window_geometry(source, base.downsample(stride), kernel, stride, padding)


def _rows(index: Tensor, voxels: Tensor | None, block: Sequence[int], shape: Sequence[int]) -> dict[Any, int]:
    """Place (n, d, h, w) -> row of each visible voxel."""
    places = [
        (n, *(g * b + o for g, b, o in zip(cell, block, local, strict=True)))
        for v, (n, *cell) in enumerate(index.tolist())
        for local in itertools.product(*map(range, block))
        if voxels is None or voxels[(v, *local)]
    ]
    inside = [place for place in places if all(c < side for c, side in zip(place[1:], shape, strict=True))]
    return {place: row for row, place in enumerate(inside)}


@pytest.mark.parametrize("name", list(MASKS))
def test_lists_are_those_of_plain_loops(name: str) -> None:
    for geometry in geometries(name):
        compare_with_loops(geometry)


def compare_with_loops(g: WindowGeometry) -> None:
    inputs = _rows(g.source_index, g.source_voxels, g.source_block, g.shape)
    outputs = _rows(g.target_index, g.target_voxels, g.target_block, g.target_shape)
    lists = spconv_pairs.make_lists(g)
    assert (len(lists.source), len(lists.target)) == (len(inputs), len(outputs))
    for t, tap in enumerate(itertools.product(*map(range, g.kernel_size))):
        truth = set()
        for (n, *place), row in outputs.items():
            window = zip(place, g.stride, g.padding, tap, strict=True)
            read = (n, *(o * s - p + k for o, s, p, k in window))
            if read in inputs:
                truth.add((inputs[read], row))
        count = int(lists.counts[t])
        assert count == len(truth)
        assert {(a, b) for a, b in lists.pairs[:, t, :count].T.tolist()} == truth
        assert (lists.pairs[:, t, count:] == -1).all()


@pytest.mark.parametrize("name", list(MASKS))
def test_tables_of_implicit_gemm_are_the_lists(name: str) -> None:
    for geometry in geometries(name):
        lists = spconv_pairs.make_lists(geometry)
        for tables, (first, second), rows in (
            (lists.to_target, lists.pairs, len(lists.target)),
            (lists.to_source, lists.pairs.flip(0), len(lists.source)),
        ):
            assert tables.inputs.shape == (len(lists.counts), rows)
            truth = torch.full_like(tables.inputs, -1)
            for t, count in enumerate(lists.counts.tolist()):
                truth[t, second[t, :count].long()] = first[t, :count]
            assert torch.equal(tables.inputs, truth)
            assert torch.equal(tables.order.sort().values, torch.arange(rows, dtype=torch.int32))
            for t in range(len(truth)):
                assert torch.equal((tables.masks[:, 0] >> t & 1).bool(), truth[t, tables.order.long()] >= 0)


class Emulated:
    """implicit_gemm by its meaning: a tile of rows multiplies the taps that any of its masks has."""

    def __init__(self) -> None:
        self.calls = 0

    def implicit_gemm(
        self,
        features: Tensor,
        filters: Tensor,
        inputs: Tensor,
        masks: list[Tensor],
        orders: list[Tensor],
        rows: int,
        splits: list[Any],
        **options: object,
    ) -> tuple[Tensor, None, int]:
        self.calls += 1
        assert options == {"is_train": False, "is_subm": False, "fp32_accum": True}
        assert features.is_contiguous()
        assert filters.is_contiguous()
        assert [int(split[0]) for split in splits] == [0xFFFFFFFF]
        weights = filters.flatten(1, 3).unbind(1)
        y = features.new_zeros(rows, len(filters))
        for tile in torch.arange(rows).split(4):
            of_tile = [int(mask) for mask in masks[0][tile, 0]]
            places = orders[0][tile].long()
            for t, weight in enumerate(weights):
                if any(mask >> t & 1 for mask in of_tile):
                    read = inputs[t, places].long()
                    y[places] += torch.where(read[:, None] >= 0, features[read.clamp(min=0)], 0) @ weight.T
        return y, None, 4


@pytest.mark.parametrize("case", [WINDOWS[0], WINDOWS[3]], ids=lambda case: case.name)
def test_implicit_gemm_is_called_with_what_it_means(case: Case) -> None:
    """The kernel itself needs a GPU; this is only what goes to it."""
    emulated, mask = Emulated(), MASKS["voxels"]()
    kernel, stride = case.weights[0][2:], (2, 1, 2) if case is WINDOWS[3] else ONE
    padding = (1, 0, 0) if case is WINDOWS[3] else ONE
    source, target = mask, mask.downsample(stride)
    geometry = functional._window_geometry(source, target, kernel, stride, padding)  # type: ignore[arg-type]
    lists, reference = spconv_pairs.make_lists(geometry), REGISTRY["reference"]
    x = torch.randn(source.num_blocks, *source.block, 4, dtype=torch.float64)
    weight = torch.randn(*case.weights[0], dtype=torch.float64)
    grad = torch.randn(target.num_blocks, *target.block, 6, dtype=torch.float64)
    for tables, rows, place, filters, truth in (
        (
            lists.to_target,
            lists.source.select(x),
            lists.target,
            weight.permute(0, 2, 3, 4, 1),
            reference.conv3d(x, weight, None, geometry, 1),
        ),
        (
            lists.to_source,
            lists.target.select(grad),
            lists.source,
            weight.permute(1, 2, 3, 4, 0),
            reference.conv3d_grad_input(grad, weight, geometry, 1),
        ),
    ):
        y = place.put(spconv_pairs._implicit_gemm(emulated, rows, filters.contiguous(), tables))
        torch.testing.assert_close(y, truth)
    assert emulated.calls == 2


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[spconv_pairs.PairLists]]:
    """Weak references to the lists that are made."""
    seen: list[weakref.ref[spconv_pairs.PairLists]] = []
    make = spconv_pairs.make_lists

    def spied(geometry: WindowGeometry) -> spconv_pairs.PairLists:
        lists = make(geometry)
        seen.append(weakref.ref(lists))
        return lists

    monkeypatch.setattr(spconv_pairs, "make_lists", spied)
    return seen


def residual_encoder() -> nn.Sequential:
    """Two stages of two residual blocks in little: windows 3 and 3 stride 2 and 3, and 1."""
    layers: list[nn.Module] = [sk.SparseConv3d(3, 4, 3, padding=1), sk.SparseInstanceNorm3d(4, affine=True)]
    layers += [nn.LeakyReLU(), sk.SparseConv3d(4, 4, 3, padding=1), sk.SparseConv3d(4, 4, 3, 2, 1)]
    layers += [sk.SparseInstanceNorm3d(4, affine=True), nn.LeakyReLU(), sk.SparseConv3d(4, 4, 3, padding=1)]
    layers += [sk.SparseConv3d(4, 4, 3, padding=1), sk.SparseConv3d(4, 4, 1)]
    return nn.Sequential(*layers)


@needs_spconv
@pytest.mark.parametrize("name", ["side 4, unequal", "voxels"])
def test_lists_are_made_once_for_a_mask_and_a_window(name: str, made: list[Any]) -> None:
    network, mask = residual_encoder(), MASKS[name]()
    x = torch.randn(mask.batch, 3, *mask.shape)
    with use_backend("spconv"):
        for steps in range(1, 4):
            network(BlockSparseTensor.from_dense(x, mask)).blocks.sum().backward()
            assert len(made) == 4, f"after {steps} steps"
        again = BlockMask.from_voxels(mask.to_dense(), mask.block)
        network(BlockSparseTensor.from_dense(x, again)).blocks.sum().backward()
    assert len(made) == 8  # of another mask, though it looks the same


@needs_spconv
def test_kernels_whose_tables_are_made_for_each_call_share_lists(made: list[Any]) -> None:
    mask = MASKS["side 1"]()
    x, weight = BlockSparseTensor(torch.randn(mask.num_blocks, 1, 1, 1, 2), mask), torch.randn(2, 2, 5, 5, 5)
    for _ in range(2):
        functional.sparse_conv3d(x, weight, padding=2, backend="spconv")
    assert len(made) == 1


@needs_spconv
@pytest.mark.parametrize("name", ["side 4, unequal", "voxels"])
def test_lists_die_with_the_mask(name: str, made: list[Any]) -> None:
    network, mask = residual_encoder(), MASKS[name]()
    x = torch.randn(mask.batch, 3, *mask.shape)
    with use_backend("spconv"):
        y = network(BlockSparseTensor.from_dense(x, mask))
        y.blocks.sum().backward()
    assert all(lists() is not None for lists in made)
    del y, mask
    gc.collect()
    assert all(lists() is None for lists in made)


@needs_spconv
def test_lists_of_voxel_masks_that_die_before_the_blocks_are_not_piled_up(made: list[Any]) -> None:
    """A transposed convolution makes the voxel mask of its result anew in each call."""
    mask = MASKS["voxels"]()
    x, weight = BlockSparseTensor(torch.randn(mask.num_blocks, *mask.block, 2), mask), torch.randn(2, 2, 2, 2, 2)
    for _ in range(3):
        functional.sparse_conv_transpose3d(x, weight, backend="spconv")
    gc.collect()
    assert sum(lists() is not None for lists in made) == 0
    assert len(made) == 3


@needs_spconv
def test_no_mask_gets_the_lists_of_a_dead_one() -> None:
    """Masks of the same sizes that die at once: their tensors get the same addresses and ids again and again."""
    weight = torch.randn(2, 1, 3, 3, 3)
    seen = set()
    for seed in range(40):
        visible = torch.rand(1, 4, 4, 4, generator=seeded(seed)) < 0.5
        visible[0, 0, 0, ::2] = True  # in each block
        mask = BlockMask.from_voxels(visible, 2) if seed % 2 else BlockMask.random(1, 4, 1, 0.5, seeded(seed))
        dense = torch.randn(1, 1, 4, 4, 4, generator=seeded(seed))
        y = functional.sparse_conv3d(BlockSparseTensor.from_dense(dense, mask), weight, padding=1, backend="spconv")
        truth = oracle.conv3d(dense, mask.to_dense(), weight, None, ONE, ONE, 1)
        torch.testing.assert_close(y.to_dense(), truth)
        seen.add(id(mask.index))
        del mask, y
    assert len(seen) < 40


def test_lists_are_not_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    known, new, *_ = geometries("voxels")
    lists = spconv_pairs.ListsOfMasks(spconv_pairs.make_lists)
    before = lists.get(known)
    monkeypatch.setattr(spconv_pairs, "_is_captured", lambda device: True)
    assert lists.get(known) is before
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured: run the step once before"):
        lists.get(new)
    monkeypatch.undo()
    assert len(lists.get(new).counts) > 0


# ---- what it refuses


def test_what_it_refuses() -> None:
    assert SPCONV.why_not(problem("mps")) == "spconv is for cpu and cuda tensors, not mps"
    half = "on cpu it computes float32 and float64, not torch.float16"
    assert SPCONV.why_not(problem(dtype=torch.float16)) == half
    assert SPCONV.why_not(BlocksProblem("cpu", torch.float16, 4, (4, 4, 4), partial=False)) == half
    assert (
        SPCONV.why_not(problem("cuda", torch.float64)) == "on cuda it computes float32 and float16, not torch.float64"
    )
    assert SPCONV.why_not(problem(groups=2)) == "spconv has no groups, and 2 are asked for"
    empty = ConvProblem("cpu", torch.float32, 0, 4, 1, ONE, ONE, (0, 0, 0), (4, 4, 4), partial=False)
    assert SPCONV.why_not(empty) == "it needs at least one channel"


def test_it_is_there_where_it_is_installed() -> None:
    """So that the tests of a broken installation are not skipped without a word."""
    if "spconv" not in importlib.metadata.packages_distributions():
        pytest.skip(SPCONV.why_not(problem()) or "")
    assert SPCONV.why_not(problem()) is None
    assert SPCONV.why_not(problem(dtype=torch.float64)) is None


def test_auto_takes_it_behind_torch() -> None:
    assert list(REGISTRY) == ["native", "triton", "torch", "spconv", "reference"]


def test_what_it_inherits_from_torch_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    selection = sk.backends.selection
    monkeypatch.setattr(selection, "is_tuning", lambda: True)
    monkeypatch.setattr(selection, "measured", lambda problem, method: {})
    monkeypatch.setattr(spconv_pairs, "_missing", lambda: None)
    blocks = BlocksProblem("cpu", torch.float32, 4, (4, 4, 4), partial=False)
    assert "spconv" in selection._to_measure(problem(), "conv3d_grad_input")
    assert "spconv" not in selection._to_measure(blocks, "gather_blocks")
    assert "torch" in selection._to_measure(blocks, "gather_blocks")


# ---- the package that is absent or does not fit

ASK = """
import sys
{before}
import torch
import s3d_kernels as sk
from s3d_kernels.backends import ConvProblem
assert "spconv" not in sys.modules, "it is imported before anybody asks"
ones = (1, 1, 1)
problem = ConvProblem("cpu", torch.float32, 4, 4, 1, ones, ones, (0, 0, 0), (4, 4, 4), partial=False)
print(sk.REGISTRY["spconv"].why_not(problem))
print(sk.REGISTRY["spconv"].why_not(problem))
"""


def ask(before: str = "") -> str:
    """What a new process gives as the reason, in which warnings are errors."""
    program = ASK.format(before=before)
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning:torch", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first == second
    return first


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file\\nand more')", "ImportError: libcudart"),
        ("raise AttributeError('module numpy has no attribute bool')", "AttributeError: module numpy"),
        ("raise RuntimeError", "RuntimeError: ;"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("class Odd(Exception): pass\nraise Odd('odd')", "Odd: odd"),
    ],
)
def test_a_package_that_does_not_fit_is_one_sentence(
    statement: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spconv").mkdir()
    (tmp_path / "spconv" / "__init__.py").write_text(statement)
    for name in [name for name in sys.modules if name.partition(".")[0] == "spconv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    spconv_pairs._missing.cache_clear()
    try:
        reason = SPCONV.why_not(problem())
    finally:
        spconv_pairs._missing.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "spconv"]:
            del sys.modules[name]
    assert reason is not None
    assert found in reason
    assert "\n" not in reason
    assert "and more" not in reason
    assert f"torch {torch.__version__}" in reason
    assert "NumPy" in reason
    assert "pip install 's3d[spconv]'" in reason


def test_an_absent_package_is_one_sentence() -> None:
    """Also: importing our package does not import spconv."""
    hide = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'spconv' else f(n, *a)"
    )
    reason = ask(hide)
    assert reason.startswith("the package spconv is not installed")
    assert reason.endswith("pip install 's3d[spconv]' or pip install spconv-cu120")
    assert ("before 3.12 only" in reason) == (sys.version_info >= (3, 12))


@needs_spconv
def test_its_import_says_nothing() -> None:
    assert ask() == "None"
