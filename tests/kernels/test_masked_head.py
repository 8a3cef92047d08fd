"""Norm, LeakyReLU and 1x1x1 convolution at masked voxels against the three dense layers of torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s3d_kernels import BlockMask, BlockSparseTensor, masked_head, operators
from s3d_kernels.operators.masked_head import masked_head_grad

from .test_operators import able_on_cpu, seeded

CHANNELS, EPS, SLOPE = 6, 1e-3, 0.1
MASKED: dict[str, Callable[[], BlockMask]] = {
    "unequal": lambda: BlockMask.random(3, (2, 3, 2), 4, (0.2, 0.9), seeded(1)).complement(),
    "anisotropic": lambda: BlockMask.random(2, (3, 2, 2), (1, 4, 6), 0.5, seeded(4)).complement(),
    "single voxels": lambda: BlockMask.random(2, (5, 3, 4), 1, 0.7, seeded(3)).complement(),
    "everything": lambda: BlockMask.random(2, 2, 4, 0.0),
    "nothing": lambda: BlockMask.random(2, 2, 4, 1.0),
}


def whole(x: Tensor) -> BlockSparseTensor:
    """[N, C, D, H, W] as one block a sample."""
    blocks = x.permute(0, 2, 3, 4, 1).contiguous()
    return BlockSparseTensor(blocks, BlockMask.from_grid(torch.ones(len(x), 1, 1, 1).bool(), tuple(x.shape[2:])))


def operands(masked: BlockMask, outputs: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """x [N, C, D, H, W], weight and bias of the norm, weight and bias of the convolution."""
    generator = seeded(seed)
    shapes = [(masked.batch, CHANNELS, *masked.shape), (CHANNELS,), (CHANNELS,), (outputs, CHANNELS, 1, 1, 1)]
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).add_(0.5).to(dtype).requires_grad_()
        for shape in (*shapes, (outputs,))
    ]


def ours(masked: BlockMask, backend: str, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *conv: Tensor) -> Tensor:
    head = masked_head(whole(x), norm_weight, norm_bias, EPS, SLOPE, *conv, masked, backend)
    assert head.mask is masked
    return head.to_dense()


def plain(masked: BlockMask, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *conv: Tensor) -> Tensor:
    normalised = F.instance_norm(x, weight=norm_weight, bias=norm_bias, eps=EPS)
    return torch.where(masked.to_dense(), F.conv3d(F.leaky_relu(normalised, SLOPE), *conv), 0)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    y = function(*inputs)
    grad = torch.randn(y.shape, generator=seeded(9), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def assert_near(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative l2; what is zero by symmetry is compared with the largest gradient."""
    size = max(float(e.double().norm()) for e in expected)
    for result, reference in zip(results, expected, strict=True):
        assert result.shape == reference.shape
        error = float((result.double() - reference.double()).norm())
        assert error <= tolerance * max(float(reference.double().norm()), 1e-3 * size)


