"""Runs of a few steps on small volumes that tests make themselves."""

import os
import signal
from pathlib import Path

import nibabel
import numpy as np
import pytest

from s3d.masking import MaskSampler
from s3d.pretrain import PretrainResult, pretrain
from s3d.pretrain_config import PretrainConfig
from s3d.training_log import read_log
from s3d_kernels import BlockMask


def write_images(folder: Path) -> Path:
    """Three smooth volumes of 40x36x44 voxels of 1 mm."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 36, 44)), indexing="ij")
    for number in range(3):
        waves = sum(np.sin(rng.uniform(2, 6) * axis + rng.uniform(0, 6)) for axis in axes)
        head = sum(axis**2 for axis in axes) < 1.2
        volume = np.where(head, 100 + 20 * waves, 0).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / f"head{number}.nii.gz")
    return folder


def configure(images: Path | None, output: Path, **changes: object) -> PretrainConfig:
    settings: dict[str, object] = {
        "images": () if images is None else (str(images),),
        "output_dir": output,
        "preset": "tiny",
        "patch_size": (32, 32, 32),
        "mask_block": 8,
        "batch_size": 2,
        "steps": 6,
        "momentum": 0.9,
        "validate_every": 3,
        "checkpoint_every": 100,
        "workers": 0,
        "device": "cpu",
    }
    return PretrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_log(output / "log.csv") if "loss" in row]


def stopped_at(config: PretrainConfig, step: int) -> PretrainResult:
    """Run until a stop signal arrives during this step."""
    original = MaskSampler.__call__

    def sample(self: MaskSampler, batch: int, *stream: int, **keywords: object) -> BlockMask:
        if stream == (0, step - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, *stream, **keywords)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskSampler, "__call__", sample)
        return pretrain(config)
