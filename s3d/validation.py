"""Loss and pictures on fixed patches with fixed masks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from s3d_kernels import BlockMask

from .data import VolumeStore, validation_sample
from .distributed import Processes
from .loss import masked_mse, visible_mean_mse
from .masking import MaskSampler
from .model import S3D
from .optimizer_step import autocast
from .pretrain_config import PretrainConfig
from .report import reconstruction_figure, save_figure
from .training_log import TrainingLog
from .training_step import VALIDATION_MASKS

MAX_VALIDATION_CASES = 64
# In TensorBoard; the first also as a file.
PICTURES = 4


class Validator:
    """Validates on the middle patches of some volumes; the processes share them.

    Patches are read anew each time: thousands of them would not fit into memory.

    Args:
        config: of the run.
        store: where the volumes are.
        cases: to validate on; at most 64 of them are used.
        processes: that share the cases.
    Attributes:
        mean_loss: of predicting the mean of the visible voxels: what a model must beat.
    """

    def __init__(self, config: PretrainConfig, store: VolumeStore, cases: list[int], processes: Processes) -> None:
        self.config = config
        self.store = store
        self.cases = cases[:MAX_VALIDATION_CASES]
        self.processes = processes
        self.sampler = MaskSampler(config.patch_size, config.mask_block, config.mask_ratio, config.seed)
        self.mean_loss = self._mean(
            [float(visible_mean_mse(patch, mask, valid)) for _, patch, mask, valid in self._problems()]
        )

    def _problems(self) -> Iterator[tuple[int, Tensor, BlockMask, Tensor | None]]:
        """Those of this process: number, patch [1, 1, D, H, W], its mask, and which of its voxels are valid."""
        device = self.processes.device
        for number, case in self.processes.share(list(enumerate(self.cases))):
            sample = validation_sample(self.store, case, self.config.patch_size)
            valid = sample["valid"][None].to(device) if "valid" in sample else None
            mask = self.sampler(1, VALIDATION_MASKS, number, device=device)
            yield number, sample["image"][None].to(device), mask, valid

    def _mean(self, losses: list[float]) -> float:
        total, count = self.processes.total(sum(losses), len(losses))
        return total / count

    def __call__(self, model: S3D, training_log: TrainingLog | None, step: int) -> float:
        """Mean loss over the patches; the first process writes it, and pictures of its first patches."""
        model.eval()
        losses = []
        with torch.no_grad():
            for number, patch, mask, valid in self._problems():
                with autocast(self.config.precision, self.processes.device):
                    reconstruction = model(patch, mask)
                losses.append(float(masked_mse(reconstruction, patch, mask, valid)))
                if training_log is not None and len(losses) <= PICTURES:
                    name = self.store.cases[self.cases[number]].name
                    figure = reconstruction_figure(patch, reconstruction, mask, title=f"{name}, step {step}")
                    if len(losses) == 1:
                        save_figure(figure, self.config.output_dir / f"reconstruction_{step:06d}.png")
                    training_log.tensorboard.add_figure(f"reconstruction/{name}", figure, step)
        model.train()
        loss = self._mean(losses)
        if training_log is not None:
            training_log.write(step, validation_loss=loss)
        return loss
