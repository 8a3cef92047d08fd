"""Fine-tuning and inference on a GPU: every arithmetic trains and resumes, and the answers are those of a CPU."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from small_dataset import write_dataset

from s3d.memory_model import dense_step_memory
from s3d.segmentation.finetune import finetune
from s3d.segmentation.finetune_config import FinetuneConfig
from s3d.segmentation.metrics import dice
from s3d.segmentation.predict import PredictConfig, load_segmentation, predict
from s3d.training_log import read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def configure(folder: Path, device: str, **changes: object) -> FinetuneConfig:
    dataset = folder / "Dataset001_Balls"
    if not dataset.exists():
        write_dataset(dataset, cases=4)
    settings: dict[str, object] = {
        "dataset": dataset,
        "output_dir": folder / device,
        "fold": "all",
        "preset": "tiny",
        "patch_size": (12, 16, 12),
        "steps": 6,
        "learning_rate": 0.05,
        "momentum": 0.9,
        "workers": 1,
        "device": device,
    }
    return FinetuneConfig(**{**settings, **changes})  # type: ignore[arg-type]


def losses(config: FinetuneConfig) -> list[float]:
    return [row["loss"] for row in read_log(config.output_dir / "log.csv") if "loss" in row]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_gpu_trains_like_a_cpu(precision: str, tmp_path: Path) -> None:
    cpu, gpu = configure(tmp_path, "cpu"), configure(tmp_path, "cuda", precision=precision)
    finetune(cpu)
    finetune(gpu)
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-2 if precision == "float32" else 5e-2)


def test_predictions_are_those_of_a_cpu(tmp_path: Path) -> None:
    config = configure(tmp_path, "cuda", steps=40)
    checkpoint = finetune(config).checkpoint
    for device in ("cpu", "cuda"):
        images = config.dataset / "imagesTr"
        predict(
            PredictConfig(checkpoint, images=images, output_dir=tmp_path / f"on-{device}", device=device, mirror=True)
        )
    for file in sorted((tmp_path / "on-cpu").glob("*.nii.gz")):
        maps = [np.asarray(nib.load(tmp_path / f"on-{device}" / file.name).dataobj) for device in ("cpu", "cuda")]
        assert np.nanmin(dice(maps[1], maps[0], 3)) > 0.99


def test_memory_is_at_most_what_was_predicted(tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    config = configure(tmp_path, "cuda", preset="small", patch_size=(96, 96, 96), steps=2, augment=False)
    plan, network = load_segmentation(finetune(config).checkpoint)
    taken = max(row["memory_mib"] for row in read_log(config.output_dir / "log.csv") if "loss" in row)
    expected = dense_step_memory(config, network, plan.network, plan.patch_size).total(config.batch_size) / 2**20
    assert 0.3 * expected < taken < 1.1 * expected
