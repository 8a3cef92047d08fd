"""One step of the pre-training: what the trainer does a quarter of a million times and the profiler records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .loss import masked_mse
from .masking import MaskSampler
from .model import S3D, build_unet

if TYPE_CHECKING:
    from .pretrain import PretrainConfig

# Streams of masks, so that no training step shares a mask with validation.
TRAINING_MASKS, VALIDATION_MASKS = 0, 1


def build_training(config: PretrainConfig, device: torch.device) -> tuple[S3D, torch.optim.Optimizer]:
    """The untrained model, its weights drawn from the seed, and its optimiser."""
    torch.manual_seed(config.seed)
    unet = build_unet(config.preset)
    model = S3D(unet, sparse=config.sparse, mask_tokens=config.mask_tokens, densify=config.densify).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        config.learning_rate,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    return model, optimizer


class TrainingStep:
    """Reads a batch, then forward, loss, backward, clipping and optimiser.

    Args:
        config: of the run.
        model: on the device.
        optimizer: of its parameters.
        device: where everything is computed.
        phase: opens a range around each part of the step: "data", "forward", "loss", "backward", "clip", "optimiser".
            The trainer has none.
    """

    def __init__(
        self,
        config: PretrainConfig,
        model: S3D,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.phase = phase
        self.sampler = MaskSampler(config.patch_size, config.mask_block, config.mask_ratio, config.seed)

    def read(self, batches: Iterator[dict[str, Any]]) -> Tensor:
        """The next patches [N, 1, D, H, W] on the device."""
        with self.phase("data"):
            x: Tensor = next(batches)["image"].to(self.device, non_blocking=True)
        return x

    def __call__(
        self,
        x: Tensor,  # [N, 1, D, H, W]
        step: int,  # steps done before this one
    ) -> tuple[Tensor, Tensor]:
        """Train on one batch. Returns: loss and norm of the gradient before clipping, scalars on the device."""
        config = self.config
        with self.phase("data"):
            mask = self.sampler(config.batch_size, TRAINING_MASKS, step, device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps) ** 0.9
        with autocast(config, self.device):
            with self.phase("forward"):
                reconstruction = self.model(x, mask)
            with self.phase("loss"):
                loss = masked_mse(reconstruction, x, mask)
        # Or it would be there in backward too, for nothing.
        del reconstruction
        self.optimizer.zero_grad(set_to_none=True)
        with self.phase("backward"):
            loss.backward()
        with self.phase("clip"):
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        with self.phase("optimiser"):
            self.optimizer.step()
        return loss, norm


def autocast(config: PretrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The arithmetic of the network that the settings ask for."""
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, config.precision))
