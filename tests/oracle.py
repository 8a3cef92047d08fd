"""What the operators mean, in float64 and plain torch; imports nothing of the project.

A mask is a bool volume [N, 1, D, H, W]. Convolution and pooling see zeros at masked voxels; results exist at the voxels
of the output mask, elsewhere they are zero. Statistics are taken over visible voxels.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[int, int, int]


def select(x: Tensor, mask: Tensor) -> Tensor:
    """x where visible, zeros elsewhere, also where x is NaN."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype))


def downsample(mask: Tensor, stride: Triple) -> Tensor:
    """A voxel is visible if any voxel that it covers is."""
    far = [-size % step for size, step in zip(mask.shape[2:], stride)]
    padded = F.pad(mask.double(), (0, far[2], 0, far[1], 0, far[0]))
    return F.max_pool3d(padded, stride) > 0


def upsample(mask: Tensor, stride: Triple) -> Tensor:
    for axis, step in enumerate(stride):
        mask = mask.repeat_interleave(step, axis + 2)
    return mask


def conv3d(
    x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple | str, groups: int
) -> Tensor:
    dense = select(x, mask)
    if padding == "same":
        # As torch: of k - 1 zeros, the odd one comes after.
        d, h, w = ((k - 1) // 2 for k in weight.shape[2:])
        kd, kh, kw = (k - 1 for k in weight.shape[2:])
        dense, padding = F.pad(dense, (w, kw - w, h, kh - h, d, kd - d)), (0, 0, 0)
    return select(F.conv3d(dense, weight, bias, stride, padding, 1, groups), downsample(mask, stride))


def conv_transpose3d(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    stride: Triple = tuple(weight.shape[2:])  # type: ignore[assignment]
    y = F.conv_transpose3d(select(x, mask), weight, bias, stride, 0, 0, groups)
    return select(y, upsample(mask, stride))


def pool3d(
    x: Tensor, mask: Tensor, kind: str, kernel: Triple, stride: Triple, padding: Triple, include_pad: bool
) -> Tensor:
    dense = select(x, mask)
    if kind == "max":
        y = F.max_pool3d(dense, kernel, stride, padding)
    else:
        y = F.avg_pool3d(dense, kernel, stride, padding, count_include_pad=include_pad)
    return select(y, downsample(mask, stride))


def norm(x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int | str) -> Tensor:
    """Statistics per sample and group of channels (`groups` an integer), or per channel over the batch ("batch")."""
    n, channels = x.shape[:2]
    samples = [slice(0, n)] if groups == "batch" else [slice(i, i + 1) for i in range(n)]
    size = 1 if groups == "batch" else channels // int(groups)
    y = select(x, mask) * 0
    for sample, first in itertools.product(samples, range(0, channels, size)):
        rows = slice(first, first + size)
        shown = mask[sample].expand(-1, size, -1, -1, -1)
        values = x[sample, rows][shown]
        if values.numel():
            mean = values.mean()
            normalised = (values - mean) / (((values - mean) ** 2).mean() + eps).sqrt()
            y[sample, rows] = torch.zeros(shown.shape, dtype=x.dtype).masked_scatter(shown, normalised)
    shape = (1, -1, 1, 1, 1)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return select(y, mask)


def neighbour_table(grid: Tensor, radius: Triple) -> list[list[int]]:
    """By loops: for each visible cell in sorted order, the number of each neighbour, -1 where masked or outside."""
    cells = [tuple(c) for c in grid.nonzero().tolist()]
    number = {cell: i for i, cell in enumerate(cells)}
    offsets = list(itertools.product(*(range(-r, r + 1) for r in radius)))
    return [[number.get((n, z + dz, y + dy, x + dx), -1) for dz, dy, dx in offsets] for n, z, y, x in cells]
