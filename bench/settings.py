"""What a benchmark run was asked for; filled from the command line by conftest.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        measure: False: run once, tiny, to see that it works.
        preset: of the network, see ``s3d.model.PRESETS``.
        patch_size: voxels along each axis.
        block: side of a masked block in voxels.
        mask_ratios: to measure at.
        contenders: names from ``contenders.CONTENDERS``.
        rounds: timed rounds of each case, after one that is not counted.
    """

    measure: bool
    preset: str
    patch_size: int
    block: int
    mask_ratios: tuple[float, ...]
    contenders: tuple[str, ...]
    rounds: int
