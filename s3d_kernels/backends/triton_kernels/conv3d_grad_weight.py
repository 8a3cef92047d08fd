"""Gradient of a convolution's weight and bias: for each tap the product of gathered inputs and output gradients.

    grad_weight[tap, k, n] = sum over visible outputs v of x[source(v, tap), k] * grad[v, n]
    grad_bias[n]           = sum over visible outputs v of grad[v, n]

Layouts   x [voxels, groups * K], grad [voxels, groups * N], channels last. Parts [splits, groups, taps, K, N] float32.
Work      A program has a tile of TILE_M channels of x under one tap x TILE_N channels of grad of one group, in
          registers over a loop through its part of the voxels, TILE_K a step. Programs beside each other have the
          same voxels and other taps or channels, so that rows are still in L2. torch adds the parts of all splits.
          FLAT, for fewer than 16 channels a group (the stem): a tile's rows are (tap, channel) pairs.
Memory    STAGES * (TILE_M + TILE_N) * TILE_K elements of shared memory; TILE_M * TILE_N / threads sums a thread.
Numbers   bfloat16, float16, TF32 or exact float32, sums in float32 in an order that the problem and the GPU fix.
Limits    Fewer than 2^31 voxels on each side.
Expected  As conv3d.py. Not measured on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import WindowGeometry
from . import FLAT_CHANNELS, conv3d_depthwise
from .configs import ConvConfig, GradWeightClass, choose, power_of_two
from .product import multiply, multiprocessors, offset_of, precision
from .tiles import is_wide
from .window import Window, forward_window, place_of, source_of

# Voxels below which a split is not worth its part.
_LEAST_VOXELS = 256


@triton.jit(do_not_specialize=["units", "splits"])
def conv3d_grad_weight_kernel(
    x_,  # [voxels, groups * k]
    grad,  # [units, groups * n]
    parts,  # [splits, groups, taps, k, n] float32
    table,
    gathered_voxels,
    written_voxels,
    units,
    k_channels,
    n_channels,
    groups,
    splits,
    SHAPE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,  # channels of a group, or 0
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    K_DIVISOR: tl.constexpr,  # of k_channels, so that rows are copied in chunks of so many numbers
    N_DIVISOR: tl.constexpr,
):
    k_channels = k_channels // K_DIVISOR * K_DIVISOR  # in a form from which the compiler sees it
    n_channels = n_channels // N_DIVISOR * N_DIVISOR
    taps: tl.constexpr = SHAPE.KERNEL[0] * SHAPE.KERNEL[1] * SHAPE.KERNEL[2]
    rows = k_channels * taps if FLAT > 0 else k_channels  # of the matrix of a tap, or of all
    tiles_n = tl.cdiv(n_channels, TILE_N)
    tiles_m = tl.cdiv(rows, TILE_M)
    rest = tl.program_id(0)
    n = rest % tiles_n * TILE_N + tl.arange(0, TILE_N)
    rest = rest // tiles_n
    m = rest % tiles_m * TILE_M + tl.arange(0, TILE_M)
    rest = rest // tiles_m
    tap = 0
    if FLAT == 0:
        tap = rest % taps
        rest = rest // taps
    group = rest % groups
    split = rest // groups
    inside_m = m < rows
    inside_n = n < n_channels
    if FLAT > 0:
        k = m % FLAT
        tap_of_m = m // FLAT
        tap_x = (tap_of_m % SHAPE.KERNEL[2])[None, :]
        tap_y = (tap_of_m // SHAPE.KERNEL[2] % SHAPE.KERNEL[1])[None, :]
        tap_z = (tap_of_m // SHAPE.KERNEL[2] // SHAPE.KERNEL[1])[None, :]
    else:
        k = m
        tap_x = tap % SHAPE.KERNEL[2]
        tap_y = tap // SHAPE.KERNEL[2] % SHAPE.KERNEL[1]
        tap_z = tap // SHAPE.KERNEL[2] // SHAPE.KERNEL[1]
    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for first in tl.range(split * TILE_K, units, splits * TILE_K, num_stages=STAGES):
        unit = first + tl.arange(0, TILE_K)
        visible = unit < units
        row, z, y, x = place_of(tl.where(visible, unit, 0), SHAPE)
        if written_voxels is not None:
            visible = tl.load(written_voxels + unit, mask=visible, other=0) != 0
        if FLAT > 0:
            exists = visible[:, None] & inside_m[None, :]
            source = source_of(
                table,
                gathered_voxels,
                row[:, None],
                z[:, None],
                y[:, None],
                x[:, None],
                tap_z,
                tap_y,
                tap_x,
                0,
                0,
                0,
                exists,
                SHAPE,
            )  # [TILE_K, TILE_M]
            pairs = source >= 0
        else:
            source = source_of(table, gathered_voxels, row, z, y, x, tap_z, tap_y, tap_x, 0, 0, 0, visible, SHAPE)
            source = source[:, None]
            pairs = (source >= 0) & inside_m[None, :]
        at = offset_of(source, groups * k_channels, WIDE) + (group * k_channels + k)[None, :]
        a = tl.load(x_ + at, mask=pairs, other=0.0)  # [TILE_K, TILE_M]
        at = offset_of(unit, groups * n_channels, WIDE)[:, None] + (group * n_channels + n)[None, :]
        b = tl.load(grad + at, mask=visible[:, None] & inside_n[None, :], other=0.0)  # [TILE_K, TILE_N]
        sums = multiply(tl.trans(a), b, sums, PRECISION)
    part = (split * groups + group).to(tl.int64) * taps * k_channels * n_channels
    to = part + (tap * k_channels + m)[:, None] * n_channels + n[None, :]
    tl.store(parts + to, sums, mask=inside_m[:, None] & inside_n[None, :])


@triton.jit(do_not_specialize=["units", "splits"])
def column_sums_kernel(
    grad,  # [units, channels]
    written_voxels,
    parts,  # [splits, channels] float32
    units,
    channels,
    splits,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(0) // tiles
    inside = channel < channels
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in tl.range(split * ROWS, units, splits * ROWS):
        unit = first + tl.arange(0, ROWS)
        visible = unit < units
        if written_voxels is not None:
            visible = tl.load(written_voxels + unit, mask=visible, other=0) != 0
        at = offset_of(unit, channels, WIDE)[:, None] + channel[None, :]
        sums += tl.load(grad + at, mask=visible[:, None] & inside[None, :], other=0.0).to(tl.float32)
    tl.store(parts + split * channels + channel, tl.sum(sums, 0), mask=inside)


def grad_weight(grad: Tensor, x: Tensor, geometry: WindowGeometry, groups: int) -> tuple[Tensor, Tensor]:
    """See `Backend.conv3d_grad_weight`."""
    grad, x = grad.contiguous(), x.contiguous()
    k_channels, n_channels = x.shape[-1] // groups, grad.shape[-1] // groups
    shape = (groups * n_channels, k_channels, *geometry.kernel_size)
    if len(geometry.target_index) == 0:
        return x.new_zeros(shape), x.new_zeros(shape[0])
    window = forward_window(geometry)
    if conv3d_depthwise.applies(x.new_empty(shape[:2]), groups):
        of_weight = conv3d_depthwise.grad_weight(window, grad, x)
    else:
        of_weight = _products(window, grad, x, k_channels, n_channels, groups).reshape(shape)
    return of_weight.to(x.dtype).contiguous(), _column_sums(window, grad).to(x.dtype)


def _products(window: Window, grad: Tensor, x: Tensor, k_channels: int, n_channels: int, groups: int) -> Tensor:
    """[groups, N, K, taps] float32."""
    taps = math.prod(window.shape.KERNEL)
    flat = k_channels < FLAT_CHANNELS
    rows, matrices = (k_channels * taps, 1) if flat else (k_channels, taps)
    exact = precision(x.dtype) == "ieee"
    kind = GradWeightClass(x.dtype, exact, rows, n_channels, groups, window.shape, flat)

    def launch(config: ConvConfig) -> Tensor:
        tiles = matrices * groups * triton.cdiv(rows, config.tile_m) * triton.cdiv(n_channels, config.tile_n)
        splits = min(triton.cdiv(window.units, _LEAST_VOXELS), triton.cdiv(4 * multiprocessors(x.device), tiles))
        parts = x.new_empty(splits, groups, taps, k_channels, n_channels, dtype=torch.float32)
        conv3d_grad_weight_kernel[(splits * tiles,)](
            x,
            grad,
            parts,
            window.table,
            window.gathered_voxels,
            window.written_voxels,
            window.units,
            k_channels,
            n_channels,
            groups,
            splits,
            SHAPE=window.shape,
            TILE_M=config.tile_m,
            TILE_N=config.tile_n,
            TILE_K=config.tile_k,
            STAGES=kind.stages(config),
            FLAT=k_channels if flat else 0,
            WIDE=is_wide(x, grad),
            PRECISION=precision(x.dtype),
            K_DIVISOR=math.gcd(k_channels, 16),
            N_DIVISOR=math.gcd(n_channels, 16),
            num_warps=config.warps,
        )
        return parts.sum(0).permute(0, 3, 2, 1)

    return launch(choose(kind, launch, x.device))


def _column_sums(window: Window, grad: Tensor) -> Tensor:
    """[C] float32: over visible voxels."""
    channels = grad.shape[-1]
    rows, columns = 32, power_of_two(channels, 16, 64)
    tiles = triton.cdiv(channels, columns)
    splits = min(triton.cdiv(window.units, _LEAST_VOXELS), triton.cdiv(4 * multiprocessors(grad.device), tiles))
    parts = grad.new_empty(splits, channels, dtype=torch.float32)
    column_sums_kernel[(splits * tiles,)](
        grad,
        window.written_voxels,
        parts,
        window.units,
        channels,
        splits,
        ROWS=rows,
        CHANNELS=columns,
        WIDE=is_wide(grad),
    )
    return parts.sum(0)