def cut_finely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces of a few rows, some of them of two samples."""
    module = sys.modules["s3d_kernels.operators.masked_head"]
    monkeypatch.setitem(module.PIECE_BYTES, "cpu", 5 * 4 * 4 * CHANNELS * 8)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", list(MASKED))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", able_on_cpu())
def test_value_and_gradients_are_those_of_dense_layers(
    backend: str, dtype: torch.dtype, name: str, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked = MASKED[name]()
    exact = with_gradients(lambda *inputs: plain(masked, *inputs), operands(masked, outputs, torch.float64))
    inputs = operands(masked, outputs, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_near(with_gradients(lambda *inputs: ours(masked, backend, *inputs), inputs), exact, tolerance)
    cut_finely(monkeypatch)
    assert_near(with_gradients(lambda *inputs: ours(masked, backend, *inputs), inputs), exact, tolerance)


@pytest.mark.parametrize("fixture", ["interpreted", "emulated"])
def test_kernels_for_gpus(fixture: str, request: pytest.FixtureRequest) -> None:
    backend = request.getfixturevalue(fixture).name
    masked = MASKED["unequal"]()
    exact = with_gradients(lambda *inputs: plain(masked, *inputs), operands(masked, 2, torch.float64))
    inputs = operands(masked, 2, torch.float32)
    assert_near(with_gradients(lambda *inputs: ours(masked, backend, *inputs), inputs), exact, 1e-5)


def test_bfloat16_in_autocast() -> None:
    masked = MASKED["unequal"]()
    exact = with_gradients(lambda *inputs: plain(masked, *inputs), operands(masked, 1, torch.float64))
    x, *parameters = operands(masked, 1, torch.float32)
    for inputs in ([x, *parameters], [x.detach().bfloat16().requires_grad_(), *parameters]):
        with torch.autocast("cpu", torch.bfloat16):
            results = with_gradients(lambda *inputs: ours(masked, "native", *inputs), inputs)
        assert results[0].dtype == torch.bfloat16
        assert [r.dtype for r in results[1:]] == [t.dtype for t in inputs]
        assert_near(results, exact, 2e-2)


def test_statistics_that_are_known_are_used() -> None:
    masked = MASKED["unequal"]()
    x, *parameters = (t.detach() for t in operands(masked, 1, torch.float64))
    features = whole(x)
    count = float(x[0, 0].numel())
    # Those of x + 1, so that one can tell.
    features.remember_statistics(x.mean((2, 3, 4)) + 1, x.var((2, 3, 4), correction=0) * count, "native")
    head = masked_head(features, *parameters[:2], EPS, SLOPE, *parameters[2:], masked, "native").to_dense()
    normalised = F.instance_norm(x, eps=EPS) - (x.var((2, 3, 4), correction=0, keepdim=True) + EPS).rsqrt()
    weight, bias = (t.view(-1, 1, 1, 1) for t in parameters[:2])
    expected = F.conv3d(F.leaky_relu(normalised * weight + bias, SLOPE), *parameters[2:])
    assert_near([head], [torch.where(masked.to_dense(), expected, 0)], 1e-10)


def test_no_samples() -> None:
    masked = BlockMask.from_grid(torch.ones(0, 2, 2, 2, dtype=torch.bool), 4)
    y, *gradients = with_gradients(lambda *inputs: ours(masked, "native", *inputs), operands(masked, 2, torch.float32))
    assert y.shape == (0, 2, 8, 8, 8)
    assert all(not bool(gradient.any()) for gradient in gradients)


def test_visible_voxels_count() -> None:
    """They are not computed, but they take part in the statistics, in value and gradient."""
    masked = BlockMask.random(2, 2, 4, 0.5, seeded(6)).complement()
    x, *parameters = (t.detach() for t in operands(masked, 1, torch.float64))
    visible = ~masked.to_dense().expand_as(x)
    spoilt = x.clone()
    spoilt[0][visible[0]] = torch.nan
    y = ours(masked, "native", spoilt, *parameters)
    shown = masked.to_dense()
    assert bool(y[0][shown[0]].isnan().all())
    assert torch.equal(y[1], ours(masked, "native", x, *parameters)[1])
    grad_x = with_gradients(lambda t: ours(masked, "native", t, *parameters), [x.requires_grad_()])[1]
    assert bool((grad_x[visible] != 0).all())


def test_nothing_is_kept_but_the_input() -> None:
    masked = BlockMask.random(2, 2, 8, 0.5, seeded(6)).complement()
    x, *parameters = operands(masked, 1, torch.float32)
    features = whole(x)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Any:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        masked_head(features, *parameters[:2], EPS, SLOPE, *parameters[2:], masked, "native")
    assert kept.pop(features.blocks.data_ptr()) == features.blocks.nbytes
    assert sum(kept.values()) < features.blocks.nbytes / 20


def test_results_depend_on_neither_run_nor_threads() -> None:
    masked = BlockMask.random(2, 2, 16, 0.5, seeded(6)).complement()
    inputs = operands(masked, 2, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            results.append(with_gradients(lambda *inputs: ours(masked, "native", *inputs), inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# opcheck itself reads .grad of its permuted copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck() -> None:
    masked = MASKED["unequal"]()
    x, norm_weight, norm_bias, weight, bias = operands(masked, 2, torch.float64)
    tables = torch.rand(2, masked.batch, CHANNELS, generator=seeded(3), dtype=torch.float64).unbind(0)
    rest = (*tables, masked.index, masked.sample_offsets, list(masked.block), SLOPE, "native")
    given = [t.detach() for t in (whole(x).blocks, norm_weight, norm_bias, weight[..., 0, 0, 0], bias)]
    torch.library.opcheck(operators.masked_head.definition, (*(t.requires_grad_() for t in given), *rest))
    grad = torch.randn(masked.num_blocks, *masked.block, 2, generator=seeded(4), dtype=torch.float64)
    torch.library.opcheck(masked_head_grad.definition, (grad, *(t.detach() for t in given[:4]), *rest))


def test_what_does_not_fit_is_named() -> None:
    masked = MASKED["everything"]()
    x, norm_weight, norm_bias, weight, bias = (t.detach() for t in operands(masked, 2, torch.float32))
    good: dict[str, Any] = {
        "x": whole(x),
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "eps": EPS,
        "slope": SLOPE,
        "weight": weight,
        "bias": bias,
        "masked": masked,
    }
    masked_head(**good)
    for name, bad, message in (
        ("x", BlockSparseTensor.from_dense(x, masked), "x must be whole volumes"),
        ("masked", BlockMask.from_voxels(torch.rand(2, 8, 8, 8, generator=seeded(0)) < 0.5), "masked must be a mask"),
        ("masked", BlockMask.random(2, 3, 4, 0.5), "masked must be of the volumes of x"),
        ("weight", weight[:, 1:], r"weight must be \[O, C, 1, 1, 1\] for C=6"),
        ("norm_weight", bias, "norm_weight must be a vector of 6 channels"),
        ("norm_bias", bias, "norm_bias must be a vector of 6 channels"),
        ("bias", norm_bias, "bias must be a vector of 2 channels"),
        ("slope", -0.1, r"slope must be in \[0, 1\)"),
        ("weight", weight.double(), "x and weight must have the same dtype"),
        ("backend", "fastest", "backend must be"),
    ):
        with pytest.raises(ValueError, match=message):
            masked_head(**{**good, name: bad})
