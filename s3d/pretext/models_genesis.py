"""Models Genesis: restore a volume that was shuffled, distorted and painted over.

Source: Zhou et al., "Models Genesis" (MICCAI 2019; Medical Image Analysis 67, 2021, section 3) and the authors' code,
which has the numbers that the papers leave out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from s3d.model import build_unet
from s3d.report import Column, error_column, middle_planes, planes_figure

from .method import Draw, Pretext
from .whole_network import WholeNetwork

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Probabilities of the authors' configuration. Flips go on with theirs, up to three, each along any axis.
FLIP, FLIPS = 0.4, 3
SHUFFLE = 0.5
DISTORT, INVERT = 0.9, 0.5
PAINT, INPAINT = 0.9, 0.2
# Of adding one more box after the first ones, and how many boxes there are at most.
ANOTHER_BOX, BOXES = 0.95, 5

# The authors shuffle 10,000 windows, whose sides are uniform in 1 to a tenth of the volume's, in 64x64x32 voxels. Sides
# of 1 to 6, 6 and 3 have 3.5 * 3.5 * 2 = 24.5 voxels in the mean: this many for each voxel of the volume.
WINDOW_SIDE = 10
SHUFFLED_VOXELS = 10_000 * 24.5 / (64 * 64 * 32)
# Windows of a sample come in so many groups; those of a group share their sides and the order they are shuffled into.
# The authors draw both for each window, which no array operation can do. What a single window goes through is the same.
SHUFFLE_GROUPS = 64

# Values of the curve that distorts intensities; linear between them.
CURVE_KNOTS = 1024
# Voxels that painted boxes keep away from the border, where the volume is large enough.
PAINT_MARGIN = 3


@dataclass(frozen=True)
class RestorationProblem:
    """Volumes and what was made of them.

    Attributes:
        transformed: [n, 1, D, H, W], what the network sees, in [0, 1].
        target: [n, 1, D, H, W], the (flipped) volumes in [0, 1].
        valid: [n, 1, D, H, W] bool, False where the target is not to be learned, or None.
        voxels: how many voxels the loss is taken over.
    """

    transformed: Tensor
    target: Tensor
    valid: Tensor | None
    voxels: int


class ModelsGenesis(Pretext[RestorationProblem]):
    """Restoration of transformed volumes, mean squared error over all their voxels.

    Intensities are scaled to [0, 1] for each patch, input and target. The published network ends in a sigmoid; here the
    output is linear, which the squared error holds in range as well and which leaves the network what fine-tuning takes
    over. There the input is z-scored, but the network normalises behind its first convolution.
    """

    loss_label = "mean squared error, all voxels"
    trivial_label = "leaving the input as it is"

    def build_model(self) -> nn.Module:
        """See `Pretext`."""
        return WholeNetwork(build_unet(self.config.preset))

    def pose(self, image: Tensor, valid: Tensor | None, draw: Draw) -> RestorationProblem:
        """See `Pretext`."""
        target = scaled(image.float())
        transformed = torch.empty_like(target)
        flipped_valid = None if valid is None else torch.empty_like(valid)
        for sample, rng in enumerate(draw.generators()):
            axes = draw_flips(rng)
            target[sample, 0] = target[sample, 0].flip(axes)
            if valid is not None and flipped_valid is not None:
                flipped_valid[sample, 0] = valid[sample, 0].flip(axes)
            transformed[sample, 0] = transform(target[sample, 0], rng)
        voxels = target.numel() if flipped_valid is None else int(flipped_valid.sum())
        return RestorationProblem(transformed, target, flipped_valid, voxels)

    def terms(self, problem: RestorationProblem) -> int:
        """Voxels that count."""
        return problem.voxels

    def answer(self, model: nn.Module, problem: RestorationProblem) -> Tensor:
        """The restored volumes [n, 1, D, H, W]."""
        restored: Tensor = model(problem.transformed)
        return restored

    def loss(self, output: Tensor, problem: RestorationProblem, terms: float) -> Tensor:
        """See `Pretext`."""
        error = output.float() - problem.target
        if problem.valid is not None:
            error = torch.where(problem.valid, error, 0.0)
        return error.square().sum() / max(terms, 1)

    def trivial_loss(self, problem: RestorationProblem) -> float:
        """Of the transformed volumes themselves."""
        return float(self.loss(problem.transformed, problem, problem.voxels))

    def figure(self, problem: RestorationProblem, output: Tensor, title: str) -> Figure:
        """Transformed volume, restored volume, target and error."""
        seen, restored, target = (
            volume[0, 0].detach().float().cpu().numpy() for volume in (problem.transformed, output, problem.target)
        )
        counted = np.ones(target.shape, bool) if problem.valid is None else problem.valid[0, 0].cpu().numpy()
        error = np.where(counted, restored - target, 0.0)
        mse = float(np.square(error).sum() / max(1, counted.sum()))
        high = max(1e-6, float(np.percentile(target, 99.5)))
        return planes_figure(
            [
                Column("input", middle_planes(seen)),
                Column("restored", middle_planes(restored), 0.0, high),
                Column("target", middle_planes(target), 0.0, high),
                error_column(middle_planes(error), mse, high / 2),
            ],
            title,
        )


def scaled(
    volumes: Tensor,  # [n, C, D, H, W]
) -> Tensor:
    """Each volume in [0, 1], from its smallest to its largest value; 0 where it is constant."""
    low, high = volumes.amin((1, 2, 3, 4), keepdim=True), volumes.amax((1, 2, 3, 4), keepdim=True)
    # Dividing last, so that the largest becomes 1 exactly.
    return (volumes - low) / (high - low).clamp(min=torch.finfo(volumes.dtype).tiny)


def transform(
    volume: Tensor,  # [D, H, W] in [0, 1]
    rng: np.random.Generator,
) -> Tensor:
    """What the network sees of a volume: [D, H, W] in [0, 1]."""
    if rng.random() < SHUFFLE:
        volume = shuffle_windows(volume, draw_windows(volume.shape, rng))
    if rng.random() < DISTORT:
        volume = distort(volume, draw_curve(rng))
    if rng.random() < PAINT:
        if rng.random() < INPAINT:
            painted = in_boxes(volume.shape, draw_inner_boxes(volume.shape, rng), volume.device)
        else:
            painted = ~in_boxes(volume.shape, draw_outer_boxes(volume.shape, rng), volume.device)
        noise = torch.from_numpy(rng.random(tuple(volume.shape), dtype=np.float32)).to(volume.device)
        volume = torch.where(painted, noise, volume)
    return volume


def draw_flips(rng: np.random.Generator) -> list[int]:
    """The axes to mirror: those that were drawn an odd number of times."""
    flips = [0, 0, 0]
    for _ in range(FLIPS):
        if rng.random() >= FLIP:
            break
        flips[rng.integers(3)] ^= 1
    return [axis for axis, flip in enumerate(flips) if flip]


@dataclass(frozen=True)
class WindowGroup:
    """Windows of the same sides that are shuffled into the same order.

    Attributes:
        sides: (depth, height, width) of the windows in voxels.
        corners: [windows, 3] int64, their first voxels.
        order: [voxels of a window] int64, the voxel of the window that comes to each of its places.
    """

    sides: tuple[int, int, int]
    corners: NDArray[np.int64]
    order: NDArray[np.int64]


def draw_windows(shape: Sequence[int], rng: np.random.Generator) -> list[WindowGroup]:
    """Windows all over a volume, see `SHUFFLED_VOXELS`."""
    largest = [max(1, side // WINDOW_SIDE) for side in shape]
    mean = math.prod((side + 1) / 2 for side in largest)
    windows = math.ceil(SHUFFLED_VOXELS * math.prod(shape) / mean / SHUFFLE_GROUPS)
    groups = []
    for _ in range(SHUFFLE_GROUPS):
        depth, height, width = (int(side) for side in rng.integers(1, largest, endpoint=True))
        free = [side - window for side, window in zip(shape, (depth, height, width), strict=True)]
        corners = rng.integers(0, free, size=(windows, 3), endpoint=True)
        groups.append(WindowGroup((depth, height, width), corners, rng.permutation(depth * height * width)))
    return groups


def shuffle_windows(
    volume: Tensor,  # [D, H, W]
    groups: Sequence[WindowGroup],
) -> Tensor:
    """The volume with the voxels of each window shuffled.

    All windows take their values from the given volume; where they overlap, the last one has it.
    """
    _, height, width = volume.shape
    voxels = volume.numel()
    tables: list[NDArray[np.int64]] = []
    first = 1
    for group in groups:
        depths, heights, widths = (np.arange(side) for side in group.sides)
        inside = ((depths[:, None, None] * height + heights[:, None]) * width + widths).reshape(-1)
        corners = (group.corners[:, 0] * height + group.corners[:, 1]) * width + group.corners[:, 2]
        numbers = np.arange(first, first + len(corners))
        first += len(corners)
        tables += [corners, inside, numbers * voxels + corners, inside[group.order]]
    # One copy to the device, not one for each table.
    on_device = torch.from_numpy(np.concatenate(tables)).to(volume.device).split([len(table) for table in tables])
    # For each voxel, (number of its last window) * voxels + (where its value comes from). A maximum of integers is the
    # same in whatever order it is taken, also on a GPU.
    last = torch.arange(voxels, device=volume.device)
    for corner, place, start, source in zip(*(on_device[kind::4] for kind in range(4)), strict=True):
        places, sources = corner[:, None] + place, start[:, None] + source
        last.scatter_reduce_(0, places.reshape(-1), sources.reshape(-1), "amax")
    return volume.reshape(-1)[last.remainder_(voxels)].reshape(volume.shape)


def draw_curve(rng: np.random.Generator) -> NDArray[np.float32]:
    """[CURVE_KNOTS]: a monotone map of [0, 1] onto itself at evenly spaced intensities, half of the time a falling one.

    It is the cubic Bezier curve from (0, 0) to (1, 1) with two random control points in the unit square. Wherever these
    lie, both coordinates rise all the way, as their derivatives are a (1-t)^2 + 2 (b-a) (1-t) t + (1-b) t^2, times 3,
    and (b-a)^2 <= a (1-b) where a > b: it needs none of the authors' sorting.
    """
    (x1, y1), (x2, y2) = rng.random((2, 2))
    t = np.linspace(0, 1, CURVE_KNOTS)
    inner, outer, end = 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
    intensities, values = (inner * a + outer * b + end for a, b in ((x1, x2), (y1, y2)))
    if rng.random() < INVERT:
        values = values[::-1]
    return np.interp(t, intensities, values).astype(np.float32)


def distort(
    volume: Tensor,  # [D, H, W] in [0, 1]
    curve: NDArray[np.float32],  # [knots] in [0, 1]
) -> Tensor:
    """The volume with each intensity mapped by a curve, linear between its knots."""
    knots = torch.from_numpy(np.ascontiguousarray(curve)).to(volume.device)
    place = volume * (len(knots) - 1)
    low = place.long().clamp_(0, len(knots) - 2)
    # The last knot has no next one, and none is needed.
    return torch.lerp(knots[low], knots[low + 1], place - low)


# Start and end along depth, height, width.
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def draw_inner_boxes(shape: Sequence[int], rng: np.random.Generator) -> list[Box]:
    """Boxes to paint: none to five of a sixth to a third of the volume's sides."""
    boxes: list[Box] = []
    while len(boxes) < BOXES and rng.random() < ANOTHER_BOX:
        boxes.append(_draw_box(shape, [side // 6 for side in shape], [side // 3 for side in shape], rng))
    return boxes


def draw_outer_boxes(shape: Sequence[int], rng: np.random.Generator) -> list[Box]:
    """Boxes to leave: one to five of three to four sevenths of the volume's sides."""
    least, most = ([side - part * side // 7 for side in shape] for part in (4, 3))
    boxes = [_draw_box(shape, least, most, rng)]
    while len(boxes) < BOXES and rng.random() < ANOTHER_BOX:
        boxes.append(_draw_box(shape, least, most, rng))
    return boxes


def _draw_box(shape: Sequence[int], least: Sequence[int], most: Sequence[int], rng: np.random.Generator) -> Box:
    def interval(side: int, shortest: int, longest: int) -> tuple[int, int]:
        length = max(1, int(rng.integers(shortest, longest, endpoint=True)))
        margin = min(PAINT_MARGIN, (side - length) // 2)
        start = int(rng.integers(margin, side - length - margin, endpoint=True))
        return start, start + length

    depth, height, width = (interval(*sides) for sides in zip(shape, least, most, strict=True))
    return depth, height, width


def in_boxes(shape: Sequence[int], boxes: Sequence[Box], device: torch.device) -> Tensor:
    """[D, H, W] bool: which voxels lie in any of the boxes."""
    inside = torch.zeros(tuple(shape), dtype=torch.bool, device=device)
    for depth, height, width in boxes:
        inside[slice(*depth), slice(*height), slice(*width)] = True
    return inside
