"""Forward, loss, backward, clipping and optimiser: what every training does with a batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .distributed import Processes
from .run_settings import RunSettings
from .sound_gradients import ensure_sound_gradients

Model = TypeVar("Model", bound=nn.Module)
Settings = TypeVar("Settings", bound=RunSettings)


@dataclass(frozen=True)
class Training(Generic[Model]):
    """What training changes, and a checkpoint keeps.

    Attributes:
        model: the network and what the method adds.
        optimizer: of its parameters.
        scaler: of the loss; does nothing unless the arithmetic is float16.
        average: exponential moving average of the model, or None.
        network_prefix: of the names of the plain network's tensors in the model.
    """

    model: Model
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    network_prefix: str

    @staticmethod
    def build(config: RunSettings, model: Model, parameters: Iterable[nn.Parameter], network_prefix: str) -> Training:
        """With a new optimiser of some parameters of the model."""
        average = (
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)) if config.ema_decay else None
        )
        if config.compile:
            model.compile()
        optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            optimizer = torch.optim.AdamW(parameters, config.peak_learning_rate, weight_decay=config.decay)
        else:
            optimizer = torch.optim.SGD(
                parameters,
                config.peak_learning_rate,
                config.momentum,
                weight_decay=config.decay,
                nesterov=config.momentum > 0,
            )
        device = next(model.parameters()).device
        if config.precision == "bfloat16" and device.type == "cpu":
            ensure_sound_gradients(model)
        scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        return Training(model, optimizer, scaler, average, network_prefix)

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds it; tensors are not copied."""
        state: dict[str, Any] = {**self._split(self.model), "optimizer": self.optimizer.state_dict()}
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.average is not None:
            average = self._split(self.average.module)
            state |= {"ema": average["network"], "ema_method": average["method"]}
            state["ema_updates"] = int(self.average.n_averaged)
        return state

    def load_state(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same settings."""
        self.model.load_state_dict(joined_state(saved, prefix=self.network_prefix))
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(joined_state(saved, "ema", "ema_method", self.network_prefix))
            self.average.n_averaged.fill_(saved["ema_updates"])

    def _split(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """State of the plain network under its own names, and of what the method adds."""
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "method": {}}
        for name, value in model.state_dict().items():
            part = "network" if name.startswith(self.network_prefix) else "method"
            parts[part][name.removeprefix(self.network_prefix) if part == "network" else name] = value
        return parts


def joined_state(
    saved: dict[str, Any], network: str = "network", method: str = "method", prefix: str = "unet."
) -> dict[str, Tensor]:
    """The state of a model from the two parts of a checkpoint."""
    return {**{f"{prefix}{name}": value for name, value in saved[network].items()}, **saved[method]}


@dataclass(frozen=True)
class StepResult:
    """What a step found.

    Attributes:
        loss: over all processes.
        gradient_norm: before clipping, over all processes.
        finite: whether loss and gradient are finite; if not, weights and optimiser stay as they were.
        figures: further columns of the log.
    """

    loss: float
    gradient_norm: float
    finite: bool
    figures: dict[str, float] = field(default_factory=dict)


class OptimizerStep(ABC, Generic[Settings, Model]):
    """Reads a batch, then forward, loss, backward, clipping and optimiser.

    A step is the same whatever the number of processes and of parts, up to rounding: losses of parts add up to that of
    the whole batch.

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
        config: Settings,
        training: Training[Model],
        processes: Processes,
        parts: int = 1,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.config = config
        self.training = training
        self.processes = processes
        self.parts = parts
        self.phase = phase
        self.network = self._distributed()

    def _distributed(self) -> nn.Module:
        """The model, such that gradients of the processes are averaged; to be made anew when other parameters train."""
        model = self.training.model
        return DistributedDataParallel(model) if self.processes.world > 1 else model

    @abstractmethod
    def losses(self, parts: list[dict[str, Any]], step: int) -> tuple[Iterator[Callable[[], Tensor]], dict[str, float]]:
        """What to compute in a step.

        Args:
            parts: of this process's share of the batch.
            step: steps done before this one.
        Returns: for each part a function that runs the network and gives the part's share of the loss of the whole
            batch; and further columns of the log.
        """

    def read(self, batches: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """The parts of the next batch, their tensors on the device."""
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
        training, optimizer, scaler = self.training, self.training.optimizer, self.training.scaler
        losses, figures = self.losses(parts, step)
        for group in optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.processes.device)
        for number, compute in enumerate(losses, start=1):
            with self._synchronised(number == len(parts)):
                partial = compute()
                with self.phase("backward"):
                    # The gradients of the processes are averaged, and the loss is their sum.
                    scaler.scale(partial * self.processes.world).backward()
            loss += partial.detach()
        with self.phase("clip"):
            scaler.unscale_(optimizer)
            norm = float(torch.nn.utils.clip_grad_norm_(training.model.parameters(), self.config.gradient_clip))
        (whole_loss,) = self.processes.total(loss)
        finite = math.isfinite(norm) and math.isfinite(whole_loss)
        with self.phase("optimiser"):
            if finite:
                scaler.step(optimizer)
                if training.average is not None:
                    training.average.update_parameters(training.model)
            scaler.update()
        return StepResult(whole_loss, norm, finite, figures)

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients of the processes are added up once a step, with those of the last part."""
        if isinstance(self.network, DistributedDataParallel) and not last:
            return self.network.no_sync()
        return nullcontext()


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The arithmetic of a network: float32, bfloat16 or float16."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))
