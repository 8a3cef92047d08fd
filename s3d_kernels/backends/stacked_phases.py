"""Up-convolution by the convolution that a backend has: the eight phases as one kernel of 2^3 taps.

The phases (see `Backend.upconv3d`) read the same windows, one voxel apart: with o = q + p, phase p of coarse voxel q is
the window of x at o - 1 and o. So one convolution with 8 * C output channels gives all of them, at d + 1 positions o
along an axis of d voxels; phase p takes the positions p ... p + d - 1. What it computes beyond that is one layer of
voxels. A convolution for each phase would compute nothing in vain, but take eight launches, and eight compilations
where the padding is a constant of the kernel.

    x, with a layer of zeros at the far faces [N, d+1, h+1, w+1, C_low]
      -> convolution, padding 1 at the near faces [N, d+1, h+1, w+1, 8 * C]
      -> interleaved [N, 2d, 2h, 2w, C]

Each sample is one block, so nothing is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import Backend, Triple, WindowGeometry

PHASES: tuple[Triple, ...] = tuple(itertools.product(range(2), repeat=3))  # type: ignore[arg-type]


def upconv3d(backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `Backend.upconv3d`."""
    x = _with_far_layer(x)
    stacked = backend.conv3d(x, weight.flatten(0, 3), None if bias is None else bias.repeat(8), _windows(x), 1)
    batch, *positions, channels = stacked.shape
    y = stacked.new_empty(batch, *(2 * (o - 1) for o in positions), channels // 8)
    for phase, part in _phases(y, stacked):
        phase.copy_(part)
    return y


def upconv3d_grad_input(backend: Backend, grad: Tensor, weight: Tensor) -> Tensor:
    """See `Backend.upconv3d_grad_input`."""
    stacked = _stack(grad)
    grad_x = backend.conv3d_grad_input(stacked, weight.flatten(0, 3), _windows(stacked), 1)
    return grad_x[:, :-1, :-1, :-1].contiguous()


def upconv3d_grad_weight(backend: Backend, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """See `Backend.upconv3d_grad_weight`."""
    x = _with_far_layer(x)
    grad_weight, grad_bias = backend.conv3d_grad_weight(_stack(grad), x, _windows(x), 1)
    return grad_weight.unflatten(0, (2, 2, 2, -1)), grad_bias.view(8, -1).sum(0)


def interleaved(y: Tensor) -> Iterator[Tensor]:
    """[N, d, h, w, C]: the voxels 2 q + p of a volume [N, 2d, 2h, 2w, C], as views of it, phase p by phase."""
    for p, q, r in PHASES:
        yield y[:, p::2, q::2, r::2]


def _phases(fine: Tensor, stacked: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of each phase in [N, 2d, 2h, 2w, C] and in [N, d+1, h+1, w+1, 8 * C]."""
    d, h, w = (size // 2 for size in fine.shape[1:4])
    parts = stacked.chunk(8, -1)
    for (p, q, r), phase, part in zip(PHASES, interleaved(fine), parts, strict=True):
        yield phase, part[:, p : p + d, q : q + h, r : r + w]


def _stack(fine: Tensor) -> Tensor:
    """[N, 2d, 2h, 2w, C] -> [N, d+1, h+1, w+1, 8 * C], zeros at positions that a phase does not take."""
    batch, *sizes, channels = fine.shape
    stacked = fine.new_zeros(batch, *(size // 2 + 1 for size in sizes), 8 * channels)
    for phase, part in _phases(fine, stacked):
        part.copy_(phase)
    return stacked


def _with_far_layer(x: Tensor) -> Tensor:
    """[N, d, h, w, C] -> [N, d+1, h+1, w+1, C]."""
    return F.pad(x, (0, 0, 0, 1, 0, 1, 0, 1))


def _windows(x: Tensor) -> WindowGeometry:
    """Of 2^3 taps, at o - 1 and o, on volumes [N, D, H, W, ...] that are one block each."""
    batch, *sizes = x.shape[:4]
    shape: Triple = tuple(sizes)  # type: ignore[assignment]
    sample = torch.arange(batch, dtype=torch.int32, device=x.device)[:, None]
    one: Triple = (1, 1, 1)
    index = F.pad(sample, (0, 3))
    return WindowGeometry(
        source_index=index,
        source_voxels=None,
        target_index=index,
        target_voxels=None,
        table=F.pad(sample, (13, 13), value=-1),
        radius=one,
        batch=batch,
        shape=shape,
        target_block=shape,
        kernel_size=(2, 2, 2),
        stride=one,
        padding=one,
    )
