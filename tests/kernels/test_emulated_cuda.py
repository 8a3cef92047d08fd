"""The CUDA kernels behind Python, run by the emulator as one more device: the cases of the other backends.

Volumes are small, for a GPU's threads run one after the other here. Every mask is computed with two orders of blocks
and warps, which must give the same bits; shared memory is watched for races all the while.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from s3d_kernels import BlockMask, BlockSparseTensor, functional, use_backend
from s3d_kernels.backends import BlocksProblem, ConvProblem, NormProblem, PoolProblem, UpconvProblem
from s3d_kernels.backends.first_use import disagreement
from s3d_kernels.backends.native import CUDA, NativeBackend
from s3d_kernels.backends.native_library import NativeLibrary

from . import emulated_cuda
from .test_native import BAD, arguments
from .test_operators import CASES, TOLERANCE, Case, assert_close, draw, expected, run, seeded, tolerances

SEEDS = (0, 1)
TF32 = 1e-3

MASKS: dict[str, Callable[[], BlockMask]] = {
    "side 8": lambda: BlockMask.random(1, (1, 1, 2), 8, 0.5, seeded(0)),
    "side 4, unequal": lambda: BlockMask.random(2, (1, 2, 2), 4, (0.25, 0.75), seeded(1)),
    "side 2": lambda: BlockMask.random(2, (2, 3, 2), 2, 0.6, seeded(2)),
    "side 1": lambda: BlockMask.random(2, (3, 4, 3), 1, 0.7, seeded(3)),
    "anisotropic": lambda: BlockMask.random(2, (3, 1, 2), (1, 4, 6), 0.5, seeded(4)),
    "empty sample": lambda: BlockMask.from_grid(torch.tensor([1, 0, 0, 0, 1, 1]).view(3, 1, 2, 1) > 0, 4),
    "nothing": lambda: BlockMask.random(2, (1, 1, 2), 4, 1.0),
    "voxels": lambda: BlockMask.from_voxels(torch.rand(1, 5, 6, 7, generator=seeded(5)) < 0.3, 4),
}


def check(
    emulated: NativeBackend, case: Case, mask: BlockMask, dtype: torch.dtype, allowed: float | None, what: str
) -> None:
    """Compare with the oracle, and one order of warps with another."""
    truth = expected(case, mask)
    tolerance = tolerances(case, mask, dtype, truth) if allowed is None else [allowed] * len(truth)
    results = []
    for seed in SEEDS:
        emulated_cuda.use_seed(emulated, seed)
        results.append(run(case, mask, dtype, emulated.name))
    for i, (first, second, b) in enumerate(zip(*results, truth, strict=True)):
        assert torch.equal(first, second), f"{what}, result {i}: other bits with other seeds"
        assert_close(first, b, dtype, tolerance[i], f"{what}, result {i}")


def fits(case: Case, mask: BlockMask) -> bool:
    return not (case.needs_even and any(side % 2 for side in mask.shape))


# A kernel of 7 is a kernel of 5 that takes four times as long here.
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "conv 7"], ids=lambda c: c.name)
def test_against_the_oracle(case: Case, emulated: NativeBackend) -> None:
    with emulated_cuda.exactly():
        for name, make in MASKS.items():
            mask = make()
            if fits(case, mask):
                check(emulated, case, mask, torch.float32, None, name)
    assert emulated_cuda.take_launches(emulated), "the emulator ran nothing"


FEW_MASKS = ("side 4, unequal", "side 1", "voxels")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "conv 7"], ids=lambda c: c.name)
def test_half_precision(case: Case, dtype: torch.dtype, emulated: NativeBackend) -> None:
    for name in FEW_MASKS:
        mask = MASKS[name]()
        if fits(case, mask):
            check(emulated, case, mask, dtype, None, name)


def test_tf32_is_used_where_torch_allows_it(emulated: NativeBackend) -> None:
    case, mask = CASES[0], MASKS["side 4, unequal"]()
    # Values that bfloat16 holds are exact in TF32, and so are their products.
    x = torch.randn(mask.batch, 4, *mask.shape, generator=seeded(7))
    weight = torch.randn(6, 4, 3, 3, 3, generator=seeded(8))
    truth = oracle.conv3d(x.double(), mask.to_dense(), weight.double(), None, (1, 1, 1), (1, 1, 1), 1)
    errors = {}
    for allowed in (True, False):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed), use_backend(emulated.name):
            y = functional.sparse_conv3d(BlockSparseTensor.from_dense(x, mask), weight, None, 1, 1).to_dense()
        errors[allowed] = float((y - truth).norm() / truth.norm())
    assert errors[False] < TOLERANCE[torch.float32] < errors[True] < TF32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        check(emulated, case, mask, torch.float32, TF32, "TF32")


@pytest.mark.parametrize(("precision", "tf32"), [("ieee", 0), ("tf32", 1)])
def test_tf32_is_set_in_the_newer_way_too(precision: str, tf32: int) -> None:
    try:
        torch.backends.cudnn.conv.fp32_precision = precision
        assert CUDA.setting() == tf32
    finally:
        torch.backends.cudnn.allow_tf32 = True  # the default, for all operators


@pytest.mark.parametrize("channels", [(33, 40), (1, 32), (72, 8)], ids=str)
@pytest.mark.parametrize("name", ["side 4, unequal", "side 2", "side 1"])
def test_channel_counts(channels: tuple[int, int], name: str, emulated: NativeBackend) -> None:
    case = Case(
        "conv channels",
        lambda x, w: functional.sparse_conv3d(x, w[0], w[1], 1, 1),
        lambda x, m, w: oracle.conv3d(x, m, w[0], w[1], (1, 1, 1), (1, 1, 1), 1),
        ((channels[1], channels[0], 3, 3, 3), (channels[1],)),
        channels[0],
    )
    check(emulated, case, MASKS[name](), torch.bfloat16, None, name)


@pytest.mark.parametrize(
    ("channels", "groups", "kernel"), [((2, 32), 1, "conv3d_stem"), ((6, 6), 6, "conv3d_depthwise")], ids=str
)
def test_few_channels_and_depthwise_have_kernels_of_their_own(
    channels: tuple[int, int], groups: int, kernel: str, emulated: NativeBackend
) -> None:
    mask = MASKS["side 4, unequal"]()
    dense = draw((mask.batch, channels[0], *mask.shape), 0, torch.bfloat16)
    x = BlockSparseTensor.from_dense(dense, mask)
    weight = draw((channels[1], channels[0] // groups, 3, 3, 3), 1, torch.bfloat16).requires_grad_()
    emulated_cuda.take_launches(emulated)
    with use_backend(emulated.name):
        functional.sparse_conv3d(x, weight, None, 1, 1, groups).blocks.sum().backward()
    launches = [name for name in emulated_cuda.take_launches(emulated) if name.startswith("conv3d")]
    assert launches == [kernel, f"{kernel}_grad_weight", f"{kernel}_grad_weight_sum"]


GENERAL = {
    "1x1x1": ((1, 1, 1), (1, 1, 1), (0, 0, 0)),
    "3x3x3 stride 2": ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "1x3x3": ((1, 3, 3), (1, 1, 1), (0, 1, 1)),
    "2x2x2 stride 2": ((2, 2, 2), (2, 2, 2), (0, 0, 0)),
}


@pytest.mark.parametrize("name", list(GENERAL))
def test_kernels_for_many_channels(name: str, emulated: NativeBackend) -> None:
    """The cases above have few channels, for which there are kernels of their own."""
    kernel, stride, padding = GENERAL[name]
    case = Case(
        "conv",
        lambda x, w: functional.sparse_conv3d(x, w[0], w[1], stride, padding),
        lambda x, m, w: oracle.conv3d(x, m, w[0], w[1], stride, padding, 1),
        ((40, 24, *kernel), (40,)),
        24,
        needs_even=kernel == (2, 2, 2),
    )
    with emulated_cuda.exactly():
        for mask_name in ("side 4, unequal", "side 2", "voxels"):
            mask = MASKS[mask_name]()
            if fits(case, mask):
                check(emulated, case, mask, torch.float32, None, mask_name)


def test_statistics_are_safe_far_from_zero(emulated: NativeBackend) -> None:
    mask = MASKS["voxels"]()
    x = torch.randn(mask.batch, 3, *mask.shape, generator=seeded(0)) + 1e4
    with use_backend(emulated.name):
        y = functional.sparse_instance_norm(BlockSparseTensor.from_dense(x, mask)).to_dense()
    truth = oracle.norm(x.double(), mask.to_dense(), None, None, 1e-5, 3)
    assert float((y - truth).norm() / truth.norm()) < 1e-6 * 1e4 / 4


def test_double_precision_is_refused_by_name(emulated: NativeBackend) -> None:
    mask = MASKS["side 1"]()
    x = BlockSparseTensor(torch.zeros(mask.num_blocks, 1, 1, 1, 2, dtype=torch.float64), mask)
    with pytest.raises(ValueError, match=r"it computes float32, bfloat16 and float16, not torch\.float64"):
        functional.sparse_conv3d(x, torch.zeros(2, 2, 1, 1, 1, dtype=torch.float64), backend=emulated.name)


@pytest.mark.parametrize("operator", ["conv3d", "norm", "pool3d", "blocks", "upconv3d"])
def test_the_check_of_the_first_use(operator: str, emulated: NativeBackend) -> None:
    """Right kernels pass in every dtype; each wrong one is named and disabled, with a warning."""
    library = emulated._libraries["cpu"]
    for dtype in library.dtypes:
        assert disagreement(emulated, operator, dtype, torch.device("cpu")) is None
    functions = {
        "conv3d": ["conv3d", "conv3d_fused", "conv3d_grad_input", "conv3d_grad_weight"],
        "norm": ["norm_statistics", "norm_apply", "norm_grad_sums", "norm_grad_input"],
        "pool3d": ["pool3d", "pool3d_grad"],
        "blocks": ["gather_blocks", "scatter_blocks"],
        "upconv3d": ["conv3d", "conv3d_grad_input", "conv3d_grad_weight"],  # of which it is made
    }
    problem = {
        "conv3d": ConvProblem("cpu", torch.float32, 4, 4, 1, (3, 3, 3), (1, 1, 1), (1, 1, 1), (4, 4, 4), False),
        "norm": NormProblem("cpu", torch.float32, 4, (4, 4, 4), False),
        "pool3d": PoolProblem("cpu", torch.float32, 4, "avg", (2, 2, 2), (2, 2, 2), (0, 0, 0), (4, 4, 4), False),
        "blocks": BlocksProblem("cpu", torch.float32, 4, (4, 4, 4), False),
        "upconv3d": UpconvProblem("cpu", torch.float32, 4, 4),
    }[operator]
    for name in functions[operator]:
        faulty = FaultyBackend(name, library)
        with pytest.warns(UserWarning, match=f"native cpu kernels are disabled for {operator}: .* is wrong by"):
            reason = faulty.why_not(problem)
        assert reason is not None
        assert "it gave wrong results on this machine" in reason
        calls = faulty.calls
        assert faulty.why_not(problem) == reason
        assert faulty.calls == calls, "the check ran again"


def test_kernels_that_cannot_run_are_passed_over(emulated: NativeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a driver that is too old."""
    backend = FaultyBackend("nothing", emulated._libraries["cpu"])

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("gather_blocks cannot be launched: CUDA driver version is insufficient\nmore")

    monkeypatch.setattr(backend, "_call", refuse)
    problem = BlocksProblem("cpu", torch.float32, 4, (4, 4, 4), False)
    with pytest.warns(UserWarning, match="disabled for blocks: it cannot run on this machine: gather_blocks cannot"):
        reason = backend.why_not(problem)
    assert reason is not None
    assert reason.endswith("CUDA driver version is insufficient")
    assert backend.why_not(problem) == reason


