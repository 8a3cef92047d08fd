"""Training and validation patches from a store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from s3d.data.augment import SpatialAugmentation, SpatialTransform
from s3d.data.store import VolumeStore

# Keep the random numbers of epochs and of samples apart.
EPOCH_STREAM = 0
SAMPLE_STREAM = 1


class Sample(TypedDict):
    """One training sample."""

    image: Tensor  # float32 [1, D, H, W]
    case: str


class PatchDataset(Dataset[Sample]):
    """Random patches of the volumes of a store; sample `i` is the `i`-th of the whole training run.

    A sample is a pure function of (seed, i): no global random state, and nothing to save. A run that goes on after
    k samples reads samples k, k + 1, ... (`DataLoader(dataset, sampler=range(k, len(dataset)))`) and gets what it
    would have got; several processes share a run by taking every n-th.

    An epoch is `len(cases)` samples, a permutation of the cases, so that each is visited equally often. The place of
    a patch is uniform over all places where it lies within the volume. Where the volume is smaller than the patch,
    the patch is centred, and what it shows outside the volume is the volume's background (its minimum); so is what
    a rotated or enlarged patch shows there.

    Args:
        store: where the volumes are.
        cases: positions in `store.cases` to draw from; None takes all.
        patch_size: voxels (depth, height, width).
        seed: 0 or more.
        augmentation: None shows the patches as they are.
        length: number of samples of the run.
    Raises:
        ValueError: an argument is out of range; says which.
    """

    def __init__(
        self,
        store: VolumeStore,
        cases: Sequence[int] | None,
        patch_size: Sequence[int],
        *,
        seed: int,
        augmentation: SpatialAugmentation | None,
        length: int,
    ) -> None:
        self.store = store
        self.cases = tuple(range(len(store)) if cases is None else cases)
        if not self.cases or not all(0 <= case < len(store) for case in self.cases):
            raise ValueError(f"cases must be one or more of 0 to {len(store) - 1}, got {list(self.cases)}")
        self.patch_size = _check_patch_size(patch_size)
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if length < 1:
            raise ValueError(f"length must be 1 or more, got {length}")
        self.seed = seed
        self.augmentation = augmentation
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < self.length:
            raise IndexError(f"sample {i} of {self.length}")
        case = self._case_of(i)
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, SAMPLE_STREAM, i]))
        record = self.store.cases[case]
        start = [
            int(rng.integers(side - length + 1)) if side >= length else centre
            for side, length, centre in zip(record.shape, self.patch_size, _centred(record.shape, self.patch_size))
        ]
        transform = SpatialTransform() if self.augmentation is None else self.augmentation.draw(rng)
        if transform.interpolates:
            patch = _read_transformed(self.store, case, start, self.patch_size, transform)
        else:
            patch = _read_padded(self.store, case, start, self.patch_size)
        mirrored = [axis for axis, mirror in enumerate(transform.mirror) if mirror]
        return {"image": patch.flip(mirrored)[None], "case": record.name}

    def _case_of(self, i: int) -> int:
        epoch, place = divmod(i, len(self.cases))
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, EPOCH_STREAM, epoch]))
        return self.cases[int(rng.permutation(len(self.cases))[place])]


def validation_patch(store: VolumeStore, case: int, patch_size: Sequence[int]) -> Tensor:
    """The patch in the middle of a volume, padded with background where the volume is smaller.

    Args:
        store: where the volumes are.
        case: position in `store.cases`.
        patch_size: voxels (depth, height, width).
    Returns: float32 [1, D, H, W].
    Raises:
        IndexError: there is no such case.
        ValueError: `patch_size` is not three positive whole numbers.
    """
    if not 0 <= case < len(store):
        raise IndexError(f"case must be 0 to {len(store) - 1}, got {case}")
    size = _check_patch_size(patch_size)
    return _read_padded(store, case, _centred(store.cases[case].shape, size), size)[None]


def split_cases(store: VolumeStore, validation_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits the cases of a store in two, by a hash of their names.

    Which half a case falls into depends on its name and the seed, not on the order or place of the files, and few
    cases change sides when some are added. Images of one person are separate cases: where they must stay together,
    pass such lists of your own to `PatchDataset`.

    Args:
        store: where the volumes are.
        validation_fraction: in [0, 1); of 2 or more cases each side gets at least one, unless the fraction is 0.
        seed: another seed, another split.
    Returns: training and validation cases, ascending positions in `store.cases`. One case alone is for training.
    Raises:
        ValueError: `validation_fraction` is out of range.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be within [0, 1), got {validation_fraction}")
    total = len(store)
    count = 0
    if validation_fraction > 0 and total >= 2:
        count = min(max(round(validation_fraction * total), 1), total - 1)

    def rank(case: int) -> bytes:
        return hashlib.sha256(f"{seed}/{store.cases[case].name}".encode()).digest()

    validation = sorted(sorted(range(total), key=rank)[:count])
    return sorted(set(range(total)) - set(validation)), validation


def _check_patch_size(patch_size: Sequence[int]) -> tuple[int, int, int]:
    sizes = tuple(patch_size)
    if len(sizes) != 3 or not all(isinstance(side, (int, np.integer)) and side >= 1 for side in sizes):
        raise ValueError(f"patch_size must be three positive whole numbers, got {patch_size!r}")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def _centred(volume_shape: Sequence[int], patch_size: Sequence[int]) -> list[int]:
    """First voxel of the centred patch; negative where the patch is larger than the volume."""
    return [(side - length) // 2 for side, length in zip(volume_shape, patch_size)]


def _read_padded(store: VolumeStore, case: int, start: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    """The patch [D, H, W] at `start`, which may lie partly outside the volume."""
    record = store.cases[case]
    low = [max(first, 0) for first in start]
    high = [min(first + length, side) for first, length, side in zip(start, patch_size, record.shape)]
    inside = store.read(case, low, [after - before for before, after in zip(low, high)])
    if inside.shape == tuple(patch_size):
        return torch.from_numpy(inside)
    patch = np.full(patch_size, record.background, dtype=np.float32)
    patch[tuple(slice(a - first, b - first) for a, b, first in zip(low, high, start))] = inside
    return torch.from_numpy(patch)


def _read_transformed(
    store: VolumeStore, case: int, start: Sequence[int], patch_size: Sequence[int], transform: SpatialTransform
) -> Tensor:
    """The rotated and scaled patch [D, H, W] around the centre of the plain one."""
    record = store.cases[case]
    centre = [first + (length - 1) / 2 for first, length in zip(start, patch_size)]
    region_start, region_shape = transform.source_region(centre, patch_size, record.shape)
    region = torch.from_numpy(store.read(case, region_start, region_shape))
    return transform.resample(region, region_start, centre, patch_size, record.background)
