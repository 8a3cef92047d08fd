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
from s3d.segmentation.predict import PredictConfig, load_segmentation, predict
from s3d.segmentation.prepared_case import prepare_case
from s3d.segmentation.raw_dataset import find_cases
from s3d.segmentation.restoring import restore
from s3d.segmentation.windows import predict_logits
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


# Of logits whose mean is 2.6: some ten times what multiplying in TF32 instead of float32 changes in this network.
NEAR = 0.02


def test_predictions_are_those_of_a_cpu(tmp_path: Path) -> None:
    """Every voxel has the class that it has on a CPU, but where two classes are so near that rounding decides."""
    config = configure(tmp_path, "cuda", steps=40)
    checkpoint = finetune(config).checkpoint
    images = config.dataset / "imagesTr"
    for device in ("cpu", "cuda"):
        predict(
            PredictConfig(checkpoint, images=images, output_dir=tmp_path / f"on-{device}", device=device, mirror=True)
        )
    plan, network = load_segmentation(checkpoint)
    for case in find_cases(images, 1, plan.file_ending):
        prepared = prepare_case(case, plan)
        voxels = torch.from_numpy(prepared.voxels)
        logits = predict_logits(
            network.eval(), voxels, plan.patch_size, overlap=0.5, mirror=True, device=torch.device("cpu"), batch=1
        )
        cpu, cuda = (
            np.asarray(nib.load(tmp_path / f"on-{device}" / f"{case.name}.nii.gz").dataobj)
            for device in ("cpu", "cuda")
        )
        decided = np.ones(cpu.shape, bool)
        for favoured in torch.eye(len(logits)).mul(NEAR)[..., None, None, None]:
            decided &= restore(logits + favoured, prepared.grid, case.images[0]) == cpu
        assert decided.mean() > 0.99
        assert np.array_equal(cuda[decided], cpu[decided])


def test_memory_is_at_most_what_was_predicted(tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    config = configure(tmp_path, "cuda", preset="small", patch_size=(96, 96, 96), steps=2, augment=False)
    plan, network = load_segmentation(finetune(config).checkpoint)
    taken = max(row["memory_mib"] for row in read_log(config.output_dir / "log.csv") if "loss" in row)
    expected = dense_step_memory(config, network, plan.network, plan.patch_size).total(config.batch_size) / 2**20
    assert 0.3 * expected < taken < 1.1 * expected
