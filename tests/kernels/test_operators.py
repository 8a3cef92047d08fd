"""Every operator of every backend, in every dtype, against the float64 oracle: output and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, functional, use_backend
from s3d_kernels.backends import BlocksProblem
from s3d_kernels.block_sparse import block_geometry
from s3d_kernels.operators import blocks, conv, norm, pool, upconv
from s3d_kernels.operators.custom_operator import CustomOperator

# Relative l2 error of a whole tensor, or twice that of torch's dense operator in the same dtype, where that is larger
# (its half-precision convolutions on the CPU add up many products in half precision). A single voxel's row may be off
# by ten times as much (relative to the typical row), so that one garbage voxel among ten thousand is caught.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
WORST_ROW = 10.0

# The kernels of "triton" are for GPUs; test_triton_conv.py and test_triton_norm.py have them under the interpreter.
ON_CPU = [name for name in REGISTRY if name != "triton"]

Triple = tuple[int, int, int]


def able_on_cpu(dtype: torch.dtype = torch.float32) -> list[str]:
    """Those of them that can compute here, for tests that take one after the other."""
    problem = BlocksProblem("cpu", dtype, 1, (1, 1, 1), partial=False)
    return [name for name in ON_CPU if name != "spconv" or REGISTRY[name].why_not(problem) is None]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _with_empty_sample() -> BlockMask:
    grid = torch.rand(3, 2, 3, 2, generator=seeded(3)) < 0.5
    grid[1] = False
    return BlockMask.from_grid(grid, 4)


MASKS: dict[str, Callable[[], BlockMask]] = {
    "side 8": lambda: BlockMask.random(2, (2, 1, 2), 8, 0.5, seeded(0)),
    "side 4, unequal": lambda: BlockMask.random(3, (2, 3, 2), 4, (0.2, 0.9), seeded(1)),
    "side 2": lambda: BlockMask.random(2, (3, 4, 3), 2, 0.7, seeded(2)),
    "side 1": lambda: BlockMask.random(2, (5, 4, 6), 1, 0.7, seeded(3)),
    "anisotropic": lambda: BlockMask.random(2, (3, 2, 2), (1, 4, 6), 0.5, seeded(4)),
    "empty sample": _with_empty_sample,
    "everything": lambda: BlockMask.random(2, 2, 4, 0.0),
    "nothing": lambda: BlockMask.random(2, 2, 4, 1.0),
    "voxels": lambda: BlockMask.from_voxels(torch.rand(2, 9, 10, 7, generator=seeded(5)) < 0.3, 4),
}

Inputs = list[Tensor]  # x, then weights


@dataclass(frozen=True)
class Case:
    """One operator: the sparse call, its oracle, the shapes of its weights."""

    name: str
    sparse: Callable[[BlockSparseTensor, Sequence[Tensor]], BlockSparseTensor]
    dense: Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]
    weights: tuple[tuple[int, ...], ...] = ()
    channels: int = 4
    needs_even: bool = False  # whether the volume must be a multiple of 2


def conv_case(
    name: str,
    kernel: Triple,
    stride: Triple = (1, 1, 1),
    padding: Triple | str = (0, 0, 0),
    groups: int = 1,
    out: int = 6,
) -> Case:
    return Case(
        name,
        lambda x, w: functional.sparse_conv3d(x, w[0], w[1], stride, padding, groups),
        lambda x, m, w: oracle.conv3d(x, m, w[0], w[1], stride, padding, groups),
        ((out, 4 // groups, *kernel), (out,)),
        needs_even=kernel == (2, 2, 2) and stride != (1, 1, 1),
    )


def pool_case(name: str, kind: str, k: Triple, stride: Triple, padding: Triple, include: bool = True) -> Case:
    return Case(
        name,
        lambda x, w: functional.sparse_pool3d(x, kind, k, stride, padding, None, include),  # type: ignore[arg-type]
        lambda x, m, w: oracle.pool3d(x, m, kind, k, stride, padding, include),
        needs_even=k == (2, 2, 2),
    )


def norm_case(name: str, groups: int | str, sparse: Callable[..., BlockSparseTensor]) -> Case:
    return Case(
        name,
        lambda x, w: sparse(x, w[0], w[1]),
        lambda x, m, w: oracle.norm(x, m, w[0], w[1], 1e-5, groups),
        ((4,), (4,)),
    )


CASES = [
    conv_case("conv 3", (3, 3, 3), padding=(1, 1, 1)),
    conv_case("conv 1", (1, 1, 1)),
    conv_case("conv 5", (5, 5, 5), padding=(2, 2, 2)),
    conv_case("conv 7", (7, 7, 7), padding=(3, 3, 3), out=3),
    conv_case("conv 1x3x3", (1, 3, 3), padding=(0, 1, 1)),
    conv_case("conv 3 stride 2", (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    conv_case("conv 1x3x3 stride 1x2x2", (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    conv_case("conv 1 stride 2", (1, 1, 1), (2, 2, 2)),
    conv_case("conv 2 stride 2", (2, 2, 2), (2, 2, 2)),
    conv_case("conv 2 same", (2, 2, 2), padding="same"),
    conv_case("conv groups", (3, 3, 3), padding=(1, 1, 1), groups=2),
    conv_case("conv depthwise stride 2", (3, 3, 3), (2, 2, 2), (1, 1, 1), groups=4, out=4),
    Case(
        "conv transpose",
        lambda x, w: functional.sparse_conv_transpose3d(x, w[0], w[1]),
        lambda x, m, w: oracle.conv_transpose3d(x, m, w[0], w[1], 1),
        ((4, 5, 2, 1, 2), (5,)),
    ),
    Case(
        "conv transpose groups",
        lambda x, w: functional.sparse_conv_transpose3d(x, w[0], None, 2),
        lambda x, m, w: oracle.conv_transpose3d(x, m, w[0], None, 2),
        ((4, 3, 2, 2, 2),),
    ),
    norm_case("instance norm", 4, functional.sparse_instance_norm),
    norm_case("group norm", 2, lambda x, w, b: functional.sparse_group_norm(x, 2, w, b)),
    norm_case("batch norm", "batch", lambda x, w, b: functional.sparse_batch_norm(x, None, None, w, b, training=True)),
    Case(
        "norm, residual and leaky relu",
        lambda x, w: F.leaky_relu(functional.sparse_instance_norm(x, w[0], w[1]) + x, 0.1),
        lambda x, m, w: F.leaky_relu(oracle.norm(x, m, w[0], w[1], 1e-5, 4) + oracle.select(x, m), 0.1),
        ((4,), (4,)),
    ),
    Case(
        "conv after norm and leaky relu",
        lambda x, w: functional.sparse_conv3d(
            F.leaky_relu(functional.sparse_instance_norm(x, w[0], w[1]), 0.1), w[2], w[3], 1, 1
        ),
        lambda x, m, w: oracle.conv3d(
            F.leaky_relu(oracle.norm(x, m, w[0], w[1], 1e-5, 4), 0.1), m, w[2], w[3], (1, 1, 1), (1, 1, 1), 1
        ),
        ((4,), (4,), (6, 4, 3, 3, 3), (6,)),
    ),
    pool_case("average 2", "avg", (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    pool_case("average 3", "avg", (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    pool_case("average 3 without padding", "avg", (3, 3, 3), (1, 1, 1), (1, 1, 1), include=False),
    pool_case("maximum 2", "max", (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    pool_case("maximum 1x3x3", "max", (1, 3, 3), (1, 2, 2), (0, 1, 1)),
]


def draw(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    """Random values that every checked dtype can represent, so that only arithmetic differs."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(torch.bfloat16).to(dtype)


