"""Pre-training of the Swin transformer of a Swin UNETR: fill holes, tell rotations, tell samples apart.

Source: Tang et al., "Self-supervised pre-training of Swin transformers for 3D medical image analysis" (CVPR 2022), and
its published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from s3d.model import Network, build_unet
from s3d.networks.encoder_decoder import train_encoder_alone

from .method import Draw, Pretext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from s3d.pretrain_config import PretrainConfig

# As published.
TURNS = 4  # of 0, 90, 180 and 270 degrees
CONTRAST_CHANNELS = 512
TEMPERATURE = 0.5  # of the contrast
HOLES = 0.3  # volume of all holes / volume of the patch, holes that overlap counted twice
HOLE_SIDES = (0.05, 0.25)  # of a hole / of the patch, from and to


@dataclass(frozen=True)
class ViewsProblem:
    """Two views of each sample, turned and with holes. The first half has the first views.

    Attributes:
        seen: [2 n, 1, D, H, W], with noise in the holes.
        target: [2 n, 1, D, H, W], without.
        turns: [2 n], how many quarters of a turn.
        valid: [2 n, 1, D, H, W] bool, False where the target is not to be learned, or None.
    """

    seen: Tensor
    target: Tensor
    turns: Tensor
    valid: Tensor | None


class ViewsAnswer(NamedTuple):
    """What the model makes of views.

    Attributes:
        filled: [2 n, 1, D, H, W], the view without holes.
        turns: [2 n, 4], logits of the turns.
        contrast: [2 n, 512], like those of the other view of the sample, unlike all others.
    """

    filled: Tensor
    turns: Tensor
    contrast: Tensor


def possible_turns(patch_size: Sequence[int]) -> list[int]:
    """Quarters of a turn about the first axis that leave the shape of a patch as it is."""
    return [0, 1, 2, 3] if patch_size[1] == patch_size[2] else [0, 2]


def draw_box(
    shape: Sequence[int],  # (depth, height, width)
    generator: np.random.Generator,
) -> tuple[slice, slice, slice]:
    """A random box inside of a patch, each side from 5 to 25 % of the patch's and at least a voxel."""
    shortest, longest = ([max(1, int(share * side)) for side in shape] for share in HOLE_SIDES)
    sides = generator.integers(shortest, longest, endpoint=True)
    low = generator.integers(0, np.array(shape) - sides, endpoint=True)
    (d, h, w), (depth, height, width) = low.tolist(), sides.tolist()
    return slice(d, d + depth), slice(h, h + height), slice(w, w + width)


def draw_holes(
    shape: Sequence[int],  # (depth, height, width)
    generator: np.random.Generator,
) -> NDArray[np.bool_]:
    """[D, H, W], True inside of random boxes, drawn until their volumes add up to 30 % of the whole."""
    holes = np.zeros(shape, dtype=bool)
    volume = 0
    while volume < HOLES * holes.size:
        box = draw_box(shape, generator)
        holes[box] = True
        volume += math.prod(side.stop - side.start for side in box)
    return holes


