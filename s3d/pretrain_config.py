"""Settings of a pre-training run, and what they must fulfil."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from s3d_kernels.backends import check_name as check_backend

from .model import PRESETS, Preset
from .pretext.registry import METHODS
from .run_settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunSettings):
    """Settings of a pre-training run; the defaults are the published ones."""

    volumes: Path | None = None
    """Folder that `s3d preprocess` has filled."""
    images: tuple[str, ...] = ()
    """Or images, to be preprocessed into `volumes` in the output folder: whatever `s3d preprocess` accepts."""
    machine: str = "published"
    """Defaults of the other options: published, laptop, gpu-24gb, gpu-80gb or eight-gpus."""

    method: str = "s3d"
    """What is learned: s3d, or a method to compare it with, see docs/pretext.md."""
    preset: str = "resenc-l"
    """Architecture and size of the network: resenc-l, resenc-s, small, tiny, or of another architecture, see
    docs/pretext.md."""
    sparse: bool = True
    """Sparse convolution and normalisation in the encoder; False: dense MAE."""
    mask_tokens: bool = True
    """Fill masked positions of the skip features with learned tokens."""
    densify: bool = True
    """A convolution on the filled features of each stage but the first."""

    patch_size: tuple[int, int, int] = (160, 160, 160)
    """Voxels of a training patch."""
    mask_block: int = 32
    """Side of a masked block in voxels; a multiple of the network's total stride."""
    mask_ratio: float | tuple[float, float] = 0.75
    """Masked share of the blocks, or a range such as 0.6 0.9 from which it is drawn."""
    ratio_per: Literal["sample", "batch"] = "sample"
    """Whether a ratio is drawn from the range for every sample or one for the batch."""

    learning_rate: float | None = None
    """The largest, behind the warm-up; then it decays as (1 - step / steps) ** 0.9. Default: 1e-2 for SGD (published),
    1e-4 for AdamW."""
    warmup_steps: int = 0
    """Steps in which the learning rate grows linearly from nearly 0."""
    checkpoint_activations: bool = False
    """Compute the activations inside each stage again in backward, instead of keeping them: less memory, more time."""
    shortcuts: bool = True
    """Leave out of densification and decoder what is known beforehand; False computes all of it, to the same result."""

    spacing_mm: float = 1.0
    """Voxel size that `images` are resampled to."""
    skip_bad: bool = False
    """Record and skip `images` that cannot be used, instead of stopping at the first."""
    augment: bool = True
    """Random rotation, scaling and mirroring."""
    foreground: float = 0.0
    """Share of the patches whose centre is drawn from the foreground; the others lie anywhere."""
    validation_fraction: float = 0.05
    """Share of the images kept for validation (at least one where there are two); up to 64 of them are used."""

    backend: str = "auto"
    """Backend of s3d_kernels."""
    resumable_fields: ClassVar[frozenset[str]] = RunSettings.resumable_fields | {
        # The volumes are compared one by one, wherever they come from.
        *("volumes", "images", "skip_bad", "machine", "checkpoint_activations", "shortcuts"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {self.preset!r}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method != "s3d":
            for name in ("sparse", "mask_tokens", "densify", "checkpoint_activations", "shortcuts"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name} goes with method s3d, not with {self.method}; leave it out")
        METHODS[self.method].check(self)
        stride = self.size.total_stride
        if any(side < stride or side % stride for side in self.patch_size):
            raise ValueError(
                f"patch_size must be a multiple of {stride}, the total stride of {self.preset}, got {self.patch_size}"
            )
        if all(side == stride for side in self.patch_size):
            # The network would have one voxel at its lowest resolution, which norms make zero.
            raise ValueError(
                f"patch_size must be larger than {stride}, the total stride of {self.preset}, along an axis, "
                f"got {self.patch_size}"
            )
        if self.machine not in MACHINES:
            raise ValueError(f"machine must be one of {', '.join(MACHINES)}, got {self.machine!r}")
        check_backend(self.backend)
        if not self.spacing_mm > 0:
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {self.validation_fraction}")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"foreground must be in [0, 1], got {self.foreground}")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must be in [0, steps={self.steps}), got {self.warmup_steps}")
        if self.volumes is not None and self.images:
            raise ValueError(f"give volumes or images, not both; got {self.volumes} and {', '.join(self.images)}")

    @property
    def size(self) -> Preset:
        """Of the network."""
        return PRESETS[self.preset]

    @property
    def peak_learning_rate(self) -> float:
        """The given learning rate or the usual one of the optimiser."""
        return {"sgd": 1e-2, "adamw": 1e-4}[self.optimizer] if self.learning_rate is None else self.learning_rate

    def learning_rate_at(self, step: int) -> float:
        """Of a step: linear warm-up, then polynomial decay to 0.

        Args:
            step: steps done before it.
        """
        if step < self.warmup_steps:
            return self.peak_learning_rate * (step + 1) / (self.warmup_steps + 1)
        rest = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.peak_learning_rate * (1 - rest) ** 0.9


# What differs from the published settings on a kind of machine.
MACHINES: dict[str, dict[str, Any]] = {
    "published": {},
    # A first impression on two cores in half an hour.
    "laptop": {
        "preset": "small",
        "patch_size": (64, 64, 64),
        "mask_block": 8,
        "batch_size": 2,
        "steps": 2_000,
        "validate_every": 250,
        "checkpoint_every": 100,
        "momentum": 0.9,
    },
    # The published run; what fits decides into how many parts a step is cut.
    "gpu-24gb": {"precision": "bfloat16", "workers": 8},
    "gpu-80gb": {"precision": "bfloat16", "workers": 12},
    # As many patches as published, in an eighth of the steps; a learning rate that grows with the root of the batch.
    "eight-gpus": {
        "precision": "bfloat16",
        "workers": 8,
        "batch_size": 48,
        "steps": 31_250,
        "learning_rate": 2.8e-2,
        "warmup_steps": 1_000,
        "validate_every": 500,
        "checkpoint_every": 250,
    },
}


def machine_config(machine: str, **settings: Any) -> PretrainConfig:
    """Settings with the defaults of a kind of machine.

    Args:
        machine: see ``MACHINES``.
        settings: fields of ``PretrainConfig`` that are to be otherwise.
    Raises:
        ValueError: no such kind; or a setting is out of range.
    """
    if machine not in MACHINES:
        raise ValueError(f"machine must be one of {', '.join(MACHINES)}, got {machine!r}")
    return PretrainConfig(**{**MACHINES[machine], "machine": machine, **settings})
