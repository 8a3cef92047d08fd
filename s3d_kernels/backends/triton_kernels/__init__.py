"""Backend "triton": kernels in Triton over visible voxels, for NVIDIA GPUs of any generation that Triton supports.

Written once for all of them: on Hopper and Blackwell the compiler turns the same products into `wgmma` and `tcgen05`.
bfloat16 and float16 are multiplied on tensor cores, and so is float32 (as TF32) where torch allows that for
convolutions; sums are float32, in an order that the problem and the GPU fix.

The files beside this one hold kernels and their launchers and are imported when they are needed, for Triton takes
a while to import and is not everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .. import stacked_phases
from ..first_use import FirstUseChecks
from ..interface import BlockGeometry, ConvProblem, PoolKind, Problem, UpconvProblem, WindowGeometry

# Convolutions of fewer channels a group take (tap, channel) pairs as the rows of their weight's matrix.
FLAT_CHANNELS = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, so that of the tensors has to be it."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def _missing() -> str | None:
    """What there must be and is not."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available():
        return None  # then tensors are on the CPU, where the interpreter computes
    import triton

    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, so that kernels run in Python on the CPU"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        return f"its kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


class TritonBackend:
    """The Triton kernels, for tensors of some devices: others than "cuda" only under Triton's interpreter."""

    def __init__(self, name: str = "triton", devices: Sequence[str] = ("cuda",)) -> None:
        self.name = name
        self._devices = devices
        self._checks = FirstUseChecks(self, "triton")

    def why_not(self, problem: Problem) -> str | None:
        if problem.device not in self._devices:
            return f"its kernels are for {' and '.join(self._devices)} tensors, not {problem.device}"
        if problem.dtype not in DTYPES:
            *others, last = (str(dtype).removeprefix("torch.") for dtype in DTYPES)
            return f"it computes {', '.join(others)} and {last}, not {problem.dtype}"
        if isinstance(problem, ConvProblem | UpconvProblem) and min(problem.in_channels, problem.out_channels) < 1:
            return "it needs at least one channel"
        return _missing() or (self._checks.reason(problem) if problem.device == "cuda" else None)

    # ---- convolution

    def conv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: WindowGeometry, groups: int) -> Tensor:
        from . import conv3d

        with on_device_of(x):
            return conv3d.forward(x.detach(), weight.detach(), bias, geometry, groups)

    def fuses(self, problem: ConvProblem) -> bool:
        # A tile of at least 32 voxels must lie in one block, so that it has one sample. Few channels a group, and one
        # (depthwise), have kernels that fuse nothing.
        few = problem.in_channels < FLAT_CHANNELS * problem.groups
        return problem.stride == (1, 1, 1) and math.prod(problem.block) % 32 == 0 and not few

    def conv3d_fused(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        affine: tuple[Tensor, Tensor, Tensor] | None,
        slope: float,
        geometry: WindowGeometry,
        sample_offsets: Tensor,
        groups: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from . import conv3d

        with on_device_of(x):
            return conv3d.fused(x.detach(), weight.detach(), bias, affine, slope, geometry, sample_offsets, groups)

    def conv3d_grad_input(self, grad: Tensor, weight: Tensor, geometry: WindowGeometry, groups: int) -> Tensor:
        from . import conv3d

        with on_device_of(grad):
            return conv3d.grad_input(grad.detach(), weight.detach(), geometry, groups)

    def conv3d_grad_weight(
        self, grad: Tensor, x: Tensor, geometry: WindowGeometry, groups: int
    ) -> tuple[Tensor, Tensor]:
        from . import conv3d_grad_weight

        with on_device_of(x):
            return conv3d_grad_weight.grad_weight(grad.detach(), x.detach(), geometry, groups)

    # ---- up-convolution

    def upconv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return stacked_phases.upconv3d(self, x, weight, bias)

    def upconv3d_grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        return stacked_phases.upconv3d_grad_input(self, grad, weight)

    def upconv3d_grad_weight(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return stacked_phases.upconv3d_grad_weight(self, grad, x)

    # ---- pooling

    def pool3d(self, x: Tensor, geometry: WindowGeometry, kind: PoolKind, divisor: int) -> Tensor:
        from . import pool

        with on_device_of(x):
            return pool.pool3d(x.detach(), geometry, kind, divisor)

    def pool3d_grad(
        self, grad: Tensor, x: Tensor | None, geometry: WindowGeometry, kind: PoolKind, divisor: int
    ) -> Tensor:
        from . import pool

        with on_device_of(grad):
            return pool.pool3d_grad(grad.detach(), x, geometry, kind, divisor)

    # ---- normalisation

    def norm_statistics(self, x: Tensor, geometry: BlockGeometry) -> tuple[Tensor, Tensor]:
        from . import norm

        with on_device_of(x):
            return norm.statistics(x.detach(), geometry)

    def norm_apply(
        self,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        slope: float,
        geometry: BlockGeometry,
    ) -> Tensor:
        from . import norm

        with on_device_of(x):
            return norm.apply(x.detach(), mean, scale, shift, residual, slope, geometry)

    def norm_grad_sums(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, geometry: BlockGeometry
    ) -> tuple[Tensor, Tensor]:
        from . import norm

        with on_device_of(x):
            return norm.grad_sums(grad.detach(), x.detach(), mean, rstd, geometry)

    def norm_grad_activation(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        shift: Tensor,
        slope: float,
        geometry: BlockGeometry,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from . import norm

        with on_device_of(x):
            return norm.grad_activation(grad.detach(), x.detach(), y, mean, rstd, scale, shift, slope, geometry)

    def norm_grad_input(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        offset: Tensor,
        slope: Tensor,
        geometry: BlockGeometry,
    ) -> Tensor:
        from . import norm

        with on_device_of(x):
            return norm.grad_input(grad.detach(), x.detach(), mean, rstd, scale, offset, slope, geometry)

    # ---- dense <-> blocks

    def gather_blocks(self, dense: Tensor, geometry: BlockGeometry) -> Tensor:
        from . import blocks

        with on_device_of(dense):
            return blocks.gather(dense.detach(), geometry)

    def scatter_blocks(self, blocks_: Tensor, fill: Tensor, geometry: BlockGeometry) -> Tensor:
        from . import blocks

        with on_device_of(blocks_):
            return blocks.scatter(blocks_.detach(), fill.detach(), geometry)
