"""Moments of parts as those of the whole: count, mean and sum of squared deviations from the mean.

    count = a.count + b.count,   mean = a.mean + (b.mean - a.mean) * b.count / count
    squares = a.squares + b.squares + (b.mean - a.mean)^2 * a.count * b.count / count

Layouts   counts [parts], means and squares [parts, C], mean and squares of the whole [samples, C], all float32.
Work      A program makes one tile of channels of one share of a sample's parts. It goes through them ROWS at a time,
          each row of the tile by the formula above; at the end it takes the rows together. Where samples have many
          parts, SPLITS programs first make as many parts of them, which the second launch takes together.
Numbers   float32, in an order that the shapes fix: always the same bits. No difference of large sums, so it is safe
          for a mean far from zero. What stands at parts that count nothing, NaN included, is not read.
Limits    Counts that float32 holds weigh exactly: 2^24. Beyond that a weight is off by 6e-8 of itself.
Expected  Bound by latency: the parts are a thousandth of what they were made from.
Source    Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances (1979).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tiles import WARPS, addresses, is_wide, tile_of

SPLITS = 32
ONE_LEVEL = 256  # parts of a sample, on average, that one program takes together


@triton.jit
def merged(count, mean, squares, more_count, more_mean, more_squares):
    """Moments of two sets as those of one, number by number; zeros where both are empty."""
    total = count + more_count
    share = more_count / tl.maximum(total, 1.0)
    difference = more_mean - mean
    return (
        total,
        mean + difference * share,
        squares + more_squares + difference * difference * (count * share),
    )


@triton.jit
def merged_rows(
    count,  # [rows, 1]
    mean,  # [rows, channels]
    squares,  # [rows, channels]
):
    """Moments of all rows of a tile as those of one: a number, [channels], [channels]."""
    total = tl.sum(count)
    weight = count / tl.maximum(total, 1.0)
    centre = tl.sum(mean * weight, 0)
    # The sum is rounded as the mean is large; what it lacks is as small as the deviations from it.
    centre += tl.sum((mean - centre[None, :]) * weight, 0)
    difference = mean - centre[None, :]
    return total, centre, tl.sum(squares + difference * difference * count, 0)


@triton.jit(do_not_specialize=["parts_per_block", "splits"])
def merge_kernel(
    counts,  # [parts]
    means,  # [parts, C]
    squares,  # [parts, C]
    sample_offsets,  # [N + 1] int32, or None: one block a sample
    whole_counts,  # [N, splits]
    whole_means,  # [N, splits, C]
    whole_squares,  # [N, splits, C]
    parts_per_block,
    splits,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles = tl.cdiv(channels, CHANNELS)
    whole = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    sample = whole // splits
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    if sample_offsets is None:
        first = sample * parts_per_block
        last = first + parts_per_block
    else:
        first = tl.load(sample_offsets + sample) * parts_per_block
        last = tl.load(sample_offsets + sample + 1) * parts_per_block
    length = tl.cdiv(last - first, splits)
    first += whole % splits * length
    last = tl.minimum(first + length, last)
    count = tl.zeros([ROWS, 1], tl.float32)
    mean = tl.zeros([ROWS, CHANNELS], tl.float32)
    spread = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(first, last, ROWS):
        part = start + tl.arange(0, ROWS)
        part_count = tl.load(counts + part, mask=part < last, other=0.0)[:, None]
        here = (part_count > 0) & exists[None, :]
        part_mean = tl.load(addresses(means, part, channel, channels, WIDE), mask=here, other=0.0)
        part_spread = tl.load(addresses(squares, part, channel, channels, WIDE), mask=here, other=0.0)
        count, mean, spread = merged(count, mean, spread, part_count, part_mean, part_spread)
    total, centre, spread_of_all = merged_rows(count, mean, spread)
    tl.store(whole_counts + whole, total, mask=tile == 0)
    tl.store(whole_means + whole * channels + channel, centre, mask=exists)
    tl.store(whole_squares + whole * channels + channel, spread_of_all, mask=exists)


def merge(
    counts: Tensor,  # [P] float32: numbers that each part was made from
    means: Tensor,  # [P, C] float32
    squares: Tensor,  # [P, C] float32
    sample_offsets: Tensor | None,  # [N + 1] int32: the blocks of each sample; None: sample n has block n
    parts_per_block: int,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each sample, from those of the parts of its blocks; 0 where it has none.

    Returns: [N, C] float32 each.
    """
    if len(counts) > batch * ONE_LEVEL:
        counts, means, squares = _merge(counts, means, squares, sample_offsets, parts_per_block, batch, SPLITS)
        sample_offsets, parts_per_block = None, SPLITS
    _, mean, spread = _merge(counts, means, squares, sample_offsets, parts_per_block, batch, 1)
    return mean, spread


def _merge(
    counts: Tensor,
    means: Tensor,
    squares: Tensor,
    sample_offsets: Tensor | None,
    parts_per_block: int,
    batch: int,
    splits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`splits` parts of each sample: [N * splits], [N * splits, C], [N * splits, C]."""
    channels = means.shape[1]
    whole_counts = counts.new_empty(batch * splits)
    whole_means, whole_squares = (means.new_empty(batch * splits, channels) for _ in range(2))
    tile = tile_of(channels, most_rows=64)
    grid = batch * splits * triton.cdiv(channels, tile.CHANNELS)
    if grid:
        merge_kernel[(grid,)](
            counts,
            means,
            squares,
            sample_offsets,
            whole_counts,
            whole_means,
            whole_squares,
            parts_per_block,
            splits,
            channels,
            *tile,
            WIDE=is_wide(means),
            num_warps=WARPS,
        )
    return whole_counts, whole_means, whole_squares
