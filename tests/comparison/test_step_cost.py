"""What a step of a comparison costs."""

from __future__ import annotations

from pathlib import Path

from s3d.comparison.step_cost import step_flops
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
