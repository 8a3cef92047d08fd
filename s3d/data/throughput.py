"""How fast patches come out of a store, and how much is decompressed for them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from s3d.data.augment import SpatialAugmentation
from s3d.data.patches import PatchDataset
from s3d.data.store import VolumeStore, decompressed_voxels


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
    """Draws random patches for some time in this process, on one thread, as a worker of a data loader does.

    Files that were just written or read come from memory; a first pass over data that lies on a disk is slower.

    Args:
        folder: of a store.
        patch_size: voxels (depth, height, width).
        augmented: with the default `SpatialAugmentation`.
        seconds: how long to measure; at least 3 patches are drawn.
    """
    store = _CountingStore(folder)
    dataset = PatchDataset(
        store,
        None,
        patch_size,
        seed=seed,
        augmentation=SpatialAugmentation() if augmented else None,
        length=1_000_000,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dataset[0]  # what is made on first use is not measured
        store.decompressed = 0
        cases: list[str] = []
        begin = time.perf_counter()
        while len(cases) < 3 or time.perf_counter() - begin < seconds:
            cases.append(dataset[1 + len(cases)]["case"])
        elapsed = time.perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    shapes = {case.name: case.shape for case in store.cases}
    size = dataset.patch_size
    shown = sum(math.prod(map(min, size, shapes[case])) for case in cases)
    return LoaderSpeed(size, augmented, len(cases), len(cases) / elapsed, store.decompressed / shown)


class _CountingStore(VolumeStore):
    """Counts the voxels that are decompressed."""

    decompressed = 0

    def read(
        self, case: int, start: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        region = super().read(case, start, shape)
        self.decompressed += decompressed_voxels(start or (0, 0, 0), region.shape, self.cases[case].shape)
        return region
