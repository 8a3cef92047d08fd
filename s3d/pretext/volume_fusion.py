"""VolumeFusion: two volumes are fused box by box, and each voxel's share of the one is to be told.

Source: Wang et al., "MIS-FM: 3D medical image segmentation using foundation models pretrained on a large-scale
unannotated dataset" (arXiv 2306.16925; IEEE Transactions on Image Processing 34, 2025, as "Volume Fusion-based
self-supervised pretraining for 3D medical image segmentation").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from s3d.model import build_unet
from s3d.report import Column, middle_planes, planes_figure
from s3d.segmentation.loss import SegmentationLoss

from .method import Draw, Pretext
from .whole_network import WholeNetwork

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Published: coefficients 0, 1/4, ..., 1.
COEFFICIENTS = 4
# Published: 10 to 40 boxes.
FEWEST_BOXES, MOST_BOXES = 10, 40
# Published: boxes of 8 to 40 x 80 x 80 voxels in patches of 64 x 128 x 128.
SMALLEST_SIDE, LARGEST_SHARE = 8, 0.625


@dataclass(frozen=True)
class FusionProblem:
    """Fused volumes.

    Attributes:
        fused: [n, 1, D, H, W], what the network sees.
        classes: [n, 1, D, H, W] uint8, each voxel's coefficient times `COEFFICIENTS`.
        valid: [n, 1, D, H, W] bool, False where either volume shows nothing to be learned, or None.
    """

    fused: Tensor
    classes: Tensor
    valid: Tensor | None


class VolumeFusion(Pretext[FusionProblem]):
    """Classification of each voxel's coefficient, soft Dice of all classes plus cross-entropy, mean over samples.

    A sample is the background; its foreground is the sample before it, of those that one process has at a time, or the
    sample itself, mirrored along its three axes, where this is one sample. So who is fused with whom depends on how a
    batch is shared, while boxes and coefficients do not. (The published method reads two patches for each sample.)
    """

    mixes_samples = True
    loss_label = "soft Dice and cross-entropy of the coefficients"
    trivial_label = "all coefficients alike"

    @cached_property
    def _criterion(self) -> SegmentationLoss:
        return SegmentationLoss(include_background=True)

    def build_model(self) -> nn.Module:
        """See `Pretext`."""
        return WholeNetwork(build_unet(self.config.preset, out_channels=COEFFICIENTS + 1))

    def pose(self, image: Tensor, valid: Tensor | None, draw: Draw) -> FusionProblem:
        """See `Pretext`."""
        boxes = [draw_boxes(image.shape[2:], rng) for rng in draw.generators()]
        classes = torch.stack([paint_classes(image.shape[2:], some, image.device) for some in boxes])[:, None]
        valid = None if valid is None else valid & foreground_of(valid)
        return FusionProblem(fuse(image, foreground_of(image), classes), classes, valid)

    def terms(self, problem: FusionProblem) -> int:
        """Samples."""
        return len(problem.fused)

    def answer(self, model: nn.Module, problem: FusionProblem) -> Tensor:
        """Logits of the classes, [n, COEFFICIENTS + 1, D, H, W]."""
        logits: Tensor = model(problem.fused)
        return logits

    def loss(self, output: Tensor, problem: FusionProblem, terms: float) -> Tensor:
        """See `Pretext`."""
        if problem.valid is None:
            return self._criterion(output, problem.classes) * (len(output) / max(terms, 1))
        losses = []
        for logits, classes, valid in zip(output, problem.classes, problem.valid, strict=True):
            # Selection, not multiplication. One spatial axis is left, and a sample without any voxel has a loss of 0.
            counted, right = logits[:, valid[0]][None], classes[valid][None, None]
            losses.append(self._criterion(counted, right) if right.numel() else counted.float().sum())
        return torch.stack(losses).sum() / max(terms, 1)

    def trivial_loss(self, problem: FusionProblem) -> float:
        """Of the same probability for each class."""
        logits = problem.fused.new_zeros(()).expand(len(problem.fused), COEFFICIENTS + 1, *problem.fused.shape[2:])
        return float(self.loss(logits, problem, self.terms(problem)))

    def figure(self, problem: FusionProblem, output: Tensor, title: str) -> Figure:
        """Fused volume, its classes and the predicted ones."""
        fused = problem.fused[0, 0].float().cpu().numpy()
        true, predicted = problem.classes[0, 0].cpu().numpy(), output[0].argmax(0).cpu().numpy()
        low, high = np.percentile(fused, [0.5, 99.5])
        right = float((true == predicted).mean())
        return planes_figure(
            [
                Column("fused input", middle_planes(fused), low, high),
                Column("true class", middle_planes(true), 0, COEFFICIENTS, "viridis"),
                Column(f"predicted ({right:.0%} right)", middle_planes(predicted), 0, COEFFICIENTS, "viridis"),
            ],
            title,
        )


def foreground_of(
    batch: Tensor,  # [n, 1, D, H, W]
) -> Tensor:
    """For each sample the one before it, or itself mirrored where it is the only one."""
    return batch.roll(1, 0) if len(batch) > 1 else batch.flip((2, 3, 4))


def fuse(
    background: Tensor,  # [n, 1, D, H, W]
    foreground: Tensor,  # [n, 1, D, H, W]
    classes: Tensor,  # [n, 1, D, H, W], integers
) -> Tensor:
    """a * foreground + (1 - a) * background with a = class / COEFFICIENTS; exactly the one or the other at 1 and 0."""
    return torch.lerp(background.float(), foreground.float(), classes / COEFFICIENTS)


def draw_boxes(shape: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
    """[boxes, 7]: first voxel, voxel behind the last one (both along depth, height, width) and class, 1 or more."""
    count = int(rng.integers(FEWEST_BOXES, MOST_BOXES, endpoint=True))
    most = np.array([max(1, math.floor(LARGEST_SHARE * side)) for side in shape])
    sides = rng.integers(np.minimum(SMALLEST_SIDE, most), most, size=(count, 3), endpoint=True)
    starts = rng.integers(0, np.array(shape) - sides, endpoint=True)
    classes = rng.integers(1, COEFFICIENTS, size=(count, 1), endpoint=True)
    return np.concatenate([starts, starts + sides, classes], axis=1)


def paint_classes(
    shape: Sequence[int],
    boxes: NDArray[np.int64],  # [boxes, 7], see draw_boxes
    device: torch.device,
) -> Tensor:
    """[D, H, W] uint8: class of the last box over each voxel, 0 where there is none."""
    classes = torch.zeros(tuple(shape), dtype=torch.uint8, device=device)
    for d0, h0, w0, d1, h1, w1, value in boxes.tolist():
        classes[d0:d1, h0:h1, w0:w1] = value
    return classes
