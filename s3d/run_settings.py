"""Settings that every training run has, and what they must fulfil."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class RunSettings(ABC):
    """What pre-training and fine-tuning runs share."""

    output_dir: Path
    """Folder of the run. If it holds a checkpoint of the same settings, the run goes on from there."""
    steps: int = 250_000
    """Optimiser steps."""
    batch_size: int = 6
    """Patches per step, over all processes."""
    accumulate: int | None = None
    """Parts into which a process cuts its patches of a step, one after the other; None: as few as memory allows."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, as published, or AdamW."""
    momentum: float = 0.99
    """Nesterov momentum of SGD."""
    weight_decay: float | None = None
    """L2 penalty of SGD, decoupled decay of AdamW. Default: 3e-5 for SGD (published), 0.05 for AdamW."""
    gradient_clip: float = 12.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights too, such as 0.999; 0: none."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the network under autocast; weights stay float32. float16 scales the loss."""
    compile: bool = False
    """torch.compile the network."""
    device: str = "auto"
    """cuda, cpu, ...; auto: cuda where there is one. Under torchrun each process takes the GPU of its local rank."""
    workers: int = 2
    """Processes that read patches, for each process that trains; 0: none."""
    seed: int = 0
    """Of weights, patches, masks and the split."""
    validate_every: int = 2_500
    """Steps between validations, with pictures."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints; there is always one at the end, also when the run is stopped by a signal."""
    log_every: int = 1
    """Steps between rows of the log."""
    resume: str = "auto"
    """auto: go on from the newest readable checkpoint in the output folder; never: refuse a folder that has one; or the
    path of a checkpoint of the same settings, to begin from where the folder has none."""
    max_skipped: int = 10
    """Steps in a row that are skipped and recorded because loss or gradient are not finite; one more stops the run."""

    # A resumed run may differ in these without becoming another run: samples and gradients (up to rounding) stay.
    resumable_fields: ClassVar[frozenset[str]] = frozenset(
        """output_dir accumulate compile device workers validate_every checkpoint_every log_every resume
        max_skipped""".split()
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "seed", "decay", "max_skipped"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{name.replace('decay', 'weight_decay')} must be at least 0, got {getattr(self, name)}"
                )
        if self.accumulate is not None and (self.accumulate < 1 or self.batch_size % self.accumulate):
            raise ValueError(f"accumulate must divide batch_size={self.batch_size}, got {self.accumulate}")
        for name in ("peak_learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name.removeprefix('peak_')} must be positive, got {getattr(self, name)}")
        for name in ("momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    @abstractmethod
    def peak_learning_rate(self) -> float:
        """The largest of the run."""

    @abstractmethod
    def learning_rate_at(self, step: int) -> float:
        """Of a step.

        Args:
            step: steps done before it.
        """

    @property
    def decay(self) -> float:
        """The given weight decay or the usual one of the optimiser."""
        return {"sgd": 3e-5, "adamw": 0.05}[self.optimizer] if self.weight_decay is None else self.weight_decay

    def plain(self) -> dict[str, Any]:
        """The settings as plain JSON types, defaults that depend on others worked out."""
        values = {
            **dataclasses.asdict(self),
            "learning_rate": self.peak_learning_rate,
            "weight_decay": self.decay,
        }
        return _plain(values)

    def check_same_run(self, saved: dict[str, Any]) -> None:
        """Settings that make another run are refused, or a resumed run would silently be two.

        Args:
            saved: plain settings of the run in the folder.
        Raises:
            ValueError: names what differs.
        """
        # Settings that the version which began the run did not know were what is now their default.
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.default is not MISSING}
        before = {**_plain(defaults), **saved}
        different = [
            f"{name} (was {before[name]!r}, is {value!r})"
            for name, value in self.plain().items()
            if name not in self.resumable_fields and before[name] != value
        ]
        if different:
            raise ValueError(
                f"output_dir {self.output_dir} holds a run with other settings: {', '.join(different)}. "
                "Give the same settings to go on with it, or another output_dir."
            )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(values, default=str)))
