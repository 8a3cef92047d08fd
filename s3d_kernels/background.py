"""Features of a volume that depend only on how near a voxel is to the border, such as convolutions of a constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_mask import Triple


class Region(NamedTuple):
    """A part of a volume; parts do not overlap.

    Attributes:
        place: in the volume [N, D, H, W].
        rows: in the values [C, a, b, c].
        sizes: to which these are to be expanded; 1 stands for all that the place has along an axis.
    """

    place: tuple[slice, ...]
    rows: tuple[slice, ...]
    sizes: list[int]


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
        return self.values.flatten(1)[:, (depth // 2 * height + height // 2) * width + width // 2]

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
        result: Tensor = _AddRegions.apply(volume, self.values - self.centre.view(-1, 1, 1, 1), regions)
        return result

    def _expand(self, sizes: Sequence[int]) -> Tensor:
        values: Tensor = _Expand.apply(self.values, sizes)
        return values

    def _shell(self) -> list[Region]:
        """Where the volume differs from the centre."""
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
                found.append(Region(places, rows, sizes))
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


def _fold_along(grad: Tensor, sizes: Sequence[int]) -> Tensor:
    """The gradient of that: [C, a, b, c] to [C, *sizes], the middle of each axis that is longer added up."""
    for axis, size in enumerate(sizes, start=1):
        expanded = grad.shape[axis]
        if expanded == size:
            continue
        r = size // 2
        middle = grad.narrow(axis, r, expanded - 2 * r).sum(axis, keepdim=True)
        grad = torch.cat([grad.narrow(axis, 0, r), middle, grad.narrow(axis, expanded - r, r)], axis) if r else middle
    return grad


# Functions of their own, for autograd would take a dozen steps for each narrow and each expand, and on a GPU there is
# nothing else to do in these.


class _Expand(torch.autograd.Function):
    """`_expand_along`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.sizes = values.shape[1:]
        expanded = _expand_along(values, sizes)
        return expanded.contiguous() if expanded is not values else values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _fold_along(grad, ctx.sizes), None


class _AddRegions(torch.autograd.Function):
    """Adds values [C, a, b, c] to regions of a volume [N, D, H, W, C], in its memory: a copy would cost more."""

    @staticmethod
    def forward(ctx: Any, volume: Tensor, values: Tensor, regions: list[Region]) -> Tensor:
        ctx.regions, ctx.shape, ctx.dtype = regions, values.shape, values.dtype
        total = volume.detach()  # with the same count of modifications, so that who kept the volume notices
        for place, rows, sizes in regions:
            total[place] += _expand_along(values[rows], sizes).permute(1, 2, 3, 0)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        of_values = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        for place, rows, sizes in ctx.regions:
            of_place = grad[place].sum_to_size(1, *sizes, grad.shape[-1])[0].to(ctx.dtype).permute(3, 0, 1, 2)
            of_values[rows] = _fold_along(of_place, of_values[rows].shape[1:])
        return grad, of_values, None
