"""The check of a compiled GPU kernel at its first use in a process: one tiny problem, compared with `reference`."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .interface import Backend, BlockGeometry, FusingBackend, Problem, Triple, WindowGeometry
from .reference import ReferenceBackend

# Relative l2 error; float32 may be rounded to TF32.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

CHANNELS = 40  # no multiple of any tile


class FirstUseChecks:
    """The checks of one backend: each runs once in a process, and what it found stays.

    Args:
        backend: whose kernels are compared with `reference`.
        label: how warnings call its kernels, before the device: "native".
    """

    def __init__(self, backend: Backend, label: str) -> None:
        self._backend = backend
        self._label = label
        self._found: dict[tuple[str, int, torch.dtype], str | None] = {}

    def reason(self, problem: Problem) -> str | None:
        """Why the kernels of a problem must not be used, or None; for the backend's `why_not`.

        Checks once for each operator, current GPU and dtype, and warns of kernels that fail.

        Raises:
            torch.OutOfMemoryError: there is no memory for the check, which is not the kernels' fault.
        """
        on_gpu = problem.device == "cuda"
        key = (problem.operator, torch.cuda.current_device() if on_gpu else -1, problem.dtype)
        if key in self._found:
            return self._found[key]
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return None  # the check waits for its results, which a capture forbids
        reason: str | None
        try:
            wrong = disagreement(self._backend, problem.operator, problem.dtype, torch.device(problem.device))
            reason = None if wrong is None else f"it gave wrong results on this machine: {wrong}"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a driver that is too old, no code for this GPU, or a compiler that gives up
            wrong = reason = f"it cannot run on this machine: {(str(error).splitlines() or [repr(error)])[0]}"
        self._found[key] = reason
        if wrong is not None:
            warnings.warn(
                f"{self._label} {problem.device} kernels are disabled for {problem.operator}: {wrong}. Please report "
                "this, with what `python -m s3d_kernels.selfcheck` prints",
                stacklevel=3,
            )
        return reason


def disagreement(backend: Backend, operator: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """None if the kernels of an operator ("conv3d", "norm", "pool3d", "blocks", "upconv3d") agree with `reference`.

    Otherwise the name of the first one that does not, and by how much. Works below autograd, on raw kernels.
    """
    oracle = ReferenceBackend()
    for side in (4, 2) if operator == "conv3d" else (4,):  # convolution has another kernel for small blocks
        names = _results(backend, operator, dtype, device, side)
        truths = _results(oracle, operator, torch.float64, device, side)
        for name, truth in truths.items():
            error = float((names[name].double() - truth).norm() / truth.norm())
            if not error <= TOLERANCE[dtype]:
                return f"{name} is wrong by {error:.1e} in {str(dtype).removeprefix('torch.')}"
    return None


def _results(backend: Backend, operator: str, dtype: torch.dtype, device: torch.device, side: int) -> dict[str, Tensor]:
    """Of two neighbouring blocks, beside which a third one is masked."""
    block: Triple = (side, side, side)
    generator = torch.Generator("cpu").manual_seed(side)

    def draw(*shape: int, table: bool = False) -> Tensor:
        # Rounded to bfloat16, so that every type holds the same numbers.
        values = torch.randn(*shape, generator=generator, device="cpu").to(torch.bfloat16)
        return values.to(device, torch.float32 if table and dtype != torch.float64 else dtype)

    index = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.int32, device=device)
    features, other = draw(2, *block, CHANNELS), draw(2, *block, CHANNELS)
    if operator in ("conv3d", "pool3d"):
        window = _window(index, block)
        if operator == "pool3d":
            return {
                "average pooling": backend.pool3d(features, window, "avg", 27),
                "the gradient of average pooling": backend.pool3d_grad(other, None, window, "avg", 27),
                "maximum pooling": backend.pool3d(features, window, "max", 27),
                "the gradient of maximum pooling": backend.pool3d_grad(other, features, window, "max", 27),
            }
        weight, bias, grad = draw(CHANNELS + 8, CHANNELS, 3, 3, 3), draw(CHANNELS + 8), draw(2, *block, CHANNELS + 8)
        grad_weight, grad_bias = backend.conv3d_grad_weight(grad, features, window, 1)
        affine = (draw(1, CHANNELS, table=True), draw(1, CHANNELS, table=True), draw(1, CHANNELS, table=True))
        return {
            "convolution": backend.conv3d(features, weight, bias, window, 1),
            "the gradient of a convolution's input": backend.conv3d_grad_input(grad, weight, window, 1),
            "the gradient of a convolution's weight": grad_weight,
            "the gradient of a convolution's bias": grad_bias,
            **(_fused(backend, features, weight, bias, affine, window) if side == 4 else {}),
        }
    if operator == "upconv3d":
        weight, bias = draw(2, 2, 2, CHANNELS + 8, CHANNELS, 2, 2, 2), draw(CHANNELS + 8)
        grad = draw(2, 2 * side, 2 * side, 2 * side, CHANNELS + 8)
        grad_weight, grad_bias = backend.upconv3d_grad_weight(grad, features)
        return {
            "up-convolution": backend.upconv3d(features, weight, bias),
            "the gradient of an up-convolution's input": backend.upconv3d_grad_input(grad, weight),
            "the gradient of an up-convolution's weight": grad_weight,
            "the gradient of an up-convolution's bias": grad_bias,
        }
    offsets = torch.tensor([0, 2], dtype=torch.int32, device=device)
    geometry = BlockGeometry(index, None, offsets, 1, (side, side, 3 * side), block)
    if operator == "blocks":
        dense = draw(1, CHANNELS, side, side, 3 * side)
        return {
            "the gathering of blocks": backend.gather_blocks(dense, geometry),
            "the scattering of blocks": backend.scatter_blocks(features, draw(CHANNELS), geometry),
        }
    mean, scale, shift, tilt = (draw(1, CHANNELS, table=True) for _ in range(4))
    statistics = backend.norm_statistics(features, geometry)
    before, of_grad, of_product = backend.norm_grad_activation(
        other, features, None, mean, scale, scale, shift, 0.1, geometry
    )
    return {
        "the mean": statistics[0],
        "the variance": statistics[1],
        "the normalisation": backend.norm_apply(features, mean, scale, shift, other, 0.1, geometry),
        "the gradient before an activation": before,
        "the gradient of a norm's bias": of_grad,
        "the gradient of a norm's weight": of_product,
        "the gradient of a norm's input": backend.norm_grad_input(
            other, features, mean, scale, scale, shift, tilt, geometry
        ),
    }


def _fused(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    affine: tuple[Tensor, Tensor, Tensor],
    window: WindowGeometry,
) -> dict[str, Tensor]:
    """Norm, LeakyReLU, convolution and statistics: at once, or one after the other where a backend does not fuse."""
    offsets = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
    if isinstance(backend, FusingBackend):
        y, mean, squares = backend.conv3d_fused(x, weight, bias, affine, 0.1, window, offsets, 1)
    else:
        geometry = BlockGeometry(window.source_index, None, offsets, 1, window.shape, window.target_block)
        y = backend.conv3d(backend.norm_apply(x, *affine, None, 0.1, geometry), weight, bias, window, 1)
        mean, squares = backend.norm_statistics(y, geometry)
    return {
        "the convolution of a norm": y,
        "the mean of a convolution": mean,
        "the variance of a convolution": squares,
    }


def _window(index: Tensor, block: Triple) -> WindowGeometry:
    """A 3x3x3 window with padding; the blocks lie beside each other along the width."""
    table = torch.full((2, 27), -1, dtype=torch.int32, device="cpu")
    table[0, 13], table[0, 14] = 0, 1
    table[1, 12], table[1, 13] = 0, 1
    one: Triple = (1, 1, 1)
    return WindowGeometry(
        source_index=index,
        source_voxels=None,
        target_index=index,
        target_voxels=None,
        table=table.to(index.device),
        radius=one,
        batch=1,
        shape=(block[0], block[1], 3 * block[2]),
        target_block=block,
        kernel_size=(3, 3, 3),
        stride=one,
        padding=one,
    )
