"""The native CPU library: every instruction set and method, thread counts, bad arguments, large volumes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import oracle
import pytest
import torch
from torch import Tensor

from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, functional, use_backend
from s3d_kernels.backends import native
from s3d_kernels.block_sparse import block_geometry

from .test_operators import CASES, MASKS, TOLERANCE, Case, assert_close, draw, expected, run, seeded, tolerances

SETS = native.instruction_sets()


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.use_instruction_set(SETS[0])
    native.use_method("auto")


def test_the_library_is_built_and_chosen() -> None:
    x = BlockSparseTensor.from_dense(torch.randn(1, 2, 8, 8, 8), BlockMask.random(1, 2, 4, 0.5))
    problem = []
    spied = REGISTRY["native"].conv3d

    def spy(*arguments: object) -> Tensor:
        problem.append(arguments)
        return spied(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REGISTRY["native"], "conv3d", spy)
        functional.sparse_conv3d(x, torch.randn(3, 2, 3, 3, 3), None, 1, 1)
    assert len(problem) == 1, "auto did not choose native"


@pytest.mark.parametrize("method", ["direct", "winograd"])
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_instruction_set_and_method(case: Case, instructions: str, method: str) -> None:
    native.use_instruction_set(instructions)
    native.use_method(method)
    for dtype in (torch.float32, torch.float64):
        for name, make in MASKS.items():
            mask = make()
            if case.needs_even and any(side % 2 for side in mask.shape):
                continue
            truth = expected(case, mask)
            for i, (a, b) in enumerate(zip(run(case, mask, dtype, "native"), truth, strict=True)):
                assert_close(a, b, dtype, tolerances(case, mask, dtype, truth)[i], f"{name}, result {i}")


def convolution(mask: BlockMask, channels: tuple[int, int], groups: int = 1, kernel: int = 3) -> list[Tensor]:
    """Output and gradients of a convolution in float32 by the native backend."""
    x = draw((mask.batch, channels[0], *mask.shape), 1, torch.float32).requires_grad_()
    weight = draw((channels[1], channels[0] // groups, *(kernel,) * 3), 2, torch.float32).requires_grad_()
    bias = draw((channels[1],), 3, torch.float32).requires_grad_()
    with use_backend("native"):
        y = functional.sparse_conv3d(
            BlockSparseTensor.from_dense(x, mask), weight, bias, 1, kernel // 2, groups
        ).to_dense()
        return [y.detach(), *torch.autograd.grad(y, [x, weight, bias], draw(y.shape, 4, torch.float32))]


@pytest.mark.parametrize("method", ["direct", "winograd"])
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(
    ("channels", "groups"),
    [((1, 1), 1), ((1, 33), 1), ((8, 40), 4), ((17, 5), 1), ((16, 32), 1), ((50, 31), 1)],
    ids=str,
)
def test_channel_counts(channels: tuple[int, int], groups: int, instructions: str, method: str) -> None:
    """Few tiles of Winograd and many (the last mask) are computed in different ways; so are few channels of a group."""
    native.use_instruction_set(instructions)
    native.use_method(method)
    many = BlockMask.random(1, (1, 2, 2), 12, 0.25, seeded(6))
    for mask in (BlockMask.random(2, 2, 6, (0.2, 0.8), seeded(1)), MASKS["voxels"](), many):
        x = draw((mask.batch, channels[0], *mask.shape), 1, torch.float64).requires_grad_()
        weight = draw((channels[1], channels[0] // groups, 3, 3, 3), 2, torch.float64).requires_grad_()
        bias = draw((channels[1],), 3, torch.float64).requires_grad_()
        y = oracle.conv3d(x, mask.to_dense(), weight, bias, (1, 1, 1), (1, 1, 1), groups)
        truth = [y.detach(), *torch.autograd.grad(y, [x, weight, bias], draw(y.shape, 4, torch.float64))]
        for a, b in zip(convolution(mask, channels, groups), truth, strict=True):
            assert_close(a, b, torch.float32, 1e-5, f"{channels}")


FEW_VOXELS: dict[str, Callable[[], BlockMask]] = {
    "side 1": lambda: BlockMask.random(2, (2, 2, 3), 1, (0.2, 0.7), seeded(4)),
    "one voxel": lambda: BlockMask.random(1, 1, 1, 0.0),
    "voxels": lambda: BlockMask.from_voxels(torch.rand(1, 2, 3, 3, generator=seeded(5)) < 0.5, (2, 2, 1)),
}


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 1)], ids=str)
@pytest.mark.parametrize(("channels", "groups"), [((50, 31), 1), ((3, 130), 1), ((21, 12), 3)], ids=str)
def test_few_voxels(channels: tuple[int, int], groups: int, stride: tuple[int, int, int], instructions: str) -> None:
    """Below 32 voxels another kernel computes; its strips and rows have tails of their own."""
    padding = (1, 0, 1)
    case = Case(
        f"conv {channels}",
        lambda x, w: functional.sparse_conv3d(x, w[0], w[1], stride, padding, groups),
        lambda x, m, w: oracle.conv3d(x, m, w[0], w[1], stride, padding, groups),
        ((channels[1], channels[0] // groups, 3, 1, 3), (channels[1],)),
        channels[0],
    )
    native.use_instruction_set(instructions)
    for name, make in FEW_VOXELS.items():
        mask = make()
        assert 0 < mask.num_blocks * math.prod(mask.block) < 32
        truth = expected(case, mask)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.float64):
                for i, (a, b) in enumerate(zip(run(case, mask, dtype, "native"), truth, strict=True)):
                    assert_close(a, b, dtype, TOLERANCE[dtype], f"{name}, result {i}")


@pytest.mark.parametrize("method", ["direct", "winograd"])
def test_same_bits_with_any_number_of_threads(method: str) -> None:
    native.use_method(method)
    masks = [BlockMask.random(2, 2, 12, 0.6, seeded(2)), BlockMask.random(1, 3, 2, 0.5, seeded(3)), MASKS["voxels"]()]
    masks += [make() for make in FEW_VOXELS.values()]
    for mask in masks:
        for channels, groups in (((20, 36), 1), ((24, 24), 24), ((12, 18), 3), ((130, 70), 1), ((2, 20), 1)):
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(convolution(mask, channels, groups))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    norm = next(c for c in CASES if c.name == "norm, residual and leaky relu")
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(norm, masks[0], torch.float32, "native"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


HALF = [torch.bfloat16, torch.float16]

HALF_MASKS: dict[str, Callable[[], BlockMask]] = {
    "blocks": lambda: BlockMask.random(2, (2, 3, 2), 4, (0.2, 0.8), seeded(6)),
    "voxels": MASKS["voxels"],
    "nothing": MASKS["nothing"],
    **FEW_VOXELS,
}


def kernels_on(mask: BlockMask, channels: int, half: torch.dtype) -> dict[str, Callable[[torch.dtype], list[Tensor]]]:
    """Every kernel on values that `half` represents, NaN at masked voxels: a function of the dtype that stores them."""
    backend = REGISTRY["native"]
    blocks = block_geometry(mask)
    window = functional._window_geometry(mask, mask, (3, 3, 3), (1, 1, 1), (1, 1, 1))
    generator = seeded(7)

    def features(channels: int) -> Tensor:
        drawn = torch.randn(mask.num_blocks, *mask.block, channels, generator=generator).to(half)
        return drawn if mask.voxels is None else torch.where(mask.voxels[..., None], drawn, math.nan)

    def vector(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(half)

    out = channels + 3
    x, other, grad = features(channels), features(channels), features(channels)
    grad_y, weight, bias = features(out), vector(out, channels, 3, 3, 3), vector(out)
    mean, rstd, scale, shift, slope = (vector(mask.batch, channels).float() for _ in range(5))
    dense = torch.where(mask.to_dense(), vector(mask.batch, channels, *mask.shape), math.nan)
    fill = vector(channels)
    return {
        "conv3d": lambda t: [backend.conv3d(x.to(t), weight.to(t), bias.to(t), window, 1)],
        "conv3d_grad_input": lambda t: [backend.conv3d_grad_input(grad_y.to(t), weight.to(t), window, 1)],
        "conv3d_grad_weight": lambda t: list(backend.conv3d_grad_weight(grad_y.to(t), x.to(t), window, 1)),
        "average": lambda t: [backend.pool3d(x.to(t), window, "avg", 27)],
        "average_grad": lambda t: [backend.pool3d_grad(grad.to(t), None, window, "avg", 0)],
        "maximum": lambda t: [backend.pool3d(x.to(t), window, "max", 27)],
        "maximum_grad": lambda t: [backend.pool3d_grad(grad.to(t), x.to(t), window, "max", 27)],
        "statistics": lambda t: list(backend.norm_statistics(x.to(t), blocks)),
        "apply": lambda t: [backend.norm_apply(x.to(t), mean, scale, shift, None, 0.1, blocks)],
        "apply, residual": lambda t: [backend.norm_apply(x.to(t), mean, scale, shift, other.to(t), 0.0, blocks)],
        "grad_sums": lambda t: list(backend.norm_grad_sums(grad.to(t), x.to(t), mean, rstd, blocks)),
        "grad_activation": lambda t: list(
            backend.norm_grad_activation(grad.to(t), x.to(t), None, mean, rstd, scale, shift, 0.1, blocks)
        ),
        "grad_activation, y": lambda t: list(
            backend.norm_grad_activation(grad.to(t), x.to(t), other.to(t), mean, rstd, scale, shift, 0.1, blocks)
        ),
        "grad_input": lambda t: [
            backend.norm_grad_input(grad.to(t), x.to(t), mean, rstd, scale, shift, slope, blocks)
        ],
        "gather": lambda t: [backend.gather_blocks(dense.to(t), blocks)],
        "gather, channels last": lambda t: [
            backend.gather_blocks(dense.to(t).contiguous(memory_format=torch.channels_last_3d), blocks)
        ],
        "scatter": lambda t: [backend.scatter_blocks(x.to(t), fill.to(t), blocks)],
    }  # fmt: skip


TABLES = {"statistics": [0, 1], "grad_sums": [0, 1], "grad_activation": [1, 2], "grad_activation, y": [1, 2]}


@pytest.mark.parametrize("method", ["direct", "winograd"])
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(
    dtype: torch.dtype, instructions: str, method: str
) -> None:
    native.use_instruction_set(instructions)
    native.use_method(method)
    for name, make in HALF_MASKS.items():
        for channels in (1, 5, 16, 37):
            for kernel, compute in kernels_on(make(), channels, dtype).items():
                truth = compute(torch.float32)
                assert all(t.isfinite().all() for t in truth)
                for i, t in enumerate(truth):
                    if i not in TABLES.get(kernel, []):
                        truth[i] = t.to(dtype)
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    for a, b in zip(compute(dtype), truth, strict=True):
                        what = (name, channels, kernel, threads)
                        assert a.dtype == b.dtype, what
                        assert torch.equal(a, b), what


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """But for those of NaN."""
    assert a.dtype == b.dtype
    assert torch.equal(a.isnan(), b.isnan())
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    assert torch.equal(a.view(bits)[~a.isnan()], b.view(bits)[~b.isnan()])


@pytest.mark.parametrize("channels", [1, 3, 64])
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_conversions_are_those_of_torch(dtype: torch.dtype, instructions: str, channels: int) -> None:
    """All 65536 values widened; them, the middles between them and the floats beside these rounded.

    Few channels are converted one by one, many as vectors. Every value is a voxel of its own sample.
    """
    native.use_instruction_set(instructions)
    backend = REGISTRY["native"]
    x = every_half(dtype)
    finite = x[x.isfinite()]
    middle = ((finite.double() + torch.nextafter(finite, 2 * finite).double()) / 2).float()
    infinity = torch.tensor(math.inf)
    beside = [torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)]
    special = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 1e-45, 0.0, -0.0])
    floats = torch.cat([x.float(), middle, *beside, special])

    def voxels(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, -len(values) % channels))
        return padded.view(-1, 1, 1, 1, channels)

    for values in (x, floats):
        rows = voxels(values)
        blocks = block_geometry(BlockMask.random(len(rows), 1, 1, 0.0))
        table = rows.view(len(rows), channels)
        minus_zero = torch.full(table.shape, -0.0)
        zero, one = torch.zeros(table.shape), torch.ones(table.shape)
        if values is x:
            sums, _ = backend.norm_grad_sums(rows, torch.zeros_like(rows), zero, zero, blocks)
            assert_same_bits(sums + zero, table.float() + zero)
            assert_same_bits(backend.norm_apply(rows, zero, one, minus_zero, None, 1.0, blocks), rows)
        else:
            source = minus_zero.view(rows.shape).to(dtype)
            assert_same_bits(backend.norm_apply(source, zero, one, table, None, 1.0, blocks), rows.to(dtype))


def arguments() -> dict[str, object]:
    mask = BlockMask.random(1, 2, 4, 0.5, seeded(0))
    window = functional._window_geometry(mask, mask, (3, 3, 3), (1, 1, 1), (1, 1, 1))
    x = torch.randn(mask.num_blocks, 4, 4, 4, 5)
    return {
        "x": x, "weight": torch.randn(7, 5, 3, 3, 3), "bias": torch.randn(7), "source_voxels": None,
        "target_voxels": None, "table": window.table, "sizes": window.sizes(), "groups": 1,
        "y": torch.zeros(mask.num_blocks, 4, 4, 4, 7), "threads": 1,
    }  # fmt: skip


BAD: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "weight of other channels": ({"weight": torch.randn(7, 4, 3, 3, 3)}, ValueError, "weight must have shape"),
    "weight of another dtype": (
        {"weight": torch.randn(7, 5, 3, 3, 3).double()},
        TypeError,
        "weight has the wrong dtype",
    ),
    "half precision weight": ({"weight": torch.randn(7, 5, 3, 3, 3).half()}, TypeError, "weight has the wrong dtype"),
    "half precision features": ({"x": torch.randn(4, 4, 4, 4, 5).bfloat16()}, TypeError, "weight has the wrong dtype"),
    "bias of another dtype": ({"bias": torch.randn(7).bfloat16()}, TypeError, "bias has the wrong dtype"),
    "output of another dtype": ({"y": torch.zeros(4, 4, 4, 4, 7).half()}, TypeError, "y has the wrong dtype"),
    "integers": ({"x": torch.zeros(4, 4, 4, 4, 5, dtype=torch.int32)}, TypeError, "dtype"),
    "not contiguous": ({"x": torch.randn(4, 5, 4, 4, 4).permute(0, 2, 3, 4, 1)}, ValueError, "x must be contiguous"),
    "bias too short": ({"bias": torch.randn(6)}, ValueError, "bias must have shape"),
    "too few dimensions": ({"x": torch.randn(4, 5)}, ValueError, "5 dimensions"),
    "row that is not there": ({"table": torch.full((4, 27), 4, dtype=torch.int32)}, IndexError, "table holds row 4"),
    "negative row": ({"table": torch.full((4, 27), -2, dtype=torch.int32)}, IndexError, "table holds row -2"),
    "table too narrow": ({"table": torch.zeros((4, 26), dtype=torch.int32)}, ValueError, "table must have shape"),
    "groups": ({"groups": 2}, ValueError, "groups must divide"),
    "no groups": ({"groups": 0}, ValueError, "groups must divide"),
    "threads": ({"threads": 0}, ValueError, "threads must be at least 1"),
    "sizes": ({"sizes": [1, 2, 3]}, ValueError, "sizes must hold 19 numbers"),
    "voxels": ({"source_voxels": torch.zeros(4, 4, 4, dtype=torch.uint8)}, ValueError, "source_voxels must have shape"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_arguments_are_exceptions(name: str) -> None:
    change, error, message = BAD[name]
    given = arguments()
    assert len(given["x"]) == 4  # type: ignore[arg-type]
    native.CPU.functions().conv3d(*given.values())
    with pytest.raises(error, match=message):
        native.CPU.functions().conv3d(*{**given, **change}.values())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_norm_arguments_of_another_dtype_are_named(dtype: torch.dtype) -> None:
    mask = MASKS["side 2"]()
    x = torch.randn(mask.num_blocks, *mask.block, 3).to(dtype)
    table = torch.ones(mask.batch, 3)
    given = dict.fromkeys(("mean", "scale", "shift"), table)

    def call(residual: Tensor, **tables: Tensor) -> Tensor:
        return REGISTRY["native"].norm_apply(
            x, **{**given, **tables}, residual=residual, slope=1.0, geometry=block_geometry(mask)
        )

    call(x)
    for name in given:
        with pytest.raises(TypeError, match=f"{name} has the wrong dtype"):
            call(x, **{name: table.to(dtype)})
    for wrong in {torch.float32, *HALF} - {dtype}:
        with pytest.raises(TypeError, match="residual has the wrong dtype"):
            call(x.to(wrong))
    with pytest.raises(TypeError, match="x has the wrong dtype: it must be"):
        REGISTRY["native"].norm_statistics(x.to(torch.int16), block_geometry(mask))


def test_windows_beyond_the_table_are_refused() -> None:
    given = arguments()
    sizes = list(given["sizes"])  # type: ignore[call-overload]
    sizes[10:13], sizes[16:19] = [19, 3, 3], [9, 1, 1]
    given.update(sizes=sizes, weight=torch.randn(7, 5, 19, 3, 3))
    with pytest.raises(ValueError, match="the table does not reach"):
        native.CPU.functions().conv3d(*given.values())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no instruction set"):
        native.use_instruction_set("mmx")
    with pytest.raises(ValueError, match="method must be one of"):
        native.use_method("fft")


def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dataclasses.replace(native.CPU, path=native.CPU.path.with_name("absent.so"))
    monkeypatch.setitem(REGISTRY, "native", native.NativeBackend(libraries={"cpu": absent}))
    x = BlockSparseTensor.from_dense(torch.randn(1, 2, 8, 8, 8), BlockMask.random(1, 2, 4, 0.5), "torch")
    with pytest.raises(ValueError, match="was not built: no C\\+\\+ compiler, or S3D_NATIVE=0"):
        functional.sparse_conv3d(x, torch.randn(2, 2, 1, 1, 1), backend="native")


def test_gpus_that_cannot_run_the_kernels_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can be seen without one."""
    if not torch.cuda.is_available():
        assert native.CUDA.why_not() == "torch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert native.CUDA.why_not() == "its kernels need compute capability 8.0, this GPU has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    absent = dataclasses.replace(native.CUDA, path=native.CUDA.path.with_name("absent.so"))
    assert absent.why_not() == "the native CUDA library was not built: no nvcc, or S3D_CUDA=0, at installation"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["direct", "winograd"])
def test_more_than_two_to_the_31_elements(method: str) -> None:
    """Only the last block is not zero; the pages of the others are never touched, so this needs little memory."""
    native.use_method(method)
    mask = BlockMask.from_grid(torch.ones(1, 1, 1, 1100, dtype=torch.bool), 32)
    channels = 64
    x = torch.zeros(mask.num_blocks, 32, 32, 32, channels)
    assert x.numel() > 2**31
    x[-1] = torch.randn(32, 32, 32, channels, generator=seeded(0))
    weight = torch.randn(1, channels, 3, 3, 3, generator=seeded(1))
    with use_backend("native"):
        y = functional.sparse_conv3d(BlockSparseTensor(x, mask), weight, None, 1, 1).blocks
    dense = torch.nn.functional.conv3d(x[-1].permute(3, 0, 1, 2)[None].double(), weight.double(), padding=1)
    assert float((y[-1, ..., 0] - dense[0, 0]).norm() / dense.norm()) < 1e-5
    assert not y[:-2].any()
