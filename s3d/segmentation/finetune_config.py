"""Settings of a fine-tuning run, and what they must fulfil."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from s3d.checkpoint import Weights
from s3d.model import PRESETS
from s3d.run_settings import RunSettings

from .schedule import Schedule, ScheduleName, make_schedule
from .transfer import Scope


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunSettings):
    """Train a segmentation model on a labelled data set, from a pre-trained checkpoint or from scratch."""

    dataset: Path
    """Folder in nnU-Net's raw layout: imagesTr, labelsTr, dataset.json."""
    checkpoint: Path | None = None
    """Pre-trained weights (`s3d pretrain`, `s3d import` or `s3d finetune`); None: from scratch."""
    scope: Scope = "encoder+decoder"
    """What is transferred; published: encoder and decoder. The segmentation head always starts anew."""
    weights: Weights = "raw"
    """Of the checkpoint: raw, as trained, or ema, their moving average."""
    schedule: ScheduleName | None = None
    """Learning rate, and when the encoder is frozen. Default: sawtooth (published) with a checkpoint, else scratch."""
    learning_rate: float | None = None
    """The largest. Default: that of the schedule, 1e-2 from scratch and 1e-3 otherwise."""
    warmup_steps: int | None = None
    """Of each warm-up of the schedule. Default: 5 % of the steps (published: 12,500 of 250,000)."""

    preset: str | None = None
    """Size of the network. Default: that of the checkpoint; resenc-l from scratch."""
    patch: Literal["fixed", "dynamic"] = "fixed"
    """fixed: voxel size and patch of the pre-training, or as given; dynamic: planned from the data as nnU-Net does."""
    patch_size: tuple[int, int, int] | None = None
    """Of a fixed patch, in voxels. Default: that of the checkpoint; 160 160 160 from scratch."""
    spacing_mm: tuple[float, float, float] | None = None
    """Of a fixed patch: voxel size along the superior, anterior and right axis. Default: that of the checkpoint; 1 mm
    from scratch."""
    memory_gib: float = 8.0
    """Of a dynamic patch: memory that a step may take."""

    fold: int | Literal["all"] = 0
    """Which split to train on; all: every case, for validation too."""
    splits: Path | None = None
    """File of splits, as splits_final.json of nnU-Net. Default: that of the data set, or nnU-Net's own five folds."""
    cases: Path | None = None
    """Folder of prepared cases, which runs may share. Default: in the output folder."""
    skip_bad: bool = False
    """Record and skip cases that cannot be used, instead of stopping at the first."""
    prepare_only: bool = False
    """Only prepare the cases; needed once before several processes train."""

    batch_size: int = 2
    """Patches per step, over all processes."""
    augment: bool = True
    """Rotation, scaling, noise, blur, contrast, low resolution, gamma and mirroring, as in nnU-Net."""
    foreground: float = 1 / 3
    """Share of the patches that are centred on a voxel of a class."""
    deep_supervision: bool = True
    """Train the outputs of all resolutions, as nnU-Net does."""

    resumable_fields: ClassVar[frozenset[str]] = RunSettings.resumable_fields | {
        # The cases are compared one by one, wherever they come from.
        *("dataset", "splits", "cases", "skip_bad", "prepare_only"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {self.preset!r}")
        if self.patch == "dynamic" and (self.patch_size is not None or self.spacing_mm is not None):
            raise ValueError("patch_size and spacing_mm go with patch fixed; a dynamic patch is planned from the data")
        for name in ("patch_size", "spacing_mm"):
            given = getattr(self, name)
            if given is not None and not all(side > 0 for side in given):
                raise ValueError(f"{name} must be three positive numbers, got {given}")
        if not self.memory_gib > 0:
            raise ValueError(f"memory_gib must be positive, got {self.memory_gib}")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"foreground must be in [0, 1], got {self.foreground}")
        if self.checkpoint is None and self.schedule_name in ("sawtooth", "frozen"):
            raise ValueError(
                f"schedule {self.schedule_name} freezes the encoder, which makes sense with pre-trained weights only; "
                "give a checkpoint, or take schedule scratch"
            )
        for name, unused, goes_with in (
            ("scope", self.checkpoint is None, "a checkpoint"),
            ("weights", self.checkpoint is None, "a checkpoint"),
            ("splits", self.fold == "all", "the number of a fold"),
            ("memory_gib", self.patch == "fixed", "patch dynamic"),
        ):
            if unused and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} goes with {goes_with}; give that too, or leave {name} out")
        _ = self.learning_rates  # which checks what it is made from

    @property
    def case_folder(self) -> Path:
        """Where prepared cases are."""
        return self.cases or self.output_dir / "cases"

    @property
    def schedule_name(self) -> ScheduleName:
        """The given schedule, or the usual one."""
        return self.schedule or ("scratch" if self.checkpoint is None else "sawtooth")

    @functools.cached_property
    def learning_rates(self) -> Schedule:
        """The schedule of this run."""
        return make_schedule(self.schedule_name, self.steps, warmup_steps=self.warmup_steps, peak=self.learning_rate)

    @property
    def peak_learning_rate(self) -> float:
        """See `RunSettings`."""
        return self.learning_rates.peak

    def learning_rate_at(self, step: int) -> float:
        """See `RunSettings`."""
        return self.learning_rates.learning_rate(step)

    def plain(self) -> dict[str, Any]:
        """See `RunSettings`."""
        return {**super().plain(), "schedule": self.schedule_name}
