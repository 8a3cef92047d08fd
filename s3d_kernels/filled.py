"""FilledTensor: features of whole volumes that are known beforehand except at and around visible voxels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import current_backend
from .background import Background
from .block_mask import BlockMask, Triple
from .block_sparse import BlockSparseTensor, block_arguments, parts_of
from .functional import sparse_conv3d
from .operators import gather_blocks


@dataclass(frozen=True)
class FilledTensor:
    """Features [N, C, D, H, W] at all voxels: a background, plus a correction that is zero except at stored blocks.

    Features whose masked voxels all hold one vector are of this form, and convolution keeps it: of the background it
    makes another one, of the correction one that is a voxel larger on each side. So a convolution over the whole
    volume costs what one over the visible voxels and a thin shell around them costs.

    Attributes:
        correction: what visible voxels, and those around them, have beyond the background. Blocks should be small:
            where the correction grows into a masked block, that is computed as a whole.
        background: what is known.
        margin: voxels, per axis, around the blocks of the correction that are zero although they are stored.
    Raises:
        ValueError: the correction's volume is not made of whole blocks, or the background is of another one.
    """

    correction: BlockSparseTensor
    background: Background
    margin: Triple = (0, 0, 0)

    def __post_init__(self) -> None:
        mask = self.correction.mask
        if any(size % side for size, side in zip(mask.shape, mask.block, strict=True)):
            raise ValueError(f"correction must be of volumes that are made of whole blocks, got {mask}")
        if self.background.shape != mask.shape:
            raise ValueError(
                f"background must be of the volume {mask.shape} of correction, not {self.background.shape}"
            )

    @property
    def shape(self) -> torch.Size:
        """Of the dense tensor that this stands for, (N, C, D, H, W)."""
        return self.correction.shape

    def conv3d(self, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> FilledTensor:
        """Convolution over the whole volume, with stride 1 and zero padding that keeps the size.

        Args:
            weight: [C_out, C, kd, kh, kw], odd sides.
            bias: [C_out].
            backend: name of a backend; default is the current one, see ``use_backend``.
        """
        return self.conv3d_of(weight, self.background.conv3d(weight, bias), backend)

    def conv3d_of(self, weight: Tensor, background: Background, backend: str | None = None) -> FilledTensor:
        """The same with the convolution of the background given, for it may hold more channels than the correction."""
        mask = self.correction.mask
        reach: Triple = tuple(k // 2 for k in weight.shape[2:])  # type: ignore[assignment]
        sides = zip(reach, self.margin, mask.block, strict=True)
        steps = tuple(max(0, math.ceil((r - m) / b)) for r, m, b in sides)
        target = mask.grow(steps) if any(steps) else mask
        correction = sparse_conv3d(self.correction, weight, None, 1, reach, backend=backend, target=target)
        rest = zip(self.margin, steps, mask.block, reach, strict=True)
        return FilledTensor(correction, background, tuple(m + n * b - r for m, n, b, r in rest))  # type: ignore[arg-type]

    def add_beyond_centre(self, volume: Tensor) -> Tensor:
        """Add all but the background's centre, which costs nothing as the bias of what makes the volume.

        Args:
            volume: [N, D, H, W, C], contiguous; its memory becomes that of the result: not to be used any more.
        Returns: the sum, with gradients for both.
        Raises:
            ValueError: volume is of another shape.
        """
        batch, channels, *sizes = self.shape
        if tuple(volume.shape) != (batch, *sizes, channels):
            raise ValueError(f"volume must be {[batch, *sizes, channels]}, got {list(volume.shape)}")
        volume = self.background.add_border(volume)
        blocks, mask = self.correction.blocks.to(volume.dtype), self.correction.mask
        result: Tensor = _AddBlocks.apply(volume, blocks, mask, current_backend())
        return result

    def to_dense(self) -> Tensor:
        """[N, C, D, H, W] in channels-last memory."""
        mask, centre = self.correction.mask, self.background.centre.to(self.correction.dtype)
        volume = centre.repeat(mask.batch, *mask.shape, 1)
        return self.add_beyond_centre(volume).permute(0, 4, 1, 2, 3)


class _AddBlocks(torch.autograd.Function):
    """Adds blocks [V, bd, bh, bw, C] to volumes [N, D, H, W, C], in their memory, see `background._AddRegions`."""

    @staticmethod
    def forward(ctx: Any, volumes: Tensor, blocks: Tensor, mask: BlockMask, backend: str) -> Tensor:
        ctx.where = (*block_arguments(mask), backend)
        total = volumes.detach()
        if mask.voxels is not None:  # what lies at masked voxels of stored blocks means nothing
            blocks = torch.where(mask.voxels[..., None], blocks, 0)
        parts_of(total, mask.block)[mask.index.long().unbind(1)] += blocks
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, gather_blocks(grad.permute(0, 4, 1, 2, 3), *ctx.where), None, None
