"""Convolution as an implicit matrix product: rows of gathered voxels, found through the block table, times weights.

    written[v, n] = bias[n] + sum over taps and k of act(gathered[source(v, tap), k]) * weight[tap, k, n]

over the taps for which v has a source: an input voxel that is visible. Forward, and with a transposed window the
gradient of the input: any kernel size, stride and grouping.

Layouts   gathered [voxels, groups * K], written [voxels, groups * N], channels last; the weight is packed beforehand
          to [groups, taps, K, N].
Work      A program makes tiles of TILE_M units of one class (window.py) x TILE_N channels of one group, one after
          another (persistent); the tiles of the same rows follow each other, so that their rows are still in L2. A
          step is one tap x TILE_K channels. Large blocks: the steps are one loop, which Triton pipelines. Blocks that
          are smaller than a tile, or partly visible (SKIP): taps without a pair in the tile are skipped, and the
          channels of each other tap are a pipelined loop.
          FLAT, for fewer than 16 channels a group (the stem): a step is TILE_K of all (tap, channel) pairs.
          SPLITS: where there are fewer tiles than multiprocessors, each takes a part of the taps; a second kernel
          adds the parts in a fixed order.
Fused     AFFINE: act is leaky_relu((x - mean) * scale + shift) with the sample's tables, applied while a step is
          between shared memory and tensor core; zeros of masked voxels come after it. MOMENTS: each tile also gives
          (count, mean, M2) of its visible rows, from float32 sums. Both for tiles that lie in one block.
Memory    STAGES * (TILE_M + TILE_N) * TILE_K elements of shared memory; TILE_M * TILE_N / threads sums a thread.
Numbers   bfloat16, float16, TF32 or exact float32, sums in float32 in an order that the problem and the GPU fix.
Limits    Fewer than 2^31 voxels on each side. Channel counts that are no multiple of 16 are loaded by elements.
Expected  (TILE_M + TILE_N) * TILE_K elements from L2 for 2 * TILE_M * TILE_N * TILE_K FLOP: 43 FLOP a byte in bfloat16
          with 128 x 64, bound by L2; the index arithmetic, about 30 integer operations a row and step, costs as
          much as the product where TILE_N and TILE_K are 32. On an H100 it took 1.8 times
          as long as `native` in stem and stage 0, the host's part included (docs/performance.md).
Source    Implicit GEMM over a gather, as in Tang et al., TorchSparse++ (MICRO 2023), section 3, with a block's table
          in place of a hash of points.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import WindowGeometry
from . import conv3d_depthwise, moments
from .configs import ConvClass, ConvConfig, choose
from .product import multiply, multiprocessors, offset_of, precision
from .tiles import is_wide
from .window import (
    Window,
    class_of,
    forward_window,
    place_of,
    source_of,
    tap_along,
    taps_along,
    transposed_window,
    written_voxel,
)

# At once on a multiprocessor.
_PROGRAMS = 2


@triton.jit(do_not_specialize=["units", "voxels", "tiles_m", "splits"])
def conv3d_kernel(
    gathered,  # [voxels, groups * k]
    packed,  # [groups, taps, k, n]
    bias,  # [groups * n]
    written,  # [voxels, groups * n], or [SPLITS, voxels, groups * n] float32
    table,
    gathered_voxels,
    written_voxels,
    written_index,  # [Vw, 4]
    mean,  # [samples, groups * k] float32
    scale,
    shift,
    slope,
    part_counts,  # [tiles_m] float32
    part_means,  # [tiles_m, groups * n] float32
    part_squares,
    units,  # of a class
    voxels,  # written
    k_channels,  # of a group
    n_channels,
    groups,
    tiles_m,  # of all classes
    splits,
    SHAPE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,  # channels of a group, or 0
    SKIP: tl.constexpr,
    AFFINE: tl.constexpr,
    MOMENTS: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    K_DIVISOR: tl.constexpr,  # of k_channels, so that rows are copied in chunks of so many numbers
    N_DIVISOR: tl.constexpr,
):
    k_channels = k_channels // K_DIVISOR * K_DIVISOR  # in a form from which the compiler sees it
    n_channels = n_channels // N_DIVISOR * N_DIVISOR
    tiles_n = tl.cdiv(n_channels, TILE_N)
    columns = groups * tiles_n
    tiles = tiles_m * splits * columns
    tiles_of_class = tl.cdiv(units, TILE_M)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        column = tile % columns
        split = tile // columns % splits
        tile_m = tile // columns // splits
        group = column // tiles_n
        n = column % tiles_n * TILE_N + tl.arange(0, TILE_N)  # [TILE_N]
        class_z, class_y, class_x = class_of(tile_m // tiles_of_class, SHAPE)
        unit = tile_m % tiles_of_class * TILE_M + tl.arange(0, TILE_M)  # [TILE_M]
        exists = unit < units
        row, z, y, x = place_of(tl.where(exists, unit, 0), SHAPE)
        voxel = written_voxel(row, z, y, x, class_z, class_y, class_x, SHAPE)
        visible = exists
        if written_voxels is not None:
            visible = tl.load(written_voxels + voxel, mask=exists, other=0) != 0
        sample = 0
        if AFFINE:
            sample = tl.load(written_index + tile_m * TILE_M // (SHAPE.UNITS[0] * SHAPE.UNITS[1] * SHAPE.UNITS[2]) * 4)

        taps_z = taps_along(class_z, 0, SHAPE)
        taps_y = taps_along(class_y, 1, SHAPE)
        taps_x = taps_along(class_x, 2, SHAPE)
        taps = taps_z * taps_y * taps_x
        # A class that is under no tap has no steps, but the pipeline computes addresses ahead.
        taps_y = tl.maximum(taps_y, 1)
        taps_x = tl.maximum(taps_x, 1)
        taps_of_split = tl.cdiv(taps, splits)
        first = split * taps_of_split
        last = tl.minimum(first + taps_of_split, taps)
        sums = tl.zeros((TILE_M, TILE_N), tl.float32)
        if FLAT > 0:
            first *= FLAT
            last *= FLAT
            for step in tl.range(first, last, TILE_K, num_stages=STAGES):
                number = step + tl.arange(0, TILE_K)  # [TILE_K]
                k = number % FLAT
                tap = number // FLAT
                tap_x = tap_along(tap % taps_x, class_x, 2, SHAPE)
                tap_y = tap_along(tap // taps_x % taps_y, class_y, 1, SHAPE)
                tap_z = tap_along(tap // taps_x // taps_y, class_z, 0, SHAPE)
                inside = number < last
                source = source_of(
                    table,
                    gathered_voxels,
                    row[:, None],
                    z[:, None],
                    y[:, None],
                    x[:, None],
                    tap_z[None, :],
                    tap_y[None, :],
                    tap_x[None, :],
                    class_z,
                    class_y,
                    class_x,
                    visible[:, None] & inside[None, :],
                    SHAPE,
                )  # [TILE_M, TILE_K]
                at = offset_of(source, groups * FLAT, WIDE) + group * FLAT + k[None, :]
                a = tl.load(gathered + at, mask=source >= 0, other=0.0)
                weight_row = ((group * SHAPE.KERNEL[0] + tap_z) * SHAPE.KERNEL[1] + tap_y) * SHAPE.KERNEL[2] + tap_x
                weight_row = weight_row * FLAT + k
                b = tl.load(
                    packed + weight_row[:, None] * n_channels + n[None, :],
                    mask=inside[:, None] & (n < n_channels)[None, :],
                    other=0.0,
                )
                sums = multiply(a, b, sums, PRECISION)
        elif SKIP:
            for number in tl.range(first, last):
                tap_x = tap_along(number % taps_x, class_x, 2, SHAPE)
                tap_y = tap_along(number // taps_x % taps_y, class_y, 1, SHAPE)
                tap_z = tap_along(number // taps_x // taps_y, class_z, 0, SHAPE)
                source = source_of(
                    table, gathered_voxels, row, z, y, x, tap_z, tap_y, tap_x, class_z, class_y, class_x, visible, SHAPE
                )  # [TILE_M]
                weight_row = ((group * SHAPE.KERNEL[0] + tap_z) * SHAPE.KERNEL[1] + tap_y) * SHAPE.KERNEL[2] + tap_x
                if tl.max(source, 0) >= 0:
                    for k_first in tl.range(0, k_channels, TILE_K, num_stages=STAGES):
                        sums = _step(
                            sums, gathered, packed, source, weight_row, k_first, n, group, groups, k_channels,
                            n_channels, mean, scale, shift, slope, sample, TILE_K, AFFINE, WIDE, PRECISION,
                        )  # fmt: skip
        else:
            k_steps = tl.cdiv(k_channels, TILE_K)
            for step in tl.range(first * k_steps, last * k_steps, num_stages=STAGES):
                number = step // k_steps
                tap_x = tap_along(number % taps_x, class_x, 2, SHAPE)
                tap_y = tap_along(number // taps_x % taps_y, class_y, 1, SHAPE)
                tap_z = tap_along(number // taps_x // taps_y, class_z, 0, SHAPE)
                source = source_of(
                    table, gathered_voxels, row, z, y, x, tap_z, tap_y, tap_x, class_z, class_y, class_x, visible, SHAPE
                )
                weight_row = ((group * SHAPE.KERNEL[0] + tap_z) * SHAPE.KERNEL[1] + tap_y) * SHAPE.KERNEL[2] + tap_x
                sums = _step(
                    sums, gathered, packed, source, weight_row, step % k_steps * TILE_K, n, group, groups, k_channels,
                    n_channels, mean, scale, shift, slope, sample, TILE_K, AFFINE, WIDE, PRECISION,
                )  # fmt: skip

        channel = group * n_channels + n
        inside = n < n_channels
        # There are splits only where there are few voxels.
        to = offset_of(split * voxels + voxel, groups * n_channels, WIDE)[:, None] + channel[None, :]
        stored = exists[:, None] & inside[None, :]
        if SPLIT:
            tl.store(written + to, sums, mask=stored)
        else:
            if bias is not None:
                sums += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
            sums = tl.where(visible[:, None], sums, 0.0)
            tl.store(written + to, sums.to(written.dtype.element_ty), mask=stored)
        if MOMENTS:
            count = tl.sum(visible.to(tl.float32), 0)
            center = tl.sum(sums, 0) / tl.maximum(count, 1.0)  # [TILE_N]
            deviation = tl.where(visible[:, None], sums - center[None, :], 0.0)
            part = tile_m * groups * n_channels + channel
            tl.store(part_means + part, center, mask=inside)
            tl.store(part_squares + part, tl.sum(deviation * deviation, 0), mask=inside)
            if column == 0:
                tl.store(part_counts + tile_m, count)


@triton.jit
def _step(
    sums, gathered, packed, source, weight_row, k_first, n, group, groups, k_channels, n_channels,
    mean, scale, shift, slope, sample,
    TILE_K: tl.constexpr, AFFINE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tap x TILE_K channels: sums + act(rows of gathered) @ weight."""
    k = k_first + tl.arange(0, TILE_K)
    inside = k < k_channels
    channel = group * k_channels + k
    at = offset_of(source, groups * k_channels, WIDE)[:, None] + channel[None, :]
    pairs = (source >= 0)[:, None] & inside[None, :]
    a = tl.load(gathered + at, mask=pairs, other=0.0)  # [TILE_M, TILE_K]
    if AFFINE:
        entry = sample * (groups * k_channels) + channel
        center = tl.load(mean + entry, mask=inside, other=0.0)
        factor = tl.load(scale + entry, mask=inside, other=0.0)
        summand = tl.load(shift + entry, mask=inside, other=0.0)
        value = (a.to(tl.float32) - center[None, :]) * factor[None, :] + summand[None, :]
        value = tl.where(value < 0, tl.where(slope == 0.0, 0.0, slope * value), value)
        a = tl.where(pairs, value, 0.0).to(a.dtype)
    b = tl.load(
        packed + (weight_row * k_channels + k)[:, None] * n_channels + n[None, :],
        mask=inside[:, None] & (n < n_channels)[None, :],
        other=0.0,
    )  # [TILE_K, TILE_N]
    return multiply(a, b, sums, PRECISION)


