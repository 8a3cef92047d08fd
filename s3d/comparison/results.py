"""What a comparison has measured: one record for each fine-tuned and for each pre-trained model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EvaluatedCell:
    """One fine-tuned model, scored on the test cases of its data set.

    Attributes:
        method: its name in the configuration.
        dataset: its name in the configuration.
        labels: number of labelled training cases; None: all of them.
        seed: of the fine-tuning.
        folder: of the run, relative to the output folder of the comparison.
        classes: the foreground.
        cases: of the test.
        dice: [cases, classes], 0 to 1; NaN where a class is neither in the truth nor in the prediction.
        curve: (step, Dice on the validation cases) during fine-tuning; empty without validation.
        seconds: of its training steps.
    Raises:
        ValueError: the shape of `dice` does not fit the cases and classes.
    """

    method: str
    dataset: str
    labels: int | None
    seed: int
    folder: Path
    classes: tuple[str, ...]
    cases: tuple[str, ...]
    dice: NDArray[np.float64]  # [cases, classes]
    curve: tuple[tuple[int, float], ...]
    seconds: float

    def __post_init__(self) -> None:
        expected = (len(self.cases), len(self.classes))
        if self.dice.shape != expected:
            raise ValueError(
                f"dice of {self.folder} must be [cases, classes] = {expected}, got shape {self.dice.shape}"
            )


@dataclass(frozen=True)
class PretrainedCell:
    """One pre-trained model and what it cost.

    Attributes:
        method: its name in the configuration.
        seed: of the pre-training.
        folder: of the run, relative to the output folder of the comparison.
        steps: that were trained.
        parameters: of the whole network that was trained, heads of the method included.
        seconds: of all training steps.
        seconds_per_step: of one of them.
        memory_mib: peak of the device (of the process on a CPU).
        step_flops: floating-point operations of one step (a batch), forward and backward.
        losses: (step, loss on the validation cases).
        trivial_loss: what the loss is where nothing is learned; NaN where a method has no such number.
        loss_label: what the loss is.
        picture: the last picture of the method's task, relative to the output folder.
    """

    method: str
    seed: int
    folder: Path
    steps: int
    parameters: int
    seconds: float
    seconds_per_step: float
    memory_mib: float
    step_flops: float
    losses: tuple[tuple[int, float], ...]
    trivial_loss: float
    loss_label: str
    picture: Path | None


@dataclass(frozen=True)
class Results:
    """All that has been measured so far.

    Attributes:
        methods: in the order of the configuration.
        datasets: in the order of the configuration.
        evaluated: fine-tuned models.
        pretrained: pre-trained models; methods from scratch have none.
        planned: how many of both there are when all is finished. Two methods of the same settings share a run, which
            counts for each.
        seen: test cases whose images (not labels) a pre-training has seen, of each data set that has such.
    """

    methods: tuple[str, ...]
    datasets: tuple[str, ...]
    evaluated: tuple[EvaluatedCell, ...]
    pretrained: tuple[PretrainedCell, ...]
    planned: int
    seen: Mapping[str, int] = field(default_factory=dict)
