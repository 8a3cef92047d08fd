"""One step of the pre-training: what the trainer does a quarter of a million times and the profiler records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import Processes
from .optimizer_step import OptimizerStep, StepResult, Training, autocast
from .pretext.method import Draw, Pretext
from .pretrain_config import PretrainConfig

# Streams of random numbers, so that no training step shares a problem with validation.
TRAINING_STREAM, VALIDATION_STREAM = 0, 1


def build_training(config: PretrainConfig, pretext: Pretext[Any], device: torch.device) -> Training[nn.Module]:
    """The untrained model of a method, its weights drawn from the seed, and its optimiser."""
    torch.manual_seed(config.seed)
    model = pretext.build_model().to(device)
    return Training.build(config, model, model.parameters(), network_prefix="unet.")


class TrainingStep(OptimizerStep[PretrainConfig, nn.Module]):
    """A step of a method on a batch of patches.

    What is drawn for a patch and the number of terms of the loss are those of the whole batch. So gradients do not
    depend on who computes what, up to rounding.

    Batches have "image" [n, 1, D, H, W] and, where some voxels belong into no loss, "valid".

    Args:
        config: of the run.
        pretext: its method.
        training, processes, parts, phase: as of `OptimizerStep`.
    """

    def __init__(
        self,
        config: PretrainConfig,
        pretext: Pretext[Any],
        training: Training[nn.Module],
        processes: Processes,
        parts: int = 1,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(config, training, processes, parts, phase)
        self.pretext = pretext

    def losses(self, parts: list[dict[str, Any]], step: int) -> tuple[Iterator[Callable[[], Tensor]], dict[str, float]]:
        """See `OptimizerStep.losses`."""
        with self.phase("data"):
            problems = [
                self.pretext.pose(part["image"], part.get("valid"), self._draw(number, step))
                for number, part in enumerate(parts)
            ]
            voxels = sum(part["image"].numel() for part in parts)
            terms, all_voxels = self.processes.total(sum(map(self.pretext.terms, problems)), voxels)

        def compute(problem: Any) -> Tensor:
            with autocast(self.config.precision, self.processes.device):
                with self.phase("forward"):
                    output = self.pretext.answer(self.network, problem)
                with self.phase("loss"):
                    return self.pretext.loss(output, problem, terms)

        computations = (lambda problem=problem: compute(problem) for problem in problems)
        return computations, self.pretext.figures(terms, all_voxels)

    def __call__(
        self,
        parts: list[dict[str, Any]],
        step: int,  # steps done before this one
    ) -> StepResult:
        """See `OptimizerStep`."""
        result = super().__call__(parts, step)
        if result.finite:
            self.pretext.after_step(self.training.model)
        return result

    def _draw(self, part: int, step: int) -> Draw:
        """For a part of this process's share of the batch."""
        size = self.config.batch_size // (self.processes.world * self.parts)
        first = (self.processes.rank * self.parts + part) * size
        return Draw(self.config.seed, (TRAINING_STREAM, step), self.config.batch_size, first, size)
