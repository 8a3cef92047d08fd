"""The up-convolution against a transposed convolution and the convolution behind it, in float64."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from s3d_kernels import explain, fused_upconv, fused_upconv3d, phase_weights, tuning
from s3d_kernels.backends import UpconvProblem
from s3d_kernels.backends.measurements import drop_dependents
from s3d_kernels.backends.native import NativeBackend
from s3d_kernels.backends.selection import measured
from s3d_kernels.backends.triton_kernels import TritonBackend
from s3d_kernels.operators import upconv

from . import emulated_cuda
from .test_operators import ON_CPU, TOLERANCE, assert_close, draw

Triple = tuple[int, int, int]

# Volume, C_low, C_mid, C.
SHAPES: dict[str, tuple[Triple, int, int, int]] = {
    "odd": ((3, 5, 7), 4, 3, 5),
    "one voxel": ((1, 1, 1), 3, 2, 4),
    "thin": ((1, 4, 2), 5, 4, 3),
    "cube": ((4, 4, 4), 8, 8, 16),
    "one channel": ((3, 2, 5), 1, 1, 1),
    "many channels": ((2, 3, 2), 33, 20, 40),
}
BATCH = 2

# Of the five operands: x, up_weight, up_bias, weight, bias.
NAMES = ("x", "up_weight", "up_bias", "weight", "bias")
WITHOUT = {"both biases": (), "no up_bias": ("up_bias",), "no bias": ("bias",), "no biases": ("up_bias", "bias")}


def operands(
    name: str, dtype: torch.dtype, without: Sequence[str] = (), device: str = "cpu"
) -> dict[str, Tensor | None]:
    """Of a shape by name, of values that every checked dtype can represent; with gradients."""
    volume, low, middle, channels = SHAPES[name]
    sizes = {
        "x": (BATCH, low, *volume),
        "up_weight": (low, middle, 2, 2, 2),
        "up_bias": (middle,),
        "weight": (channels, middle, 3, 3, 3),
        "bias": (channels,),
    }
    return {
        key: None if key in without else draw(size, seed, dtype).to(device).requires_grad_()
        for seed, (key, size) in enumerate(sizes.items())
    }


def in_two_steps(x: Tensor, up_weight: Tensor, up_bias: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv3d(F.conv_transpose3d(x, up_weight, up_bias, stride=2), weight, bias, padding=1)


def with_gradients(y: Tensor, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    inputs = {name: t for name, t in given.items() if t is not None}
    upstream = draw(y.shape, 9, y.dtype).to(y.device)
    gradients = torch.autograd.grad(y, list(inputs.values()), upstream)
    return {"output": y.detach(), **{f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}}


def check(
    name: str,
    dtype: torch.dtype,
    without: Sequence[str],
    backend: str,
    device: str = "cpu",
    before: Callable[[int], None] = lambda run: None,
) -> None:
    """Output and all gradients, in any dtype, against torch's two operators in float64; in two runs the same bits."""
    given = operands(name, torch.float64, without)
    truth = with_gradients(in_two_steps(**given), given)  # type: ignore[arg-type]
    given = operands(name, dtype, without, device)
    results = []
    for run in range(2):
        before(run)
        results.append(with_gradients(fused_upconv3d(**given, backend=backend), given))  # type: ignore[arg-type]
    got, again = results
    assert got.keys() == truth.keys()
    for what, result in got.items():
        assert torch.equal(result, again[what]), f"{name}, {what}: other bits in another run"
        assert_close(result.cpu(), truth[what], dtype, TOLERANCE[dtype], f"{name}, {what}")


