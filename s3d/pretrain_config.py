"""Settings of a pre-training run, and what they must fulfil."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from s3d_kernels.backends import check_name as check_backend

from .model import PRESETS


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pre-training run; the defaults are the published ones."""

    output_dir: Path
    """Folder of the run. If it holds a checkpoint of the same settings, the run goes on from there."""
    volumes: Path | None = None
    """Folder that `s3d preprocess` has filled."""
    images: tuple[str, ...] = ()
    """Or images, to be preprocessed into `volumes` in the output folder: whatever `s3d preprocess` accepts."""
    machine: str = "published"
    """Defaults of the other options: published, laptop, gpu-24gb, gpu-80gb or eight-gpus."""

    preset: str = "resenc-l"
    """Size of the network: resenc-l, resenc-s, small or tiny."""
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

    steps: int = 250_000
    """Optimiser steps."""
    batch_size: int = 6
    """Patches per step, over all processes."""
    accumulate: int | None = None
    """Parts into which a process cuts its patches of a step, one after the other; None: as few as memory allows."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, as published, or AdamW."""
    learning_rate: float | None = None
    """The largest, behind the warm-up; then it decays as (1 - step / steps) ** 0.9. Default: 1e-2 for SGD (published),
    1e-4 for AdamW."""
    warmup_steps: int = 0
    """Steps in which the learning rate grows linearly from nearly 0."""
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
    checkpoint_activations: bool = False
    """Compute the activations inside each stage again in backward, instead of keeping them: less memory, more time."""
    compile: bool = False
    """torch.compile the network."""

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

    device: str = "auto"
    """cuda, cpu, ...; auto: cuda where there is one. Under torchrun each process takes the GPU of its local rank."""
    backend: str = "auto"
    """Backend of s3d_kernels."""
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

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {self.preset!r}")
        stride = PRESETS[self.preset].total_stride
        if self.mask_block < 1 or self.mask_block % stride:
            raise ValueError(
                f"mask_block must be a multiple of {stride}, the total stride of {self.preset}, got {self.mask_block}"
            )
        if any(side < self.mask_block or side % self.mask_block for side in self.patch_size):
            raise ValueError(f"patch_size must be a multiple of mask_block={self.mask_block}, got {self.patch_size}")
        low, high = self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio,) * 2
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_ratio must be in (0, 1) or an increasing pair of such, got {self.mask_ratio}")
        cells = math.prod(side // self.mask_block for side in self.patch_size)
        if low * cells + 1e-9 < 1:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} of the {cells} blocks that patch_size {self.patch_size} and mask_block "
                f"{self.mask_block} make masks none; there would be nothing to learn"
            )
        if (self.mask_tokens and not self.sparse) or (self.densify and not self.mask_tokens):
            raise ValueError(
                "mask_tokens needs sparse, and densify needs mask_tokens, got "
                f"sparse={self.sparse}, mask_tokens={self.mask_tokens}, densify={self.densify}"
            )
        if self.machine not in MACHINES:
            raise ValueError(f"machine must be one of {', '.join(MACHINES)}, got {self.machine!r}")
        check_backend(self.backend)
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.accumulate is not None and (self.accumulate < 1 or self.batch_size % self.accumulate):
            raise ValueError(f"accumulate must divide batch_size={self.batch_size}, got {self.accumulate}")
        for name in ("peak_learning_rate", "gradient_clip", "spacing_mm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name.removeprefix('peak_')} must be positive, got {getattr(self, name)}")
        for name in ("workers", "seed", "decay", "max_skipped"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{name.replace('decay', 'weight_decay')} must be at least 0, got {getattr(self, name)}"
                )
        for name in ("momentum", "validation_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"foreground must be in [0, 1], got {self.foreground}")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps must be in [0, steps={self.steps}), got {self.warmup_steps}")
        if self.volumes is not None and self.images:
            raise ValueError(f"give volumes or images, not both; got {self.volumes} and {', '.join(self.images)}")

    @property
    def peak_learning_rate(self) -> float:
        """The given learning rate or the usual one of the optimiser."""
        return {"sgd": 1e-2, "adamw": 1e-4}[self.optimizer] if self.learning_rate is None else self.learning_rate

    @property
    def decay(self) -> float:
        """The given weight decay or the usual one of the optimiser."""
        return {"sgd": 3e-5, "adamw": 0.05}[self.optimizer] if self.weight_decay is None else self.weight_decay

    def learning_rate_at(self, step: int) -> float:
        """Of a step: linear warm-up, then polynomial decay to 0.

        Args:
            step: steps done before it.
        """
        if step < self.warmup_steps:
            return self.peak_learning_rate * (step + 1) / (self.warmup_steps + 1)
        rest = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.peak_learning_rate * (1 - rest) ** 0.9

    def plain(self) -> dict[str, Any]:
        """The settings as plain JSON types, defaults that depend on others worked out."""
        values = {
            **dataclasses.asdict(self),
            "learning_rate": self.peak_learning_rate,
            "weight_decay": self.decay,
        }
        return dict(json.loads(json.dumps(values, default=str)))

    def check_same_run(self, saved: dict[str, Any], folder: Path) -> None:
        """Settings that make another run are refused, or a resumed run would silently be two.

        Args:
            saved: plain settings of the run in the folder.
            folder: of the run.
        Raises:
            ValueError: names what differs.
        """
        # Settings that the version which began the run did not know were what is now their default.
        before = {**PretrainConfig(output_dir=folder).plain(), **saved}
        different = [
            f"{name} (was {before[name]!r}, is {value!r})"
            for name, value in self.plain().items()
            if name not in RESUMABLE_FIELDS and before[name] != value
        ]
        if different:
            raise ValueError(
                f"output_dir {folder} holds a run with other settings: {', '.join(different)}. "
                "Give the same settings to go on with it, or another output_dir."
            )


# A resumed run may differ in these without becoming another run: samples, masks and gradients (up to rounding) stay.
# Its volumes are compared one by one, wherever they come from.
RESUMABLE_FIELDS = frozenset(
    """output_dir volumes images skip_bad machine accumulate checkpoint_activations compile device workers
    validate_every checkpoint_every log_every resume max_skipped""".split()
)

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
