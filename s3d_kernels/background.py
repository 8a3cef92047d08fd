"""Features of a volume that depend only on how near a voxel is to the border, such as convolutions of a constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_mask import Triple

Region = tuple[slice, ...]  # of [N, D, H, W] or [C, a, b, c]; axes that are left out are taken as a whole


@dataclass(frozen=True)
class Background:
    """Features [C, D, H, W] of a volume, the same wherever the distance to the border is the same.

    A convolution with zero padding sees of a constant volume only which of its taps lie outside. So its result has
    one vector inside and others in a thin shell; a convolution of that has a shell one voxel thicker, and so on.
    A thin volume is stored as it is; of a thick one, one position stands for all inner ones.

    Attributes:
        values: [C, a, b, c]. Along each axis either all positions of the volume, or the r outermost ones of both ends
            with one between them for all others, 2 r + 1.
        shape: voxels of the volume.
    """

    values: Tensor
    shape: Triple

    @classmethod
    def constant(cls, vector: Tensor, shape: Triple) -> Background:
        """The same vector [C] everywhere."""
        return cls(vector.view(-1, 1, 1, 1), shape)

    @property
    def centre(self) -> Tensor:
        """[C]: what all inner voxels have."""
        _, depth, height, width = self.values.shape
        return self.values[:, depth // 2, height // 2, width // 2]

    def cat(self, other: Background) -> Background:
        """Both, one after the other along the channels."""
        sizes = [max(a, b) for a, b in zip(self.values.shape[1:], other.values.shape[1:], strict=True)]
        return Background(torch.cat([self._expand(sizes), other._expand(sizes)]), self.shape)

    def conv3d(self, weight: Tensor, bias: Tensor | None = None) -> Background:
        """Convolution with stride 1 and zero padding that keeps the size.

        Args:
            weight: [C_out, C, kd, kh, kw], odd sides.
            bias: [C_out].
        Raises:
            ValueError: weight has an even side.
        """
        if any(k % 2 == 0 for k in weight.shape[2:]):
            raise ValueError(f"weight must be [C_out, C, kd, kh, kw] with odd sides, got {tuple(weight.shape)}")
        sides = zip(self.shape, self.values.shape[1:], weight.shape[2:], strict=True)
        # Each tap to a side makes the shell that differs from the inside one voxel thicker.
        sizes = [min(size, stored + k - 1) for size, stored, k in sides]
        padding = [k // 2 for k in weight.shape[2:]]
        with torch.autocast(weight.device.type, enabled=False):
            return Background(F.conv3d(self._expand(sizes)[None], weight, bias, padding=padding)[0], self.shape)

    def to_dense(self) -> Tensor:
        """[C, D, H, W]."""
        return self._expand(self.shape)

    def add_border(self, volume: Tensor) -> Tensor:
        """Add to each voxel what it has beyond the centre: nothing inside, so only the shell is touched.

        Args:
            volume: [N, D, H, W, C]; its memory becomes that of the result, so it is not to be used any more.
        Returns: the sum, with gradients for both.
        """
        regions = self._shell()
        if not regions:
            return volume
        rest = self.values - self.centre.view(-1, 1, 1, 1)
        parts = [_expand_along(rest[stored], sizes) for _, stored, sizes in regions]
        places = [place for place, _, _ in regions]
        result: Tensor = _AddRegions.apply(volume, places, *(p.permute(1, 2, 3, 0).to(volume.dtype) for p in parts))
        return result

    def _expand(self, sizes: Sequence[int]) -> Tensor:
        return _expand_along(self.values, sizes)

    def _shell(self) -> list[tuple[Region, Region, list[int]]]:
        """Where the volume differs from the centre: disjoint regions, each with its place in the volume, its place in
        ``values``, and the size to which that is to be expanded (an axis of 1 stands for all that the place has).
        """
        found = []
        inner = [slice(None)] * 3  # of the volume: what the axes so far have not taken
        middle = [slice(n // 2, n // 2 + 1) for n in self.values.shape[1:]]  # of the values
        for axis, (size, stored) in enumerate(zip(self.shape, self.values.shape[1:], strict=True)):
            r = stored // 2
            if stored == size and size > 1:
                ends = [(slice(0, size), slice(0, size))]
            else:
                ends = [(slice(0, r), slice(0, r)), (slice(size - r, size), slice(r + 1, stored))] if r else []
            for place, row in ends:
                sizes = [1] * axis + [place.stop - place.start] + list(self.shape[axis + 1 :])
                places = (slice(None), *inner[:axis], place)
                rows = (slice(None), *middle[:axis], row)
                found.append((places, rows, sizes))
            if stored == size and size > 1:
                break  # all positions of this axis have been taken, and with them the whole volume
            inner[axis] = slice(r, size - r)
        return found


def _expand_along(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """[C, a, b, c] to [C, *sizes]: the middle of each axis that is shorter is repeated."""
    for axis, size in enumerate(sizes, start=1):
        stored = values.shape[axis]
        if stored == size:
            continue
        r = stored // 2
        middle = values.narrow(axis, r, 1).expand(*values.shape[:axis], size - 2 * r, *values.shape[axis + 1 :])
        parts = [values.narrow(axis, 0, r), middle, values.narrow(axis, r + 1, r)]
        values = torch.cat(parts, axis) if r else middle
    return values


class _AddRegions(torch.autograd.Function):
    """Adds [a, b, c, C] to regions of a volume [N, D, H, W, C], in its memory: a copy would cost more than the rest."""

    @staticmethod
    def forward(ctx: Any, volume: Tensor, places: list[Region], *parts: Tensor) -> Tensor:
        ctx.places, ctx.shapes = places, [part.shape for part in parts]
        total = volume.detach()  # with the same count of modifications, so that who kept the volume notices
        for place, part in zip(places, parts, strict=True):
            total[place] += part
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        of_parts = [grad[place].sum_to_size(1, *shape)[0] for place, shape in zip(ctx.places, ctx.shapes, strict=True)]
        return grad, None, *of_parts
