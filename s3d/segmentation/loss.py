"""The loss of fine-tuning: soft Dice of the foreground and cross-entropy, as in nnU-Net."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SegmentationLoss:
    """Soft Dice plus cross-entropy, mean over samples; with deep supervision the weighted mean over resolutions.

    Dice is taken for each sample and foreground class, cross-entropy over all voxels. The output of resolution i (0 is
    the finest) weighs 2^-i; the coarsest of several does not count. Coarse labels take the nearest voxel.

    Args:
        include_background: whether class 0 counts as a class of the foreground.
    Source: Isensee et al., nnU-Net (Nature Methods 2021).
    """

    def __init__(self, include_background: bool = False) -> None:
        from monai.losses import DiceCELoss  # takes seconds to import

        self._loss = DiceCELoss(
            include_background=include_background, to_onehot_y=True, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5
        )

    def __call__(
        self,
        outputs: Tensor | Sequence[Tensor],  # logits [N, classes, D, H, W], the finest first
        labels: Tensor,  # [N, 1, D, H, W], integers
    ) -> Tensor:
        """The loss, float32."""
        if isinstance(outputs, Tensor):
            return self._of(outputs, labels)
        counted = outputs[:-1] if len(outputs) > 1 else outputs
        weights = [2.0**-level for level in range(len(counted))]
        losses = [weight * self._of(logits, labels) for weight, logits in zip(weights, counted, strict=True)]
        return torch.stack(losses).sum() / sum(weights)

    def _of(self, logits: Tensor, labels: Tensor) -> Tensor:
        size = logits.shape[2:]
        if labels.shape[2:] != size:
            labels = torch.nn.functional.interpolate(labels.float(), size=size, mode="nearest-exact")
        loss: Tensor = self._loss(logits.float(), labels)
        return loss
