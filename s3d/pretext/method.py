"""What a method of pre-training is: what the network sees, what it must produce, and how far off it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from s3d.pretrain_config import PretrainConfig

# What of the network a method trains, and fine-tuning takes over.
Trained = Literal["encoder", "encoder+decoder"]
Problem = TypeVar("Problem")


@dataclass(frozen=True)
class Draw:
    """Where the random numbers of a batch come from: each sample has its own, whoever computes it.

    Attributes:
        seed: of the run.
        stream: numbers, such as (0, step): the same numbers give the same random numbers.
        batch: samples of the whole batch, however many processes share it.
        first: number of the first of the samples that are wanted.
        wanted: how many samples are wanted.
    """

    seed: int
    stream: tuple[int, ...]
    batch: int
    first: int
    wanted: int

    @property
    def samples(self) -> slice:
        """The wanted samples of the whole batch."""
        return slice(self.first, self.first + self.wanted)

    def generators(self) -> list[np.random.Generator]:
        """One for each wanted sample."""
        return [
            np.random.default_rng(np.random.SeedSequence([self.seed, *self.stream, sample]))
            for sample in range(self.first, self.first + self.wanted)
        ]


class Pretext(ABC, Generic[Problem]):
    """A method of pre-training. It has no state but its settings: what is trained is in the model.

    A step of the trainer is, for each part of the batch: ``problem = pose(image, valid, draw)``, ``output =
    answer(model, problem)``, ``loss(output, problem, terms).backward()``, where ``terms`` is the sum of
    ``terms(problem)`` over all parts and processes. So gradients do not depend on who computes what, unless the method
    mixes samples.

    Args:
        config: of the run.
    """

    trained: ClassVar[Trained] = "encoder+decoder"
    # Whether patches may be mirrored at random for training.
    mirrored: ClassVar[bool] = True
    # Whether samples that are computed at the same time are parts of each other's problems.
    mixes_samples: ClassVar[bool] = False
    # Of the loss, for plots.
    loss_label: ClassVar[str]
    # What `trivial_loss` is the loss of, for plots; empty where there is none.
    trivial_label: ClassVar[str] = ""
    # Names of `figures`.
    columns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """ValueError, naming the setting, unless the method can be run with these."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The untrained model. The network that fine-tuning takes over is its attribute ``unet``; what else has
        parameters is of the method alone. Parameters that are not trained have ``requires_grad`` False."""

    @abstractmethod
    def pose(
        self,
        image: Tensor,  # [n, 1, D, H, W], z-scored
        valid: Tensor | None,  # [n, 1, D, H, W] bool: False where the image is no target; None: everywhere True
        draw: Draw,
    ) -> Problem:
        """What the network sees and should produce, on the device of the image. `image` must not be changed."""

    @abstractmethod
    def terms(self, problem: Problem) -> int:
        """Of how many terms the loss of a problem is the mean, such as masked voxels or samples."""

    def figures(self, terms: float, voxels: float) -> dict[str, float]:
        """Further columns of the log, named in `columns`.

        Args:
            terms: of the whole batch.
            voxels: of the whole batch.
        """
        return {}

    @abstractmethod
    def answer(self, model: nn.Module, problem: Problem) -> Any:
        """What the model produces; calls `model`, which may be wrapped for several processes."""

    @abstractmethod
    def loss(self, output: Any, problem: Problem, terms: float) -> Tensor:
        """Sum of the problem's terms of the loss / `terms`, float32."""

    def after_step(self, model: nn.Module) -> None:
        """Called behind each step of the optimiser, such as for a teacher that follows the model."""

    def trivial_loss(self, problem: Problem) -> float:
        """Mean loss of an answer without a network, which a model must beat; NaN where there is none."""
        return float("nan")

    @abstractmethod
    def figure(self, problem: Problem, output: Any, title: str) -> Figure:
        """A picture of the first sample: what the network saw, what it produced, what it should have."""
