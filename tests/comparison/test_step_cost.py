"""What a step costs: operations by hand, seconds and memory from a log."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from small_runs import configure

from s3d.comparison.step_cost import finetuning_step_flops, measured_steps, step_flops, trained_parameters
from s3d.model import PRESETS, preset_shape
from s3d.pretext.masked_autoencoder import MaskedAutoencoder


def test_from_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    # Rows of two steps each, one of validation between them.
    log.write_text("step,loss,samples_per_second,memory_mib\n2,1,1,10\n2,,,\n4,1,2,30\n6,1,4,20\n")
    found = measured_steps(log, batch_size=4)
    assert found.steps == 6
    assert found.seconds == 2 * 4 + 2 * 2 + 2 * 1
    assert found.seconds_per_step == 2
    assert found.memory_mib == 30
    assert measured_steps(log, batch_size=4, first=4).seconds_per_step == 1


def test_operations_of_pretraining(tmp_path: Path) -> None:
    config = configure(None, tmp_path, volumes=Path("a"), batch_size=1, mask_ratio=0.75)

    def count(**changes: object) -> float:
        changed = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
        return step_flops(MaskedAutoencoder(changed), changed)

    assert count(batch_size=3) == 3 * count()
    # More is masked: less is computed; a range is as its mean.
    assert count(mask_ratio=0.9) < count() < count(mask_ratio=0.5)
    assert count(mask_ratio=(0.6, 0.9)) == count()
    dense = count(sparse=False, mask_tokens=False, densify=False)
    assert dense > 1.5 * count()


def test_operations_of_finetuning() -> None:
    shape = preset_shape("tiny")
    one, two = (finetuning_step_flops(shape, (16, 16, 16), 1, classes) for classes in (2, 3))
    # A class more: heads of all resolutions, forward and backward of weight and features. The coarsest of the three
    # does not exist, as a decoder begins one stage above it.
    voxels, channels = (16**3, 8**3), PRESETS["tiny"].features[:2]
    assert two - one == pytest.approx(sum(3 * 2 * n * c for n, c in zip(voxels, channels)))


def test_trained_parameters(tmp_path: Path) -> None:
    pretext = MaskedAutoencoder(configure(None, tmp_path, volumes=Path("a")))
    model = pretext.build_model()
    frozen = sum(weight.numel() for weight in model.unet.decoder.seg_layers[:-1].parameters())
    assert trained_parameters(pretext) == sum(weight.numel() for weight in model.parameters()) - frozen