def contrast_losses(contrast: Tensor) -> Tensor:  # [2 n, channels]
    """[2 n], cross entropy of telling the other view of a sample from all other views; 0 where there are no others.

    Source: NT-Xent of Chen et al., SimCLR (ICML 2020).
    """
    normalized = nn.functional.normalize(contrast, dim=1)
    views = len(normalized)
    likeness = normalized @ normalized.T / TEMPERATURE
    likeness = likeness.masked_fill(torch.eye(views, dtype=torch.bool, device=likeness.device), -math.inf)
    others = torch.arange(views, device=likeness.device).roll(views // 2)
    return nn.functional.cross_entropy(likeness, others, reduction="none")


class SwinUNETRModel(nn.Module):
    """The encoder of a Swin UNETR with a head for each of the three tasks, all on its deepest features.

    The heads of turns and contrast see the mean over all voxels, where those of the published code see the first voxel
    and the second.
    """

    def __init__(self, unet: Network) -> None:
        super().__init__()
        self.unet = unet
        train_encoder_alone(unet)
        channels: int = unet.encoder.output_channels[-1]
        self.turns = nn.Linear(channels, TURNS)
        self.contrast = nn.Linear(channels, CONTRAST_CHANNELS)
        doublings = len(unet.encoder.output_channels) - 1
        # Halved at each resolution but the finest, as published.
        widths = [channels >> min(level, doublings - 1) for level in range(doublings + 1)]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [
                nn.Conv3d(wide, narrow, 3, padding=1),
                nn.InstanceNorm3d(narrow),
                nn.LeakyReLU(),
                nn.Upsample(scale_factor=2, mode="trilinear"),
            ]
        self.fill = nn.Sequential(*layers, nn.Conv3d(widths[-1], 1, 1))

    def forward(self, views: Tensor) -> ViewsAnswer:  # [2 n, 1, D, H, W]
        """See `ViewsAnswer`."""
        deepest = self.unet.encoder(views)[-1]
        mean = deepest.mean((2, 3, 4))
        return ViewsAnswer(self.fill(deepest), self.turns(mean), self.contrast(mean))


class SwinUNETRPretext(Pretext[ViewsProblem]):
    """Two views of each sample, each turned about the first axis and with holes.

    The loss of a sample is the sum of three, each the mean over its views: mean absolute error of the whole view
    without its holes, cross entropy of the turn, and the contrast of the two views to those of all other samples that
    are computed at the same time. So it depends on the parts that a step is cut into, and with parts of one sample,
    as in validation, there is nothing to contrast and that loss is 0.

    Patches whose height and width differ are turned by 0 or 180 degrees only, and told apart among these. Training
    patches are not mirrored at random: mirrored along two axes is turned by 180 degrees, and nobody could tell.

    Holes show noise, as in the published code, whose images lie between 0 and 1; here it has mean and standard
    deviation of a z-scored image. The published code then pastes parts of another sample into as many holes again; here
    all holes are of noise, and a sample's views are its own.
    """

    trained = "encoder"
    mirrored = False
    mixes_samples = True
    loss_label = "inpainting, rotation and contrast"
    trivial_label = "zeros, and guesses"

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """See `Pretext`."""
        if config.size.architecture != "swin-unetr":
            raise ValueError(
                f"preset of method swin-unetr must be of architecture swin-unetr, got {config.preset}, "
                f"which is of {config.size.architecture}"
            )

    def build_model(self) -> SwinUNETRModel:
        """See `Pretext`."""
        return SwinUNETRModel(build_unet(self.config.preset))

    def pose(self, image: Tensor, valid: Tensor | None, draw: Draw) -> ViewsProblem:
        """See `Pretext`."""
        generators = draw.generators()
        possible = possible_turns(image.shape[2:])
        seen, targets, turns, valids = [], [], [], []
        for _ in range(2):
            for number, generator in enumerate(generators):
                turn = int(generator.choice(possible))
                target = image[number].rot90(turn, (2, 3))
                holes = torch.from_numpy(draw_holes(target.shape[1:], generator)).to(image.device)
                noise = torch.Generator(image.device).manual_seed(int(generator.integers(2**63)))
                filling = torch.randn(target.shape, generator=noise, dtype=image.dtype, device=image.device)
                seen.append(torch.where(holes, filling, target))
                targets.append(target)
                turns.append(turn)
                if valid is not None:
                    valids.append(valid[number].rot90(turn, (2, 3)))
        return ViewsProblem(
            torch.stack(seen),
            torch.stack(targets),
            torch.tensor(turns, device=image.device),
            torch.stack(valids) if valids else None,
        )

    def terms(self, problem: ViewsProblem) -> int:
        """Samples."""
        return len(problem.turns) // 2

    def answer(self, model: nn.Module, problem: ViewsProblem) -> ViewsAnswer:
        """See `Pretext`."""
        answer: ViewsAnswer = model(problem.seen)
        return answer

    def loss(self, output: ViewsAnswer, problem: ViewsProblem, terms: float) -> Tensor:
        """See `Pretext`."""
        filled, turns, contrast = (x.float() for x in output)
        with torch.autocast(filled.device.type, enabled=False):
            inpainting = _mean_absolute(filled - problem.target, problem.valid)
            rotation = nn.functional.cross_entropy(*self._among_possible(turns, problem), reduction="none")
            return (inpainting + rotation + contrast_losses(contrast)).sum() / (2 * terms)

    def trivial_loss(self, problem: ViewsProblem) -> float:
        """Of zeros, which are the mean of an image, and of turns and other views guessed without a look."""
        views = len(problem.turns)
        inpainting = _mean_absolute(problem.target.float(), problem.valid).mean()
        return float(inpainting) + math.log(len(possible_turns(problem.target.shape[2:]))) + math.log(views - 1)

    def _among_possible(self, turns: Tensor, problem: ViewsProblem) -> tuple[Tensor, Tensor]:
        """Logits of the turns that a patch of this shape can have, and which of these it has."""
        possible = torch.tensor(possible_turns(problem.target.shape[2:]), device=turns.device)
        return turns[:, possible], torch.searchsorted(possible, problem.turns)

    def figure(self, problem: ViewsProblem, output: ViewsAnswer, title: str) -> Figure:
        """The middle axial plane of both views of the first sample: seen, filled, target, error; and the turn."""
        from matplotlib.figure import Figure

        views = len(problem.turns)
        possible = possible_turns(problem.target.shape[2:])
        likely = self._among_possible(output.turns.detach().float(), problem)[0].softmax(1)
        figure = Figure(figsize=(10.5, 5.6), layout="constrained")
        axes = figure.subplots(2, 4)
        for row, view in enumerate((0, views // 2)):
            seen, filled, target = (
                volume[view, 0, volume.shape[2] // 2].detach().float().cpu().numpy()[::-1]
                for volume in (problem.seen, output.filled, problem.target)
            )
            low, high = np.percentile(target, [0.5, 99.5])
            limit = max(1e-6, float(np.abs(target - target.mean()).max()))
            for axis, plane in zip(axes[row], (seen, filled, target), strict=False):
                axis.imshow(plane, cmap="gray", vmin=low, vmax=high)
            axes[row, 3].imshow(filled - target, cmap="RdBu_r", vmin=-limit, vmax=limit)
            turn = int(problem.turns[view])
            chance = float(likely[view, possible.index(turn)])
            axes[row, 0].set_ylabel(f"view {row + 1}: {90 * turn}°, told with {chance:.0%}")
        for axis, name in zip(axes[0], ("seen", "filled", "target", "error"), strict=True):
            axis.set_title(name)
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
        if title:
            figure.suptitle(title)
        return figure


def _mean_absolute(
    error: Tensor,  # [views, 1, D, H, W]
    valid: Tensor | None,  # [views, 1, D, H, W] bool
) -> Tensor:
    """[views], mean over the valid voxels of each, 0 where there are none."""
    if valid is None:
        return error.abs().mean((1, 2, 3, 4))
    # Selection, not multiplication: what lies at other voxels, NaN included, is no business of the loss.
    return torch.where(valid, error.abs(), 0.0).sum((1, 2, 3, 4)) / valid.sum((1, 2, 3, 4)).clamp(min=1)
