"""VoCo: where in a volume a crop lies, told by its likeness to crops of known places.

Source: Wu, Zhuang and Chen, "VoCo: a simple-yet-effective volume contrastive learning framework for 3D medical image
analysis" (CVPR 2024), and its published code.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from s3d.model import Network, build_unet
from s3d.networks.encoder_decoder import train_encoder_alone

from .method import Draw, Pretext

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from s3d.pretrain_config import PretrainConfig

Voxels = tuple[int, int, int]  # along (depth, height, width)

# As in the published code, which tiles two axes into 4 x 4 base crops and takes the third as it is.
MOST_BASES = 4  # along an axis
RANDOM_CROPS = 2  # of a sample
MOMENTUM = 0.9  # of the teacher
# What a crop must have along each axis, in voxels of the lowest resolution: fewer leave nothing to normalise.
SMALLEST_CROP = 2
# Channels of the projection / those of the deepest features: 2048 / 1152 as published, rounded.
PROJECTION_RATIO = 2


def base_crops(patch_size: Sequence[int], stride: int) -> tuple[Voxels, Voxels]:
    """How many base crops lie along each axis, and their size.

    An axis of s strides has min(4, s // 2) of them, each of as many strides as fit, and at least 2. So crops are of
    sizes that the network takes; where they do not fill the patch, they lie in its middle.

    Args:
        patch_size: voxels of a patch.
        stride: total stride of the network.
    Raises:
        ValueError: there are not two or more along at least two axes.
    """
    strides = [side // stride for side in patch_size]
    grid = [min(MOST_BASES, count // SMALLEST_CROP) for count in strides]
    if min(grid) < 1 or sum(count >= 2 for count in grid) < 2:
        raise ValueError(
            f"patch_size of voco must hold two base crops of at least {SMALLEST_CROP * stride} voxels, twice the "
            f"network's total stride, along two axes and one along the third, got {tuple(patch_size)}"
        )
    depth, height, width = (count // bases * stride for count, bases in zip(strides, grid, strict=True))
    return (grid[0], grid[1], grid[2]), (depth, height, width)


def overlap_shares(
    corner: Sequence[int],  # lowest voxel of a crop
    bases: Sequence[Sequence[int]],  # lowest voxels of the others
    size: Sequence[int],  # of all crops
) -> list[float]:
    """Which share of a crop each of some crops of its size covers."""
    shares = []
    for base in bases:
        share = 1.0
        for one, other, side in zip(corner, base, size, strict=True):
            share *= max(0, side - abs(one - other)) / side
        shares.append(share)
    return shares


@dataclass(frozen=True)
class CropProblem:
    """Crops of patches, and how much random ones overlap with those of known places.

    Attributes:
        image: [n, 1, D, H, W], the patches.
        crops: [n, bases + random crops, 1, d, h, w].
        corners: lowest voxel of each crop, for each sample.
        overlaps: [n, random crops, bases], covered shares of the random crops.
    """

    image: Tensor
    crops: Tensor
    corners: list[list[Voxels]]
    overlaps: Tensor


class Projection(nn.Module):
    """Three layers on the features of crops.

    The inner ones are standardised over the crops of a sample, where the published ones are over those of a batch: so a
    sample's loss is its own, whoever computes the others.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = PROJECTION_RATIO * channels
        # What is standardised needs no bias.
        self.inner = nn.ModuleList([nn.Linear(channels, width, bias=False), nn.Linear(width, width, bias=False)])
        self.last = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [n, crops, channels]
        """[n, crops, width]."""
        for layer in self.inner:
            x = layer(x).float()
            variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
            x = ((x - mean) * torch.rsqrt(variance + 1e-5)).relu()
        projected: Tensor = self.last(x)
        return projected


class VoCoModel(nn.Module):
    """A student, whose encoder is that of the network, and a teacher that follows it."""

    def __init__(self, unet: Network) -> None:
        super().__init__()
        self.unet = unet
        train_encoder_alone(unet)
        self.projection = Projection(unet.encoder.output_channels[-1])
        student = {"encoder": unet.encoder, "projection": self.projection}
        self.teacher = nn.ModuleDict(copy.deepcopy(student)).requires_grad_(False)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:  # [n, crops, 1, d, h, w]
        """What student and teacher make of crops, [n, crops, width] each."""
        with torch.no_grad():
            taught = _embedded(self.teacher["encoder"], self.teacher["projection"], crops)
        return _embedded(self.unet.encoder, self.projection, crops), taught

    @torch.no_grad()
    def teach(self) -> None:
        """The teacher follows the student: m times itself plus 1 - m times the student."""
        for name, part in (("encoder", self.unet.encoder), ("projection", self.projection)):
            for old, new in zip(self.teacher[name].parameters(), part.parameters(), strict=True):
                old.lerp_(new, 1 - MOMENTUM)


def _embedded(encoder: nn.Module, projection: nn.Module, crops: Tensor) -> Tensor:
    """Projection of the mean over all voxels of an encoder's deepest features."""
    deepest = encoder(crops.flatten(0, 1))[-1]
    embedded: Tensor = projection(deepest.mean((2, 3, 4)).unflatten(0, crops.shape[:2]))
    return embedded


class VoCo(Pretext[CropProblem]):
    """Base crops tile a patch; of random crops, the network tells which share each base covers.

    Its answer is the likeness of their projected features: the cosine where it is positive, else 0, averaged between
    student and teacher in both roles. The loss of a sample is, as in the published code (the paper weighs all bases
    alike), the mean of -log(1 - error) weighed by the true shares, plus the mean square of the answers for bases that
    the crop does not meet, plus the mean square of the likeness of different bases. Without the teacher it is known not
    to fall.

    Unlike there, crops are parts of a patch and not of a whole body, are not augmented one by one, and the features are
    the deepest alone, as other networks than the published one have no more in common.
    """

    trained = "encoder"
    loss_label = "overlaps and likeness of bases"
    trivial_label = "the same overlap with all bases"

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.grid, self.size = base_crops(config.patch_size, config.size.total_stride)
        margin = [(side - n * crop) // 2 for side, n, crop in zip(config.patch_size, self.grid, self.size, strict=True)]
        self.lowest = margin
        self.bases: list[Voxels] = [
            (margin[0] + i * self.size[0], margin[1] + j * self.size[1], margin[2] + k * self.size[2])
            for i, j, k in itertools.product(*map(range, self.grid))
        ]

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """See `Pretext`."""
        base_crops(config.patch_size, config.size.total_stride)

    def build_model(self) -> VoCoModel:
        """See `Pretext`."""
        return VoCoModel(build_unet(self.config.preset))

    def pose(self, image: Tensor, valid: Tensor | None, draw: Draw) -> CropProblem:
        """See `Pretext`. All voxels are shown, whether valid or not: none is a target."""
        # Inside what the bases tile, so that their shares of a crop add up to 1.
        room = [(n - 1) * side + 1 for n, side in zip(self.grid, self.size, strict=True)]
        corners, overlaps, crops = [], [], []
        for sample, generator in zip(image, draw.generators(), strict=True):
            offsets = generator.integers(0, room, size=(RANDOM_CROPS, 3)) + self.lowest
            random = [(int(d), int(h), int(w)) for d, h, w in offsets]
            corners.append([*self.bases, *random])
            overlaps.append([overlap_shares(corner, self.bases, self.size) for corner in random])
            crops.append(torch.stack([_crop(sample, corner, self.size) for corner in corners[-1]]))
        return CropProblem(image, torch.stack(crops), corners, torch.tensor(overlaps, device=image.device))

    def terms(self, problem: CropProblem) -> int:
        """Samples."""
        return len(problem.crops)

    def answer(self, model: nn.Module, problem: CropProblem) -> tuple[Tensor, Tensor]:
        """Likeness of random crops and bases, [n, random crops, bases], and among bases, [n, bases, bases]."""
        student, teacher = (nn.functional.normalize(x.float(), dim=-1) for x in model(problem.crops))
        bases = len(self.bases)
        with torch.autocast(student.device.type, enabled=False):
            ours = _likeness(student[:, bases:], teacher[:, :bases])
            theirs = _likeness(teacher[:, bases:], student[:, :bases])
            return (ours + theirs) / 2, _likeness(student[:, :bases], student[:, :bases])

    def loss(self, output: tuple[Tensor, Tensor], problem: CropProblem, terms: float) -> Tensor:
        """See `Pretext`."""
        predicted, among = output
        prediction = overlap_loss(predicted, problem.overlaps)
        different = among.square().tril(-1).sum((1, 2)) / (len(self.bases) * (len(self.bases) - 1) / 2)
        return (prediction + different).sum() / terms

    def after_step(self, model: nn.Module) -> None:
        """The teacher follows."""
        assert isinstance(model, VoCoModel)
        model.teach()

    def trivial_loss(self, problem: CropProblem) -> float:
        """Of the same overlap with all bases, all of which are unlike."""
        same = torch.full_like(problem.overlaps, 1 / len(self.bases))
        return float(overlap_loss(same, problem.overlaps).mean())

    def figure(self, problem: CropProblem, output: tuple[Tensor, Tensor], title: str) -> Figure:
        """Where base crops and random crops lie in their axial projection, and true and predicted overlaps."""
        from matplotlib.figure import Figure

        bases = len(self.bases)
        numbers = list(range(1, bases + 1))
        true, predicted = (x[0].detach().float().cpu().numpy() for x in (problem.overlaps, output[0]))
        figure = Figure(figsize=(4 + 4.5 * RANDOM_CROPS, 4), layout="constrained")
        place, *bars = figure.subplots(1, 1 + RANDOM_CROPS)
        self._draw_places(place, problem)
        for number, axes in enumerate(bars):
            axes.bar(numbers, true[number], color="0.8", label="true")
            axes.plot(numbers, predicted[number], "o", color=f"C{number}", markersize=4, label="predicted")
            axes.set_ylim(0, 1)
            axes.set_xlabel("base crop")
            axes.set_title(f"random crop {number + 1}")
            axes.legend()
        bars[0].set_ylabel("overlap")
        if title:
            figure.suptitle(title)
        return figure

    def _draw_places(self, axes: Axes, problem: CropProblem) -> None:
        """The first sample's middle axial plane with outlines of all crops, wherever they lie along the depth."""
        from matplotlib.patches import Rectangle

        image = problem.image[0, 0].detach().float().cpu().numpy()
        axes.imshow(image[len(image) // 2], cmap="gray", origin="lower")
        _, height, width = self.size
        for number, (_, row, column) in enumerate(problem.corners[0]):
            random = number - len(self.bases)
            style = {"edgecolor": f"C{random}", "linewidth": 2} if random >= 0 else {"edgecolor": "white"}
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), width, height, fill=False, **style))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title("base crops (white), random crops")


def overlap_loss(
    predicted: Tensor,  # [n, crops, bases], in [0, 1]
    overlaps: Tensor,  # [n, crops, bases]
) -> Tensor:
    """[n], mean of -log(1 - error) weighed by the overlaps, plus mean square where there is none."""
    near = -overlaps * torch.log1p(1e-6 - (overlaps - predicted).abs())
    apart = overlaps == 0
    far = torch.where(apart, predicted.square(), 0.0)
    return near.sum((1, 2)) / overlaps.sum((1, 2)) + far.sum((1, 2)) / apart.sum((1, 2)).clamp(min=1)


def _likeness(a: Tensor, b: Tensor) -> Tensor:  # [n, i, width] and [n, j, width], of length 1
    """[n, i, j], the positive part of their cosines."""
    return torch.einsum("nic,njc->nij", a, b).clamp(0, 1)


def _crop(sample: Tensor, corner: Voxels, size: Voxels) -> Tensor:
    (d, h, w), (depth, height, width) = corner, size
    return sample[:, d : d + depth, h : h + height, w : w + width]
