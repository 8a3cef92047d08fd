"""One step of the pre-training: what the trainer does a quarter of a million times and the profiler records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from s3d_kernels import BlockMask

from .distributed import Processes
from .loss import masked_mse, masked_voxels
from .masking import MaskSampler
from .model import S3D, build_unet
from .optimizer_step import OptimizerStep, Training, autocast
from .pretrain_config import PretrainConfig

# Streams of masks, so that no training step shares a mask with validation.
TRAINING_MASKS, VALIDATION_MASKS = 0, 1


def build_training(config: PretrainConfig, device: torch.device) -> Training[S3D]:
    """The untrained model, its weights drawn from the seed, and its optimiser."""
    torch.manual_seed(config.seed)
    model = S3D(
        build_unet(config.preset),
        sparse=config.sparse,
        mask_tokens=config.mask_tokens,
        densify=config.densify,
        shortcuts=config.shortcuts,
    ).to(device)
    # Heads of lower resolutions belong to the network and its checkpoint, but without deep supervision none is used.
    model.unet.decoder.seg_layers[:-1].requires_grad_(False)
    training = Training.build(config, model, model.parameters(), network_prefix="unet.")
    if config.checkpoint_activations:
        model.checkpoint_activations()
    return training


class TrainingStep(OptimizerStep[PretrainConfig, S3D]):
    """A step on the masked voxels of a batch of patches.

    Masks are those of the whole batch, and the loss is the mean over all its masked voxels. So gradients do not depend
    on who computes what, up to rounding. Its log has "mask_ratio", voxels that the loss is taken over / all voxels.

    Batches have "image" [n, 1, D, H, W] and, where some voxels belong into no loss, "valid". Arguments as of
    `OptimizerStep`.
    """

    def __init__(
        self,
        config: PretrainConfig,
        training: Training[S3D],
        processes: Processes,
        parts: int = 1,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(config, training, processes, parts, phase)
        self.sampler = MaskSampler(
            config.patch_size, config.mask_block, config.mask_ratio, config.seed, config.ratio_per
        )

    def losses(self, parts: list[dict[str, Any]], step: int) -> tuple[Iterator[Callable[[], Tensor]], dict[str, float]]:
        """See `OptimizerStep.losses`."""
        with self.phase("data"):
            masks = [self._mask(part, step) for part in range(len(parts))]
            counts = [masked_voxels(mask, part.get("valid")) for mask, part in zip(masks, parts, strict=True)]
            voxels = sum(part["image"][:, 0].numel() for part in parts)
            count, all_voxels = self.processes.total(sum(counts), voxels)

        def compute(part: dict[str, Any], mask: BlockMask) -> Tensor:
            x, mask = part["image"], mask.to(self.processes.device)
            with autocast(self.config.precision, self.processes.device):
                with self.phase("forward"):
                    reconstruction = self.network(x, mask, masked_only=True)
                with self.phase("loss"):
                    return masked_mse(reconstruction, x, mask, part.get("valid"), count * x.shape[1])

        computations = (lambda part=part, mask=mask: compute(part, mask) for part, mask in zip(parts, masks))
        return computations, {"mask_ratio": count / all_voxels}

    def _mask(self, part: int, step: int) -> BlockMask:
        """Of a part of this process's share of the batch, on the CPU."""
        size = self.config.batch_size // (self.processes.world * self.parts)
        first = (self.processes.rank * self.parts + part) * size
        return self.sampler(self.config.batch_size, TRAINING_MASKS, step, samples=slice(first, first + size))
