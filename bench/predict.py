"""Prints what one 3x3x3 convolution of each encoder stage should take on an H100: the table in docs/performance.md.

Nothing here is measured; what an H100 took is there too, and is several times as much. The work is counted (pairs of
the mask; shares and bytes from `test_cuda --count`, see docs/performance.md), the rates were measured elsewhere:

- tensor cores by mma.sync, 62.9 % of the peak of 989 TFLOP/s in bfloat16, and HBM: Luo et al., "Dissecting the NVIDIA
  Hopper architecture through microbenchmarking" (arXiv:2501.12084)
- L2: Chips and Cheese, "Nvidia's H100: funny L2, and tons of bandwidth" (2023)

A kernel takes as long as the slowest of its three streams (tensor cores, L2, HBM), and a launch.
"""

from __future__ import annotations

import itertools

import torch

from s3d_kernels import BlockMask

MMA, L2, HBM, LAUNCH = 0.629 * 989e12, 5.5e12, 3.0e12, 3e-6
DENSE_PEAK = 989e12  # cuDNN's best case: the peak itself
BYTES = 2  # bfloat16
# Stage: block side, channels, useful / issued MMA FLOPs, useful FLOPs per byte requested; forward.
STAGES = [
    (0, 32, 32, 0.958, 150),
    (1, 16, 64, 0.916, 179),
    (2, 8, 128, 0.851, 170),
    (3, 4, 256, 0.718, 136),
    (4, 2, 320, 0.770, 18),
    (5, 1, 320, 0.621, 9),
]
BATCH, CELLS, MASK_RATIO = 2, 5, 0.75


def pairs(mask: BlockMask, side: int) -> float:
    """Visible (output voxel, tap) pairs of a 3x3x3 window: of `side` voxels along an axis one leaves the block."""
    present = (mask.tables.neighbours >= 0).sum(0).tolist()
    total = 0.0
    for tap in itertools.product((-1, 0, 1), repeat=3):
        for neighbour in itertools.product((-1, 0, 1), repeat=3):
            share = 1.0
            for t, n in zip(tap, neighbour, strict=True):
                share *= (1.0 if n == 0 else 0.0) if t == 0 else {0: side - 1, t: 1}.get(n, 0) / side
            total += share * present[(neighbour[0] + 1) * 9 + (neighbour[1] + 1) * 3 + neighbour[2] + 1]
    return total * side**3


def main() -> None:
    mask = BlockMask.random(BATCH, CELLS, 1, MASK_RATIO, torch.Generator().manual_seed(0))
    print(
        "| stage | channels | visible voxels | GFLOP | tensor cores | L2 | HBM | predicted | dense, best case | ratio |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    sums = [0.0, 0.0]
    for stage, side, channels, useful, per_byte in STAGES:
        voxels = mask.num_blocks * side**3
        flops = 2.0 * pairs(mask, side) * channels**2
        weight = 27 * channels**2 * BYTES
        times = (
            flops / useful / MMA,
            flops / per_byte / L2,
            (2 * voxels * channels * BYTES + weight) / HBM,
        )
        ours = max(times) + LAUNCH
        dense_voxels = BATCH * (CELLS * side) ** 3
        dense_flops = 2.0 * 27 * dense_voxels * channels**2
        dense = max(dense_flops / DENSE_PEAK, (2 * dense_voxels * channels * BYTES + weight) / HBM) + LAUNCH
        sums[0] += ours
        sums[1] += dense
        cells = [f"{seconds * 1e6:.0f} µs" for seconds in (*times, ours, dense)]
        print(
            f"| {stage} | {channels} | {voxels} | {flops / 1e9:.0f} | {' | '.join(cells)} | {dense / ours:.1f} |",
        )
    print(f"| sum | | | | | | | {sums[0] * 1e6:.0f} µs | {sums[1] * 1e6:.0f} µs | {sums[1] / sums[0]:.1f} |")


if __name__ == "__main__":
    main()