@triton.jit(do_not_specialize=["voxels", "splits"])
def add_parts_kernel(
    parts,  # [splits, voxels, channels] float32
    bias,  # [channels]
    written_voxels,  # [voxels]
    written,  # [voxels, channels]
    voxels,
    channels,
    splits,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < voxels
    visible = exists
    if written_voxels is not None:
        visible = tl.load(written_voxels + row, mask=exists, other=0) != 0
    for first in tl.range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = exists[:, None] & (channel < channels)[None, :]
        at = offset_of(row, channels, WIDE)[:, None] + channel[None, :]
        sums = tl.zeros((ROWS, CHANNELS), tl.float32)
        part = at
        for _ in tl.range(0, splits):
            sums += tl.load(parts + part, mask=inside, other=0.0)
            part += voxels * channels
        if bias is not None:
            sums += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        sums = tl.where(visible[:, None], sums, 0.0)
        tl.store(written + at, sums.to(written.dtype.element_ty), mask=inside)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: WindowGeometry, groups: int) -> Tensor:
    """See `Backend.conv3d`."""
    y = x.new_empty(len(geometry.target_index), *geometry.target_block, len(weight))
    window = forward_window(geometry)
    if conv3d_depthwise.applies(weight, groups):
        conv3d_depthwise.run(window, x, weight, bias, y)
    else:
        _run(window, x, _pack(weight, groups, transposed=False), bias, y)
    return y