class FaultyBackend(NativeBackend):
    """Emulated CUDA, one function of which is off by a little."""

    def __init__(self, faulty: str, library: NativeLibrary) -> None:
        super().__init__("faulty", {"cpu": dataclasses.replace(library, check_first_use=True)})
        self.faulty = faulty
        self.calls = 0

    def _call(self, name: str, x: Tensor, *arguments: Any) -> None:
        super()._call(name, x, *arguments)
        self.calls += 1
        if name == self.faulty:
            result = next(a for a in reversed(arguments) if isinstance(a, Tensor) and a.is_floating_point())
            result.view(-1)[::7] += 0.1 * result.float().abs().mean()


# What tables hold is not looked at, for that would wait for the GPU; there are no threads.
@pytest.mark.parametrize("name", [n for n in BAD if n not in ("row that is not there", "negative row", "threads")])
def test_bad_arguments_are_exceptions(name: str, emulated: NativeBackend) -> None:
    change, error, message = BAD[name]
    given = arguments()
    library = emulated._libraries["cpu"].functions()
    library.conv3d(*given.values())
    with pytest.raises(error, match=message):
        library.conv3d(*{**given, **change}.values())


def test_a_table_that_leads_outside_is_found_by_the_emulator(emulated: NativeBackend) -> None:
    """Where a GPU would read what is not its own."""
    given = {**arguments(), "table": torch.full((4, 27), 4, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=r"conv3d_halo, block .* of buffer x, which has"):
        emulated._libraries["cpu"].functions().conv3d(*given.values())


def test_nothing_is_copied_from_torch_beyond_its_values(emulated: NativeBackend) -> None:
    """Dense volumes of any strides are read where they lie."""
    mask = MASKS["side 4, unequal"]()
    dense = draw((mask.batch, 3, *(2 * side for side in mask.shape)), 1, torch.float32)[..., ::2, 1::2, ::2]
    with use_backend(emulated.name):
        got: Tensor = BlockSparseTensor.from_dense(dense, mask).blocks
    assert torch.equal(got, BlockSparseTensor.from_dense(dense.contiguous(), mask).blocks)
