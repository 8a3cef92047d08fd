"""How fast patches come out of a store, and how much is decompressed for them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from s3d.data.augment import SpatialAugmentation
from s3d.data.patches import PatchDataset
from s3d.data.store import VolumeStore, decompressed_voxels

PREFETCHED = 2
"""Patches that a worker has ready before the first is asked for."""


@dataclass(frozen=True)
class LoaderSpeed:
    """What one worker of a data loader does."""

    patch_size: tuple[int, int, int]
    augmented: bool
    patches: int  # measured
    patches_per_second: float
    read_amplification: float  # voxels decompressed / voxels of the volume that patches of this size can show

    @property
    def voxels_per_second(self) -> float:
        return self.patches_per_second * math.prod(self.patch_size)


def loader_speed(
    folder: str | Path, patch_size: Sequence[int], *, augmented: bool, seconds: float = 2.0, seed: int = 0
) -> LoaderSpeed:
    """Lets one worker process of a `DataLoader` draw random patches for some time.

    Files that were just written or read come from memory; a first pass over data that lies on a disk is slower.

    Args:
        folder: of a store.
        patch_size: voxels (depth, height, width).
        augmented: with the default `SpatialAugmentation`.
        seconds: how long to measure; at least 3 patches are drawn.
    """
    dataset = _CountedPatches(folder, patch_size, augmented, seed)
    batches = iter(DataLoader(dataset, batch_size=1, num_workers=1, prefetch_factor=PREFETCHED))
    for _ in range(PREFETCHED + 1):  # from here on a patch can be had when the worker is done with one
        next(batches)
    drawn: list[dict[str, Any]] = []
    begin = time.perf_counter()
    while len(drawn) < 3 or time.perf_counter() - begin < seconds:
        batch = next(batches)
        drawn.append({"case": batch["case"][0], "decompressed": int(batch["decompressed"])})
    elapsed = time.perf_counter() - begin

    size = dataset.patches.patch_size
    shapes = {case.name: case.shape for case in dataset.store.cases}
    shown = sum(math.prod(map(min, size, shapes[sample["case"]])) for sample in drawn)
    decompressed = sum(sample["decompressed"] for sample in drawn)
    return LoaderSpeed(size, augmented, len(drawn), len(drawn) / elapsed, decompressed / shown)


class _CountedPatches(Dataset[dict[str, Any]]):
    """Samples that say how many voxels were decompressed for them."""

    def __init__(self, folder: str | Path, patch_size: Sequence[int], augmented: bool, seed: int) -> None:
        self.store = _CountingStore(folder)
        augmentation = SpatialAugmentation() if augmented else None
        self.patches = PatchDataset(
            self.store, None, patch_size, seed=seed, augmentation=augmentation, length=1_000_000
        )

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.store.decompressed = 0
        return {**self.patches[i], "decompressed": self.store.decompressed}


class _CountingStore(VolumeStore):
    """Counts the voxels that are decompressed."""

    decompressed = 0

    def read(
        self, case: int, start: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        region = super().read(case, start, shape)
        self.decompressed += decompressed_voxels(start or (0, 0, 0), region.shape, self.cases[case].shape)
        return region
