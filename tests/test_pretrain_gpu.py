"""Pre-training on a GPU: every arithmetic trains and resumes, parts change nothing, memory is as predicted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import configure, losses, stopped_at

from s3d.memory_model import step_memory
from s3d.pretrain import pretrain
from s3d.training_log import read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_stops_and_resumes(precision: str, images: Path, tmp_path: Path) -> None:
    settings = {"device": "cuda", "precision": precision, "workers": 1}
    whole = pretrain(configure(images, tmp_path / "whole", **settings))
    config = configure(images, tmp_path / "stopped", **settings)
    assert stopped_at(config, 3).steps == 3
    assert pretrain(config).final_loss == pytest.approx(whole.final_loss, rel=1e-2)
    assert np.isfinite(losses(config.output_dir)).all()
    assert losses(config.output_dir) == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)


def test_a_gpu_trains_like_a_cpu(images: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        pretrain(configure(images, tmp_path / device, device=device))
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2)


@pytest.mark.parametrize("change", [{"accumulate": 2}, {"checkpoint_activations": True}, {"compile": True}], ids=str)
def test_what_saves_memory_or_time_changes_nothing(change: dict[str, object], images: Path, tmp_path: Path) -> None:
    pretrain(configure(images, tmp_path / "plain", device="cuda"))
    pretrain(configure(images, tmp_path / "changed", device="cuda", **change))
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-2)


def test_memory_is_at_most_what_was_predicted(images: Path, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    config = configure(
        images, tmp_path / "run", device="cuda", preset="small", patch_size=(96, 96, 96), mask_block=16, steps=2
    )
    pretrain(config)
    taken = max(row["memory_mib"] for row in read_log(config.output_dir / "log.csv") if "loss" in row)
    expected = step_memory(config, torch.device("cuda")).total(config.batch_size) / 2**20
    assert 0.3 * expected < taken < 1.1 * expected
