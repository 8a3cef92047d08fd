"""Random block masks of the pre-training, each a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from s3d_kernels import BlockMask


@dataclass(frozen=True)
class MaskSampler:
    """Draws the mask of a step: random cells of a grid of blocks, floor(ratio * cells) of them masked.

    Attributes:
        patch_size: voxels of a patch along depth, height, width.
        block: side of a masked block in voxels.
        ratio: masked cells / all cells; a pair is a range, drawn anew for every sample.
        seed: of all masks.
    Source: Wald et al. (CVPR 2025), section 3.
    """

    patch_size: Sequence[int]
    block: int
    ratio: float | tuple[float, float]
    seed: int

    def __post_init__(self) -> None:
        if any(side % self.block for side in self.patch_size):
            raise ValueError(
                f"patch_size must be a multiple of mask_block={self.block} along each axis, got {self.patch_size}"
            )

    def __call__(self, batch: int, *stream: int, device: torch.device | str = "cpu") -> BlockMask:
        """The mask of `batch` samples for a stream of numbers, e.g. (0, step): the same numbers give the same mask."""
        generator = torch.Generator().manual_seed(stream_seed(self.seed, *stream))
        grid = [side // self.block for side in self.patch_size]
        return BlockMask.random(batch, grid, self.block, self.ratio, generator, device=device)


def stream_seed(seed: int, *stream: int) -> int:
    """A well-mixed 63-bit seed for a stream of numbers. Streams to tell apart must be of one length."""
    return int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0] >> 1)
