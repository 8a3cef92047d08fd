"""What a step of a comparison costs."""

from __future__ import annotations

from pathlib import Path

from s3d.comparison.step_cost import finetuning_step_flops, step_flops
from s3d.model import preset_shape
from s3d.pretext.masked_autoencoder import MaskedAutoencoder
from s3d.pretrain_config import PretrainConfig


def counted(ratio: float | tuple[float, float], seed: int) -> float:
    config = PretrainConfig(
        output_dir=Path("run"),
        volumes=Path("volumes"),
        preset="tiny",
        patch_size=(32, 32, 32),
        mask_block=8,
        mask_ratio=ratio,
        batch_size=2,
        seed=seed,
    )
    return step_flops(MaskedAutoencoder(config), config)


def test_operations_of_drawn_ratios_are_those_of_their_mean() -> None:
    wanted = counted(0.75, seed=0)
    for seed in (0, 2):  # of masks, which ratios of a range are drawn with
        assert abs(counted((0.6, 0.9), seed) / wanted - 1) < 0.03


def test_operations_of_fine_tuning_are_counted_without_computing() -> None:
    # Computed, these would take minutes and 20 GB.
    assert abs(finetuning_step_flops(preset_shape("resenc-l"), (160, 160, 160), 1, 3) / 8.07e12 - 1) < 0.01