@pytest.mark.parametrize("without", WITHOUT.values(), ids=list(WITHOUT))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_equals_two_steps(backend: str, dtype: torch.dtype, without: Sequence[str]) -> None:
    for name in SHAPES:
        check(name, dtype, without, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    for name in SHAPES:
        check(name, dtype, (), backend)


def test_cuda_kernels_under_the_emulator(emulated: NativeBackend) -> None:
    with emulated_cuda.exactly():
        for name in SHAPES:
            check(name, torch.float32, (), emulated.name, before=functools.partial(emulated_cuda.use_seed, emulated))
    assert emulated_cuda.take_launches(emulated), "the emulator ran nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cuda_kernels_under_the_emulator_in_half_precision(dtype: torch.dtype, emulated: NativeBackend) -> None:
    for name in ("odd", "one voxel", "many channels"):
        check(name, dtype, (), emulated.name, before=functools.partial(emulated_cuda.use_seed, emulated))


@pytest.mark.parametrize("name", list(SHAPES))
def test_triton_kernels_under_the_interpreter(name: str, interpreted: TritonBackend) -> None:
    check(name, torch.float32, (), interpreted.name)


def test_triton_kernels_under_the_interpreter_in_half_precision(interpreted: TritonBackend) -> None:
    check("thin", torch.bfloat16, (), interpreted.name)


@pytest.mark.parametrize("backend", ON_CPU)
def test_the_operator_is_its_formula(backend: str) -> None:
    """Voxel by voxel, with a weight that is no product of two."""
    x, weight = draw((2, 2, 3, 1, 3), 0, torch.float64), draw((2, 2, 2, 4, 3, 2, 2, 2), 1, torch.float64)
    y = upconv.upconv3d(x, weight, None, backend)
    truth = torch.zeros(2, 4, 6, 2, 4, dtype=torch.float64)
    volume = (range(2), range(3), range(1))
    for q, p, t in itertools.product(
        itertools.product(*volume), itertools.product(range(2), repeat=3), itertools.product(range(2), repeat=3)
    ):
        source = tuple(a + b - 1 + c for a, b, c in zip(q, t, p, strict=True))
        target = tuple(2 * a + b for a, b in zip(q, p, strict=True))
        if all(at in axis for at, axis in zip(source, volume, strict=True)):
            for n in range(2):
                truth[n][target] += weight[p].permute(2, 3, 4, 0, 1)[t] @ x[n][source]
    assert y.shape == truth.shape
    assert float((y - truth).norm()) < 1e-13 * float(truth.norm())


@pytest.mark.parametrize("backend", ON_CPU)
def test_no_samples(backend: str) -> None:
    given = operands("odd", torch.float32)
    assert given["x"] is not None
    given["x"] = given["x"][:0].detach().requires_grad_()
    results = with_gradients(fused_upconv3d(**given, backend=backend), given)  # type: ignore[arg-type]
    assert results["output"].shape == (0, 5, 6, 10, 14)
    assert all(not bool(gradient.any()) for gradient in results.values())


def test_gradcheck() -> None:
    inputs = list(operands("thin", torch.float64).values())
    torch.autograd.gradcheck(lambda *t: fused_upconv3d(*t, backend="reference"), inputs, fast_mode=True)
    torch.autograd.gradgradcheck(lambda *t: fused_upconv3d(*t, backend="reference"), inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ON_CPU)
def test_second_derivatives(backend: str) -> None:
    """Every operator is differentiated by the two others."""
    x = draw((1, 2, 1, 3, 2), 0, torch.float64).requires_grad_()
    weight = draw((2, 2, 2, 3, 2, 2, 2, 2), 1, torch.float64).requires_grad_()
    bias = draw((3,), 2, torch.float64).requires_grad_()
    inputs = (x, weight, bias)
    torch.autograd.gradgradcheck(lambda *t: upconv.upconv3d(*t, backend), inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ON_CPU)
def test_layout_of_operands_does_not_matter(backend: str) -> None:
    given = {name: t.detach() for name, t in operands("odd", torch.float32).items() if t is not None}
    other = {
        **given,
        "x": given["x"].contiguous(memory_format=torch.channels_last_3d),
        "up_weight": given["up_weight"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": given["weight"].contiguous(memory_format=torch.channels_last_3d),
    }
    results = []
    for case in (given, other):
        leaves: dict[str, Tensor | None] = {name: t.requires_grad_() for name, t in case.items()}
        results.append(with_gradients(fused_upconv3d(**leaves, backend=backend), leaves))  # type: ignore[arg-type]
    for what, result in results[0].items():
        # The layout may change the order of the sums of the phase weights.
        assert_close(results[1][what], result.double(), torch.float32, 1e-6, what)


def test_autocast() -> None:
    """Phase weights are made in float32 and rounded once; gradients of parameters are float32."""
    given = operands("cube", torch.float32)
    truth = in_two_steps(**operands("cube", torch.float64))  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        fused = fused_upconv3d(**given)  # type: ignore[arg-type]
        steps = in_two_steps(**given)  # type: ignore[arg-type]
        phases = phase_weights(given["up_weight"], given["weight"])  # type: ignore[arg-type]
    assert torch.equal(phases, phase_weights(given["up_weight"], given["weight"]))  # type: ignore[arg-type]
    assert fused.dtype == torch.bfloat16
    errors = [float((y - truth).detach().norm()) for y in (fused, steps)]
    assert errors[0] < 2 * errors[1]
    for name, gradient in with_gradients(fused, given).items():
        if name != "output":
            assert gradient.dtype == torch.float32, name


def test_phase_weights_of_float64_stay_so_under_autocast() -> None:
    given = operands("odd", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_upconv3d(**given)  # type: ignore[arg-type]
    assert y.dtype == torch.float64
    truth = in_two_steps(**given)  # type: ignore[arg-type]
    assert_close(y.detach(), truth.detach(), torch.float64, TOLERANCE[torch.float64], "output")


@pytest.mark.parametrize("without", [(), ("up_bias",)], ids=["up_bias", "no up_bias"])
def test_compiles_without_a_break(without: Sequence[str]) -> None:
    given = operands("thin", torch.float32, without)
    compiled = torch.compile(fused_upconv3d, fullgraph=True, backend="aot_eager")
    got = with_gradients(compiled(**given), given)
    truth = with_gradients(fused_upconv3d(**given), given)  # type: ignore[arg-type]
    for what, result in truth.items():
        assert_close(got[what], result.double(), torch.float32, 1e-6, what)


BAD: dict[str, tuple[dict[str, object], str]] = {
    "x of four axes": ({"x": torch.zeros(4, 3, 5, 7)}, r"^x must be \[N, C_low, D, H, W\], got shape \(4, 3, 5, 7\)"),
    "channels of x": ({"x": torch.zeros(2, 6, 3, 5, 7)}, r"^up_weight must be .* for C_low=6, got \(4, 3, 2, 2, 2\)"),
    "kernel of up_weight": ({"up_weight": torch.zeros(4, 3, 2, 3, 2)}, r"^up_weight must be .*got \(4, 3, 2, 3, 2\)"),
    "kernel of weight": ({"weight": torch.zeros(5, 3, 3, 3, 1)}, r"^weight must be .*got \(5, 3, 3, 3, 1\)"),
    "channels of weight": ({"weight": torch.zeros(5, 4, 3, 3, 3)}, r"^weight must be .* for C_mid=3, got \(5, 4,"),
    "up_bias": ({"up_bias": torch.zeros(5)}, r"^up_bias must be a vector of 3 channels, got shape \(5,\)"),
    "bias": ({"bias": torch.zeros(3)}, r"^bias must be a vector of 5 channels, got shape \(3,\)"),
    "dtype of up_weight": (
        {"up_weight": torch.zeros(4, 3, 2, 2, 2, dtype=torch.bfloat16)},
        r"^x and up_weight must have the same dtype outside autocast, got torch.float32 and torch.bfloat16",
    ),
    "dtype of weight": (
        {"weight": torch.zeros(5, 3, 3, 3, 3, dtype=torch.float64)},
        r"^x and weight must have the same dtype outside autocast, got torch.float32 and torch.float64",
    ),
    "backend": ({"backend": "nope"}, r"^backend must be 'auto' or one of .*got 'nope'"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_named(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        fused_upconv3d(**{**operands("odd", torch.float32), **change})  # type: ignore[arg-type]


def test_bad_weights_of_phase_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"^weight must be \[C, C_mid, 3, 3, 3\] for C_mid=3, got \(5, 4, 3, 3, 3\)"):
        phase_weights(torch.zeros(4, 3, 2, 2, 2), torch.zeros(5, 4, 3, 3, 3))


PROBLEM = UpconvProblem("cpu", torch.float32, 3, 4)


def test_is_explained_and_measured(tmp_path: Path) -> None:
    assert explain(PROBLEM)["triton"] == "its kernels are for cuda tensors, not cpu"
    assert explain(PROBLEM)["reference"] is None
    given = operands("one voxel", torch.float32)
    try:
        with tuning(tmp_path / "measurements.json"):
            with_gradients(fused_upconv3d(**given), given)  # type: ignore[arg-type]
        for method in ("upconv3d", "upconv3d_grad_input", "upconv3d_grad_weight"):
            times = measured(PROBLEM, method)
            assert {"native", "torch"} <= times.keys(), method
            assert all(time is not None and math.isfinite(time) for time in times.values())
    finally:
        drop_dependents()


def test_no_channels_are_refused_by_compiled_kernels() -> None:
    reasons = explain(UpconvProblem("cpu", torch.float32, 0, 5))
    assert reasons["native"] == "it needs at least one channel"
    assert reasons["torch"] is None


def test_phases_use_every_product_once() -> None:
    """Of ones: 27 * 8 products, each in one of the 64 sums."""
    weights = phase_weights(torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 3, 3, 3)).view(2, 2, 2, 2, 2, 2)
    along = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # [phase, tap] along an axis
    assert torch.equal(weights, torch.einsum("ai,bj,ck->abcijk", along, along, along))
    assert int(weights.sum()) == 27 * 8


def test_fake_tensors_leave_nothing_behind() -> None:
    fused_upconv._kept_transforms.cache_clear()
    with FakeTensorMode():
        assert phase_weights(torch.empty(2, 3, 2, 2, 2), torch.empty(4, 3, 3, 3, 3)).shape == (2, 2, 2, 4, 2, 2, 2, 2)
    phases = phase_weights(torch.ones(2, 3, 2, 2, 2), torch.ones(4, 3, 3, 3, 3))
    assert float(phases.sum()) == 8 * 27 * 3 * 8
