"""Random block masks of the pre-training, each a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from s3d_kernels import BlockMask


@dataclass(frozen=True)
class MaskSampler:
    """Draws the mask of a step: random cells of a grid of blocks, floor(ratio * cells) of them masked.

    Attributes:
        patch_size: voxels of a patch along depth, height, width.
        block: side of a masked block in voxels.
        ratio: masked cells / all cells; a pair is a range from which it is drawn anew.
        seed: of all masks.
        ratio_per: whether a ratio is drawn for every "sample" or for the "batch".
    Source: Wald et al. (CVPR 2025), section 3.
    """

    patch_size: Sequence[int]
    block: int
    ratio: float | tuple[float, float]
    seed: int
    ratio_per: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        if any(side % self.block for side in self.patch_size):
            raise ValueError(
                f"patch_size must be a multiple of mask_block={self.block} along each axis, got {self.patch_size}"
            )

    def __call__(
        self,
        batch: int,
        *stream: int,
        samples: slice = slice(None),
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """The mask of a batch for a stream of numbers, e.g. (0, step): the same numbers give the same mask.

        Args:
            batch: samples of the whole batch, however many processes share it.
            stream: numbers.
            samples: those of the batch that the mask is wanted for; default all.
            device: where the mask lives.
        """
        generator = torch.Generator().manual_seed(stream_seed(self.seed, *stream))
        grid = [side // self.block for side in self.patch_size]
        per_sample = self.ratio_per == "sample"
        whole = BlockMask.random(batch, grid, self.block, self.ratio, generator, per_sample=per_sample)
        if samples == slice(None):
            return whole.to(device)
        return BlockMask.from_grid(whole.tables.grid[samples].to(device), self.block)


def stream_seed(seed: int, *stream: int) -> int:
    """A well-mixed 63-bit seed for a stream of numbers. Streams to tell apart must be of one length."""
    return int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0] >> 1)