def grad_input(grad: Tensor, weight: Tensor, geometry: WindowGeometry, groups: int) -> Tensor:
    """See `Backend.conv3d_grad_input`."""
    grad_x = grad.new_empty(len(geometry.source_index), *geometry.source_block, weight.shape[1] * groups)
    window = transposed_window(geometry)
    if conv3d_depthwise.applies(weight, groups):
        conv3d_depthwise.run(window, grad, weight, None, grad_x)
    else:
        _run(window, grad, _pack(weight, groups, transposed=True), None, grad_x)
    return grad_x


def fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    affine: tuple[Tensor, Tensor, Tensor] | None,
    slope: float,
    geometry: WindowGeometry,
    sample_offsets: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `FusingBackend.conv3d_fused`."""
    y = x.new_empty(len(geometry.target_index), *geometry.target_block, len(weight))
    packed = _pack(weight, groups, transposed=False)
    parts = _run(forward_window(geometry), x, packed, bias, y, affine, slope, fuse=True)
    per_block = len(parts[0]) // max(1, len(y))
    mean, squares = moments.merge(*parts, sample_offsets, per_block, geometry.batch)
    return y, mean, squares


def _pack(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """[C_out, C_in / groups, kd, kh, kw] -> [groups, taps, gathered, written channels of a group]."""
    by_group = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return by_group.permute((0, 3, 1, 2) if transposed else (0, 3, 2, 1)).contiguous()


def _run(
    window: Window,
    gathered: Tensor,
    packed: Tensor,  # [groups, taps, k, n]
    bias: Tensor | None,
    written: Tensor,
    affine: tuple[Tensor, Tensor, Tensor] | None = None,
    slope: float = 1.0,
    fuse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel. Returns: (count, mean, M2) of each tile where a convolution is fused."""
    gathered = gathered.contiguous()
    groups, taps, k_channels, n_channels = packed.shape
    exact = precision(written.dtype) == "ieee"
    kind = ConvClass(written.dtype, exact, k_channels, n_channels, groups, window.shape, fused=fuse)
    voxels = written.shape[:4].numel()
    like = packed if affine is None else affine[0]
    parts = (like.new_empty(0), like.new_empty(0), like.new_empty(0))
    if voxels == 0:
        if fuse:
            empty = packed.new_empty(0, groups * n_channels, dtype=torch.float32)
            parts = (empty[:, 0], empty, empty)
        return parts
    multiprocessors_ = multiprocessors(written.device)

    def launch(config: ConvConfig) -> tuple[Tensor, Tensor, Tensor]:
        tiles_of_class = triton.cdiv(window.units, config.tile_m)
        tiles_m = tiles_of_class * window.classes
        tiles = tiles_m * groups * triton.cdiv(n_channels, config.tile_n)
        splits = 1 if fuse else max(1, min(taps, multiprocessors_ // tiles))
        split_sums = (
            written if splits == 1 else written.new_empty(splits, voxels, groups * n_channels, dtype=torch.float32)
        )
        counts, means, squares = parts
        if fuse:
            counts = written.new_empty(tiles_m, dtype=torch.float32)
            means, squares = (written.new_empty(tiles_m, groups * n_channels, dtype=torch.float32) for _ in range(2))
        tables = (written,) * 3 if affine is None else tuple(t.contiguous() for t in affine)
        programs = min(tiles * splits, multiprocessors_ * _PROGRAMS)
        wide = is_wide(gathered, split_sums)
        conv3d_kernel[(programs,)](
            gathered,
            packed,
            None if bias is None else bias.contiguous(),
            split_sums,
            window.table,
            window.gathered_voxels,
            window.written_voxels,
            window.written_index,
            *tables,
            float(slope),
            counts,
            means,
            squares,
            window.units,
            voxels,
            k_channels,
            n_channels,
            groups,
            tiles_m,
            splits,
            SHAPE=window.shape,
            TILE_M=config.tile_m,
            TILE_N=config.tile_n,
            TILE_K=config.tile_k,
            STAGES=kind.stages(config),
            FLAT=k_channels if kind.flat else 0,
            SKIP=kind.skips(config),
            AFFINE=affine is not None,
            MOMENTS=fuse,
            SPLIT=splits > 1,
            WIDE=wide,
            PRECISION=precision(written.dtype),
            K_DIVISOR=math.gcd(k_channels, 16),
            N_DIVISOR=math.gcd(n_channels, 16),
            num_warps=config.warps,
        )
        if splits > 1:
            rows, channels = 16, 64
            add_parts_kernel[(triton.cdiv(voxels, rows),)](
                split_sums,
                None if bias is None else bias.contiguous(),
                window.written_voxels,
                written,
                voxels,
                groups * n_channels,
                splits,
                WIDE=wide,
                ROWS=rows,
                CHANNELS=channels,
            )
        return counts, means, squares

    return launch(choose(kind, launch, written.device))