def run(
    case: Case, mask: BlockMask, dtype: torch.dtype, backend: str, masked: float = float("nan"), device: str = "cpu"
) -> list[Tensor]:
    """Output and gradients, with `masked` in every masked voxel of input and upstream gradient, dense and in blocks."""
    x = torch.where(mask.to_dense(), draw((mask.batch, case.channels, *mask.shape), 1, dtype), masked)
    x, mask = x.to(device).requires_grad_(), mask.to(device)
    weights = [draw(s, 2 + i, dtype).to(device).requires_grad_() for i, s in enumerate(case.weights)]
    with use_backend(backend):
        y = case.sparse(_spoil(BlockSparseTensor.from_dense(x, mask), masked), weights)
        if y.mask.voxels is not None and y.blocks.requires_grad:
            shown = y.mask.voxels[..., None]
            y.blocks.register_hook(lambda grad: torch.where(shown, grad, masked))
        upstream = torch.where(y.mask.to_dense(), draw(y.shape, 9, dtype).to(device), masked)
        dense = y.to_dense()
        return [t.cpu() for t in (dense.detach(), *torch.autograd.grad(dense, [x, *weights], upstream))]


def _spoil(x: BlockSparseTensor, masked: float) -> BlockSparseTensor:
    return x if x.mask.voxels is None else x.with_blocks(torch.where(x.mask.voxels[..., None], x.blocks, masked))


