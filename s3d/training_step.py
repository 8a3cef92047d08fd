"""One step of the pre-training: what the trainer does a quarter of a million times and the profiler records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from s3d_kernels import BlockMask

from .distributed import Processes
from .loss import masked_mse, masked_voxels
from .masking import MaskSampler
from .model import S3D, build_unet
from .pretrain_config import PretrainConfig

# Streams of masks, so that no training step shares a mask with validation.
TRAINING_MASKS, VALIDATION_MASKS = 0, 1


@dataclass(frozen=True)
class Training:
    """What training changes, and a checkpoint keeps.

    Attributes:
        model: the network and what the method adds.
        optimizer: of its parameters.
        scaler: of the loss; does nothing unless the arithmetic is float16.
        average: exponential moving average of the model, or None.
    """

    model: S3D
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds it; tensors are not copied."""
        state: dict[str, Any] = {**_split(self.model.state_dict()), "optimizer": self.optimizer.state_dict()}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.average is not None:
            average = _split(self.average.module.state_dict())
            state |= {"ema": average["network"], "ema_method": average["method"]}
            state["ema_updates"] = int(self.average.n_averaged)
        return state

    def load_state(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same settings."""
        self.model.load_state_dict(joined_state(saved))
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(joined_state(saved, "ema", "ema_method"))
            self.average.n_averaged.fill_(saved["ema_updates"])


def build_training(config: PretrainConfig, device: torch.device) -> Training:
    """The untrained model, its weights drawn from the seed, and its optimiser."""
    torch.manual_seed(config.seed)
    model = S3D(
        build_unet(config.preset), sparse=config.sparse, mask_tokens=config.mask_tokens, densify=config.densify
    ).to(device)
    # Heads of lower resolutions belong to the network and its checkpoint, but without deep supervision none is used.
    model.unet.decoder.seg_layers[:-1].requires_grad_(False)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)) if config.ema_decay else None
    if config.checkpoint_activations:
        model.checkpoint_activations()
    if config.compile:
        model.compile()
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), config.peak_learning_rate, weight_decay=config.decay)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(),
            config.peak_learning_rate,
            config.momentum,
            weight_decay=config.decay,
            nesterov=config.momentum > 0,
        )
    return Training(model, optimizer, torch.amp.GradScaler(device.type, enabled=config.precision == "float16"), average)


@dataclass(frozen=True)
class StepResult:
    """What a step found.

    Attributes:
        loss: over all processes.
        gradient_norm: before clipping, over all processes.
        mask_ratio: voxels that the loss is taken over / all voxels.
        finite: whether loss and gradient are finite; if not, weights and optimiser stay as they were.
    """

    loss: float
    gradient_norm: float
    mask_ratio: float
    finite: bool


class TrainingStep:
    """Reads a batch, then forward, loss, backward, clipping and optimiser.

    A step is the same whatever the number of processes and of parts: masks are those of the whole batch, and the loss
    is the mean over all its masked voxels. So gradients are equal up to rounding.

    Args:
        config: of the run.
        training: on the device of this process.
        processes: that share the batch.
        parts: into which a process cuts its share of the batch, to save memory.
        phase: opens a range around each part of the step: "data", "forward", "loss", "backward", "clip", "optimiser".
            The trainer has none.
    """

    def __init__(
        self,
        config: PretrainConfig,
        training: Training,
        processes: Processes,
        parts: int = 1,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.config = config
        self.training = training
        self.processes = processes
        self.parts = parts
        self.phase = phase
        self.network = DistributedDataParallel(training.model) if processes.world > 1 else training.model
        self.sampler = MaskSampler(
            config.patch_size, config.mask_block, config.mask_ratio, config.seed, config.ratio_per
        )

    def read(self, batches: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """The parts of the next batch; "image" [n, 1, D, H, W] and "valid", if there is one, on the device."""
        with self.phase("data"):
            return [
                {
                    name: value.to(self.processes.device, non_blocking=True) if isinstance(value, Tensor) else value
                    for name, value in next(batches).items()
                }
                for _ in range(self.parts)
            ]

    def __call__(
        self,
        parts: list[dict[str, Any]],
        step: int,  # steps done before this one
    ) -> StepResult:
        """Train on one batch, unless loss or gradient are not finite."""
        config, training, device = self.config, self.training, self.processes.device
        model, optimizer, scaler = training.model, training.optimizer, training.scaler
        with self.phase("data"):
            masks = [self._mask(part, step) for part in range(len(parts))]
            counts = [masked_voxels(mask, part.get("valid")) for mask, part in zip(masks, parts, strict=True)]
            voxels = sum(part["image"][:, 0].numel() for part in parts)
            count, all_voxels = self.processes.total(sum(counts), voxels)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for number, (part, mask) in enumerate(zip(parts, masks, strict=True), start=1):
            x, mask = part["image"], mask.to(device)
            with self._synchronised(number == len(parts)):
                with autocast(config, device):
                    with self.phase("forward"):
                        reconstruction = self.network(x, mask)
                    with self.phase("loss"):
                        partial = masked_mse(reconstruction, x, mask, part.get("valid"), count * x.shape[1])
                # Or it would be there in backward too, for nothing.
                del reconstruction
                with self.phase("backward"):
                    # The gradients of the processes are averaged, and the loss is their sum.
                    scaler.scale(partial * self.processes.world).backward()
            loss += partial.detach()
        with self.phase("clip"):
            scaler.unscale_(optimizer)
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip))
        (whole_loss,) = self.processes.total(loss)
        finite = math.isfinite(norm) and math.isfinite(whole_loss)
        with self.phase("optimiser"):
            if finite:
                scaler.step(optimizer)
                if training.average is not None:
                    training.average.update_parameters(model)
            scaler.update()
        return StepResult(whole_loss, norm, count / all_voxels, finite)

    def _mask(self, part: int, step: int) -> BlockMask:
        """Of a part of this process's share of the batch, on the CPU."""
        size = self.config.batch_size // (self.processes.world * self.parts)
        first = (self.processes.rank * self.parts + part) * size
        return self.sampler(self.config.batch_size, TRAINING_MASKS, step, samples=slice(first, first + size))

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients of the processes are added up once a step, with those of the last part."""
        if isinstance(self.network, DistributedDataParallel) and not last:
            return self.network.no_sync()
        return nullcontext()


def autocast(config: PretrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The arithmetic of the network that the settings ask for."""
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, config.precision))


def _split(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """State of the plain U-Net under its own names, and of what the method adds."""
    network = {name.removeprefix("unet."): value for name, value in state.items() if name.startswith("unet.")}
    method = {name: value for name, value in state.items() if not name.startswith("unet.")}
    return {"network": network, "method": method}


def joined_state(saved: dict[str, Any], network: str = "network", method: str = "method") -> dict[str, Tensor]:
    """The state of a model from the two parts of a checkpoint."""
    return {**{f"unet.{name}": value for name, value in saved[network].items()}, **saved[method]}
