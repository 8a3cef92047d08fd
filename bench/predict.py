"""Prints what one 3x3x3 convolution of each encoder stage should take on an H100: the table in docs/performance.md.

Nothing here is measured; what an H100 took is there too, and is several times as much. The work is counted (pairs of
the mask; shares and bytes from `test_cuda --count`, see docs/performance.md), the rates were measured elsewhere:

- tensor cores by mma.sync, 62.9 % of the peak of 989 TFLOP/s in bfloat16, and HBM: Luo et al., "Dissecting the NVIDIA
  Hopper architecture through microbenchmarking" (arXiv:2501.12084)
- L2: Chips and Cheese, "Nvidia's H100: funny L2, and tons of bandwidth" (2023)

A kernel takes as long as the slowest of its three streams (tensor cores, L2, HBM), and a launch.
"""

from __future__ import annotations

import torch

from s3d_kernels import BlockMask
from s3d_kernels.flops import pairs_of_blocks

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


def main() -> None:
    mask = BlockMask.random(BATCH, CELLS, 1, MASK_RATIO, torch.Generator().manual_seed(0))
    print(
        "| stage | channels | visible voxels | GFLOP | tensor cores | L2 | HBM | predicted | dense, best case | ratio |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    sums = [0.0, 0.0]
    for stage, side, channels, useful, per_byte in STAGES:
        voxels = mask.num_blocks * side**3
        table, ones = mask.tables.neighbours, (1, 1, 1)
        flops = 2.0 * pairs_of_blocks(table, ones, (side,) * 3, (3, 3, 3), ones, ones) * channels**2
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
