"""The native CPU kernels of the fused up-convolution, called as the backend calls them, against torch in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s3d_kernels.backends import native

from .test_operators import TOLERANCE, assert_close, draw

SETS = native.instruction_sets()

# Batch, sides of the coarse volume; input and output channels. Tiles are of 3x3x3 coarse voxels.
PROBLEMS = [
    ((1, 1, 1, 1), (1, 1)),
    ((2, 1, 2, 3), (3, 5)),
    ((1, 3, 6, 3), (17, 33)),
    ((2, 4, 5, 7), (6, 50)),
    ((1, 7, 2, 1), (40, 2)),
    ((1, 13, 10, 11), (18, 20)),
    ((1, 20, 21, 19), (5, 3)),
    ((1, 4, 3, 3), (100, 70)),
]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    native.use_instruction_set(SETS[0])


def phase_by_phase(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, d, h, w, C_low], [2, 2, 2, C, C_low, 2, 2, 2], [C] to [N, 2d, 2h, 2w, C]: what the operator means."""
    batch, *shape, _ = x.shape
    y = x.new_zeros(batch, *(2 * side for side in shape), weight.shape[3])
    for p in itertools.product((0, 1), repeat=3):
        # Phase p of an axis sees the voxels at p - 1 and p.
        padding = [side for axis in reversed(p) for side in (1 - axis, axis)]
        of_phase = F.conv3d(F.pad(x.permute(0, 4, 1, 2, 3), padding), weight[p], bias)
        y[:, p[0] :: 2, p[1] :: 2, p[2] :: 2] = of_phase.permute(0, 2, 3, 4, 1)
    return y


def tensors(shape: tuple[int, ...], channels: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias, grad; asymmetric, so that flipped taps and exchanged phases show."""
    fine = (shape[0], *(2 * side for side in shape[1:]), channels[1])
    sizes = [(*shape, channels[0]), (2, 2, 2, channels[1], channels[0], 2, 2, 2), (channels[1],), fine]
    return [draw(size, seed, torch.float64).to(dtype) for seed, size in enumerate(sizes)]


def computed(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, threads: int) -> list[Tensor]:
    """Output and gradients of x, weight and bias by the library; results hold NaN before they are written."""
    functions = native.CPU.functions()
    results = [torch.full_like(like, torch.nan) for like in (grad, x, weight, grad[0, 0, 0, 0])]
    y, grad_x, grad_weight, grad_bias = results
    functions.upconv3d(x, weight, bias, y, threads)
    functions.upconv3d_grad_input(grad, weight, grad_x, threads)
    functions.upconv3d_grad_weight(grad, x, grad_weight, grad_bias, threads)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(("shape", "channels"), PROBLEMS, ids=str)
def test_against_eight_convolutions(
    shape: tuple[int, ...], channels: tuple[int, int], instructions: str, dtype: torch.dtype
) -> None:
    native.use_instruction_set(instructions)
    *inputs, grad = tensors(shape, channels, dtype)
    x, weight, bias = (tensor.double().requires_grad_() for tensor in inputs)
    y = phase_by_phase(x, weight, bias)
    truth = [y.detach(), *torch.autograd.grad(y, [x, weight, bias], grad.double())]
    names = ("y", "grad_x", "grad_weight", "grad_bias")
    for name, result, expected in zip(names, computed(*inputs, grad, 1), truth, strict=True):
        assert_close(result, expected, dtype, TOLERANCE[dtype], name)


@pytest.mark.parametrize("instructions", SETS)
def test_without_bias(instructions: str) -> None:
    native.use_instruction_set(instructions)
    x, weight, _, grad = tensors((1, 4, 5, 3), (20, 9), torch.float32)
    y = torch.full_like(grad, torch.nan)
    native.CPU.functions().upconv3d(x, weight, None, y, 1)
    assert_close(y, phase_by_phase(x.double(), weight.double(), None), torch.float32, TOLERANCE[torch.float32], "y")


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(("shape", "channels"), PROBLEMS, ids=str)
def test_same_bits_with_any_number_of_threads(
    shape: tuple[int, ...], channels: tuple[int, int], instructions: str
) -> None:
    native.use_instruction_set(instructions)
    inputs = tensors(shape, channels, torch.float32)
    first = computed(*inputs, threads=1)
    for threads in (1, 2, 3, 7):
        assert all(torch.equal(a, b) for a, b in zip(first, computed(*inputs, threads=threads), strict=True))


def test_bad_arguments() -> None:
    functions = native.CPU.functions()
    x, weight, bias, grad = tensors((1, 2, 3, 4), (5, 6), torch.float32)
    y = torch.empty_like(grad)
    with pytest.raises(ValueError, match="twice the sides"):
        functions.upconv3d(x, weight, bias, y[:, :3].contiguous(), 1)
    with pytest.raises(ValueError, match="weight must have shape"):
        functions.upconv3d(x, weight[:, :, :, :5].contiguous(), bias, y, 1)
    with pytest.raises(ValueError, match="bias must have shape"):
        functions.upconv3d(x, weight, bias[:5], y, 1)
    with pytest.raises(TypeError, match="weight has the wrong dtype"):
        functions.upconv3d(x, weight.double(), bias, y, 1)
    with pytest.raises(ValueError, match="grad must be contiguous"):
        functions.upconv3d_grad_input(grad.transpose(1, 2).contiguous().transpose(1, 2), weight, x, 1)
    with pytest.raises(ValueError, match="grad_bias must have shape"):
        functions.upconv3d_grad_weight(grad, x, torch.empty_like(weight), torch.empty(5), 1)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        functions.upconv3d(x, weight, bias, y, 0)
