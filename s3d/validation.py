"""Loss and pictures on fixed patches with fixed random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .data import VolumeStore, validation_sample
from .distributed import Processes
from .optimizer_step import autocast
from .pretext.method import Draw, Pretext
from .pretrain_config import PretrainConfig
from .report import save_figure
from .training_log import TrainingLog
from .training_step import VALIDATION_STREAM

MAX_VALIDATION_CASES = 64
# In TensorBoard; the first also as a file.
PICTURES = 4


class Validator:
    """Validates on the middle patches of some volumes; the processes share them.

    Patches are read anew each time: thousands of them would not fit into memory.

    Args:
        config: of the run.
        pretext: its method.
        store: where the volumes are.
        cases: to validate on; at most 64 of them are used.
        processes: that share the cases.
    Attributes:
        trivial_loss: of an answer without a network, which a model must beat; NaN where the method has none.
    """

    def __init__(
        self, config: PretrainConfig, pretext: Pretext[Any], store: VolumeStore, cases: list[int], processes: Processes
    ) -> None:
        self.config = config
        self.pretext = pretext
        self.store = store
        self.cases = cases[:MAX_VALIDATION_CASES]
        self.processes = processes
        self.trivial_loss = self._mean([pretext.trivial_loss(problem) for _, problem in self._problems()])

    def _problems(self) -> Iterator[tuple[int, Any]]:
        """Those of this process: number, and the problem of one patch."""
        device = self.processes.device
        for number, case in self.processes.share(list(enumerate(self.cases))):
            sample = validation_sample(self.store, case, self.config.patch_size)
            valid = sample["valid"][None].to(device) if "valid" in sample else None
            draw = Draw(self.config.seed, (VALIDATION_STREAM, number), batch=1, first=0, wanted=1)
            yield number, self.pretext.pose(sample["image"][None].to(device), valid, draw)

    def _mean(self, losses: list[float]) -> float:
        total, count = self.processes.total(sum(losses), len(losses))
        return total / count

    def __call__(self, model: nn.Module, training_log: TrainingLog | None, step: int) -> float:
        """Mean loss over the patches; the first process writes it, and pictures of its first patches."""
        pretext = self.pretext
        model.eval()
        losses = []
        with torch.no_grad():
            for number, problem in self._problems():
                with autocast(self.config.precision, self.processes.device):
                    output = pretext.answer(model, problem)
                losses.append(float(pretext.loss(output, problem, pretext.terms(problem))))
                if training_log is not None and len(losses) <= PICTURES:
                    name = self.store.cases[self.cases[number]].name
                    figure = pretext.figure(problem, output, f"{name}, step {step}")
                    if len(losses) == 1:
                        save_figure(figure, self.config.output_dir / f"reconstruction_{step:06d}.png")
                    training_log.tensorboard.add_figure(f"reconstruction/{name}", figure, step)
        model.train()
        loss = self._mean(losses)
        if training_log is not None:
            training_log.write(step, validation_loss=loss)
        return loss