_expected: dict[tuple[Case, torch.Size, bytes, torch.dtype], list[Tensor]] = {}


def expected(case: Case, mask: BlockMask, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Output and gradients of the oracle, computed once for all backends."""
    visible = mask.to_dense()
    key = (case, visible.shape, visible.numpy().tobytes(), dtype)
    if key not in _expected:
        _expected[key] = _ask_oracle(case, visible, dtype)
    return _expected[key]


def _ask_oracle(case: Case, visible: Tensor, dtype: torch.dtype) -> list[Tensor]:
    shape = (len(visible), case.channels, *visible.shape[-3:])
    x = torch.where(visible, draw(shape, 1, dtype), 0.0).requires_grad_()
    weights = [draw(s, 2 + i, dtype).requires_grad_() for i, s in enumerate(case.weights)]
    y = case.dense(x, visible, weights)
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], draw(y.shape, 9, dtype))]


def tolerances(case: Case, mask: BlockMask, dtype: torch.dtype, truth: list[Tensor]) -> list[float]:
    """For the output and each gradient."""
    least = [TOLERANCE[dtype]] * len(truth)
    if dtype.itemsize > 2 or not case.name.startswith("conv"):
        return least
    dense = expected(case, mask, dtype)
    return [
        max(low, 2 * float((a.double() - b).norm() / b.norm().clamp(min=1e-300)))
        for low, a, b in zip(least, dense, truth, strict=True)
    ]


def assert_close(got: Tensor, truth: Tensor, dtype: torch.dtype, tolerance: float, what: str) -> None:
    assert got.dtype == dtype
    assert got.isfinite().all(), f"{what}: not finite"
    error = got.double() - truth
    norm_ = float(truth.norm())
    assert float(error.norm()) <= tolerance * norm_ + 1e-300, f"{what}: {float(error.norm()) / norm_:.1e}"
    if truth.dim() == 5 and norm_ > 0:
        rows, true_rows = (t.flatten(2).norm(dim=1) for t in (error, truth))
        typical = float(true_rows[true_rows > 0].square().mean().sqrt())
        assert float(rows.max()) <= WORST_ROW * tolerance * typical, f"{what}: worst row"


def _residual_block(x: BlockSparseTensor, w: Sequence[Tensor]) -> BlockSparseTensor:
    """A narrow convolution and a block behind it: backward computes the output of both again."""
    stem = functional.sparse_conv3d(x, w[0], w[0].detach().sum((1, 2, 3, 4)))
    stem = F.leaky_relu(functional.sparse_instance_norm(stem), 0.1)
    branch = functional.sparse_instance_norm(functional.sparse_conv3d(stem, w[1], None, 1, 1), w[2])
    return functional.sparse_conv3d(F.leaky_relu(branch + stem, 0.1), w[3], None, 1, 1)


def _dense_residual_block(x: Tensor, m: Tensor, w: Sequence[Tensor]) -> Tensor:
    unit, none = (1, 1, 1), (0, 0, 0)
    stem = oracle.conv3d(x, m, w[0], w[0].detach().sum((1, 2, 3, 4)), unit, none, 1)
    stem = F.leaky_relu(oracle.norm(stem, m, None, None, 1e-5, 4), 0.1)
    branch = oracle.norm(oracle.conv3d(stem, m, w[1], None, unit, unit, 1), m, w[2], None, 1e-5, 4)
    return oracle.conv3d(F.leaky_relu(branch + stem, 0.1), m, w[3], None, unit, unit, 1)


# Not in half precision, where rounding turns signs before the activation.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", ON_CPU)
def test_residual_block_against_the_oracle(backend: str, dtype: torch.dtype) -> None:
    weights = ((4, 4, 1, 1, 1), (4, 4, 3, 3, 3), (4,), (6, 4, 3, 3, 3))
    case = Case("residual block", _residual_block, _dense_residual_block, weights)
    for name in ("side 8", "anisotropic", "voxels"):
        mask = MASKS[name]()
        for a, b in zip(run(case, mask, dtype, backend), expected(case, mask), strict=True):
            assert_close(a, b, dtype, TOLERANCE[dtype], name)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_the_oracle(case: Case, backend: str, dtype: torch.dtype) -> None:
    for name, make in MASKS.items():
        mask = make()
        if case.needs_even and any(side % 2 for side in mask.shape):
            continue
        truth = expected(case, mask)
        allowed = tolerances(case, mask, dtype, truth)
        got = run(case, mask, dtype, backend)
        zeros = run(case, mask, dtype, backend, masked=0.0)
        for i, (a, b, c) in enumerate(zip(got, truth, zeros, strict=True)):
            what = f"{name}, {'output' if i == 0 else f'gradient {i - 1}'}"
            assert torch.equal(a, c), f"{what}: NaN at masked voxels changed the result"
            assert_close(a, b, dtype, allowed[i], what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ON_CPU)
def test_convolution_errs_at_most_twice_as_much_as_torch(backend: str, dtype: torch.dtype) -> None:
    case, mask = CASES[0], BlockMask.random(1, 2, 8, 0.0)
    truth = expected(case, mask)
    got = run(case, mask, dtype, backend)
    x, weight, bias = (t.detach() for t in _inputs(case, mask, dtype))
    dense = torch.nn.functional.conv3d(x, weight, bias, padding=1)
    ours, theirs = ((y.double() - truth[0]).norm() for y in (got[0], dense))
    assert ours <= 2 * theirs


def _inputs(case: Case, mask: BlockMask, dtype: torch.dtype) -> Inputs:
    x = draw((mask.batch, case.channels, *mask.shape), 1, dtype)
    return [x, *(draw(s, 2 + i, dtype) for i, s in enumerate(case.weights))]


@pytest.mark.parametrize("mean", [1e3, 1e4])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_statistics_are_safe_far_from_zero(backend: str, partial: bool, mean: float) -> None:
    """E[x^2] - E[x]^2 in float32 would have no correct digit of the variance here."""
    mask = MASKS["voxels" if partial else "side 8"]()
    x = torch.randn(mask.batch, 3, *mask.shape, generator=seeded(0)) + mean
    with use_backend(backend):
        y = functional.sparse_instance_norm(BlockSparseTensor.from_dense(x, mask)).to_dense()
    truth = oracle.norm(x.double(), mask.to_dense(), None, None, 1e-5, 3)
    # The input itself is rounded to 6e-8 * mean, and so is the mean.
    assert float((y - truth).norm() / truth.norm()) < 1e-6 * mean / 4


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_bits_from_run_to_run(case: Case, backend: str) -> None:
    mask = MASKS["side 4, unequal"]()
    first = run(case, mask, torch.float32, backend)
    for _ in range(4):
        for a, b in zip(first, run(case, mask, torch.float32, backend), strict=True):
            assert torch.equal(a, b)


GRADCHECK_MASK = BlockMask.from_voxels(torch.rand(2, 3, 4, 3, generator=seeded(6)) < 0.6, 2)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", [c for c in CASES if not c.needs_even], ids=lambda c: c.name)
def test_gradcheck(case: Case, backend: str) -> None:
    inputs = [t.requires_grad_() for t in _inputs(case, GRADCHECK_MASK, torch.float64)]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return case.sparse(BlockSparseTensor.from_dense(x, GRADCHECK_MASK), weights).to_dense()

    with use_backend(backend):
        torch.autograd.gradcheck(function, inputs, fast_mode=True)
        if case.name in ("conv 3", "conv 3 stride 2", "conv transpose", "conv groups"):
            torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def operator_calls(name: str) -> list[tuple[CustomOperator, tuple[Any, ...]]]:
    """Every custom operator with arguments for opcheck."""
    calls: list[tuple[CustomOperator, tuple[Any, ...]]] = []
    for mask in (MASKS["side 4, unequal"](), MASKS["voxels"]()):
        geometry = block_geometry(mask)
        where = (geometry.index, geometry.voxels, geometry.sample_offsets, geometry.sizes(), name)
        x = torch.randn(mask.num_blocks, *mask.block, 4, requires_grad=True)
        grad = torch.randn_like(x)
        table = torch.rand(mask.batch, 4)
        dense = torch.randn(mask.batch, 4, *mask.shape)
        last = dense.clone(memory_format=torch.channels_last_3d).requires_grad_()
        calls += [
            (blocks.gather_blocks, (dense.requires_grad_(), *where)),
            (blocks.gather_blocks, (last, *where)),
            (blocks.scatter_blocks, (x, torch.randn(4, requires_grad=True), *where)),
            (norm.norm_statistics, (x.detach(), *where)),
            (norm.norm_apply, (x.detach(), table, table, table, None, *where[:-1], 0.1, name)),
            (norm.norm_apply, (x.detach(), table, table, table, grad, *where[:-1], 0.1, name)),
            (norm.norm_grad_sums, (grad, x.detach(), None, *[table] * 4, *where[:-1], 1.0, name)),
            (norm.norm_grad_sums, (grad, x.detach(), None, *[table] * 4, *where[:-1], 0.1, name)),
            (norm.norm_grad_sums, (grad, x.detach(), grad, *[table] * 4, *where[:-1], 0.1, name)),
            (norm.norm_grad_input, (grad, x.detach(), table, table, table, table, table, *where)),
        ]
        vectors = [torch.randn(4, requires_grad=True) for _ in range(2)]
        count = mask.visible_voxels()[:, None].expand(-1, 4).float().contiguous()
        tables = (table, table, count)
        for residual, slope in ((None, 1.0), (None, 0.1), (torch.randn_like(x).requires_grad_(), 0.1)):
            numbers = (slope, "sample", 4, False, name)
            calls.append((norm.normalize, (x, *vectors, residual, *tables, *where[:-1], *numbers)))
        window = functional._window_geometry(mask, mask, (3, 3, 3), (1, 1, 1), (1, 1, 1))
        tensors = functional._arguments(window)
        weight, bias = torch.randn(6, 4, 3, 3, 3, requires_grad=True), torch.randn(6, requires_grad=True)
        out = torch.randn(mask.num_blocks, *mask.block, 6, requires_grad=True)
        calls += [
            (conv.conv3d, (x, weight, bias, *tensors, 1, name)),
            (conv.conv3d, (x, weight.detach(), None, *tensors, 1, name)),
            (conv.conv3d_grad_input, (out, weight, *tensors, 1, name)),
            (conv.conv3d_grad_weight, (out, x, *tensors, 1, name)),
            (pool.pool3d, (x, *tensors, "max", 27, name)),
            (pool.pool3d, (x, *tensors, "avg", 27, name)),
            (pool.pool3d_grad, (grad, x.detach(), *tensors, "max", 27, name)),
            (pool.pool3d_grad, (grad, None, *tensors, "avg", 27, name)),
        ]
    volume = torch.randn(2, 3, 1, 2, 4, requires_grad=True)
    weight, bias = torch.randn(2, 2, 2, 6, 4, 2, 2, 2, requires_grad=True), torch.randn(6, requires_grad=True)
    fine = torch.randn(2, 6, 2, 4, 6, requires_grad=True)
    calls += [
        (upconv.upconv3d, (volume, weight, bias, name)),
        (upconv.upconv3d, (torch.randn(2, 4, 3, 1, 2).permute(0, 2, 3, 4, 1), weight.detach(), None, name)),
        (upconv.upconv3d_grad_input, (fine, weight, name)),
        (upconv.upconv3d_grad_input, (torch.randn(2, 6, 6, 2, 4).permute(0, 2, 3, 4, 1), weight, name)),
        (upconv.upconv3d_grad_weight, (fine, volume, name)),
    ]
    return calls


# opcheck itself reads .grad of its permuted copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ON_CPU)
def test_opcheck(backend: str) -> None:
    checked = set()
    for operator, arguments in operator_calls(backend):
        torch.library.opcheck(operator.definition, arguments)
        checked.add(operator.name)
    assert len(checked) == 15


class LooksOn(TorchDispatchMode):
    """Sees operators and lets them be."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ON_CPU)
def test_who_looks_on_sees_operators_with_the_same_results(backend: str) -> None:
    for operator, arguments in operator_calls(backend):
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]

        def compute(operator: CustomOperator = operator, arguments: Any = arguments, leaves: Any = leaves) -> list[Any]:
            result = operator(*arguments)
            results = [result] if isinstance(result, Tensor) else list(result)
            outputs = [r for r in results if r.requires_grad]
            if not outputs:
                return results
            upstream = [draw(r.shape, 5 + i, r.dtype) for i, r in enumerate(outputs)]
            return [*results, *torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)]

        alone = compute()
        with LooksOn() as mode:
            seen = compute()
        assert operator.name in mode.seen
        assert len(alone) == len(seen)
        for a, b in zip(alone, seen, strict=True):
            assert (a is b is None) or torch.equal(a, b)
