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


class _Patch(TypedDict):
    image: Tensor  # float32 [1, D, H, W]
    case: str


class Sample(_Patch, total=False):
    """One training sample."""

    # There if and only if the store has anonymised regions. bool [1, D, H, W]: False where the image shows something
    # that was made unrecognisable, so that it is no target; padding counts as background, which is one.
    valid: Tensor


class PatchDataset(Dataset[Sample]):
    """Random patches of the volumes of a store; sample `i` is the `i`-th of the whole training run.

    A sample is a pure function of (seed, i): no global random state, and nothing to save. A run that goes on after
    k samples reads samples k, k + 1, ... (`DataLoader(dataset, sampler=range(k, len(dataset)))`) and gets what it
    would have got; several processes share a run by taking every n-th.

    An epoch is `len(cases)` samples, a permutation of the cases, so that each is visited equally often. The place of
    a patch is uniform over all places where it lies within the volume. Where the volume is smaller than the patch,
    the patch is centred, and what it shows outside the volume is the volume's background (its minimum); so is what
    a rotated or enlarged patch shows there.

    A share of the patches can be placed around voxels of the foreground instead (as close to the centre as the volume's
    border allows), for volumes that are mostly air. The voxels are drawn from those that preprocessing has remembered
    (`VolumeStore.foreground`), which costs no reading.

    Args:
        store: where the volumes are.
        cases: positions in `store.cases` to draw from; None takes all.
        patch_size: voxels (depth, height, width).
        seed: 0 or more.
        augmentation: None shows the patches as they are.
        length: number of samples of the run.
        foreground_share: in [0, 1], the share of patches that are centred on foreground.
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
        foreground_share: float = 0.0,
    ) -> None:
        self.store = store
        self.cases = tuple(range(len(store)) if cases is None else cases)
        if not self.cases or not all(0 <= case < len(store) for case in self.cases):
            raise ValueError(f"cases must be one or more of 0 to {len(store) - 1}, got {list(self.cases)}")
        self.patch_size = check_patch_size(patch_size)
        check_sampling(seed, length, foreground_share)
        self.seed = seed
        self.augmentation = augmentation
        self.length = length
        self.foreground_share = foreground_share

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < self.length:
            raise IndexError(f"sample {i} of {self.length}")
        case = self.cases[place_in_epoch(self.seed, i, len(self.cases))]
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, SAMPLE_STREAM, i]))
        start = self._place(case, rng)
        transform = SpatialTransform() if self.augmentation is None else self.augmentation.draw(rng)
        return _sample(self.store, case, start, self.patch_size, transform)

    def _place(self, case: int, rng: np.random.Generator) -> list[int]:
        centre = None
        # Without a share nothing is drawn, so that the patches are those of before there was one.
        if self.foreground_share and rng.random() < self.foreground_share:
            places = self.store.foreground(case)
            if len(places):
                centre = places[rng.integers(len(places))].tolist()
        return place_in_volume(self.store.cases[case].shape, self.patch_size, centre, rng)


def check_sampling(seed: int, length: int, foreground_share: float) -> None:
    """ValueError unless these can be settings of `PatchDataset`."""
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if length < 1:
        raise ValueError(f"length must be 1 or more, got {length}")
    if not 0 <= foreground_share <= 1:
        raise ValueError(f"foreground_share must be within [0, 1], got {foreground_share}")


def place_in_volume(
    volume_shape: Sequence[int], patch_size: Sequence[int], centre: Sequence[int] | None, rng: np.random.Generator
) -> list[int]:
    """First voxel of a patch around a voxel, as close as the border allows, or (None) anywhere within the volume.

    Along an axis where the patch is larger than the volume it is centred: the first voxel is negative.
    """
    first = []
    for axis, (side, length, middle) in enumerate(zip(volume_shape, patch_size, centred(volume_shape, patch_size))):
        if side < length:
            first.append(middle)
        elif centre is None:
            first.append(int(rng.integers(side - length + 1)))
        else:
            first.append(min(max(centre[axis] - length // 2, 0), side - length))
    return first


def place_in_epoch(seed: int, i: int, cases: int) -> int:
    """Which of so many cases sample `i` shows: an epoch is a permutation of the cases."""
    epoch, place = divmod(i, cases)
    rng = np.random.default_rng(np.random.SeedSequence([seed, EPOCH_STREAM, epoch]))
    return int(rng.permutation(cases)[place])


def validation_sample(store: VolumeStore, case: int, patch_size: Sequence[int]) -> Sample:
    """The patch in the middle of a volume, padded with background where the volume is smaller.

    Args:
        store: where the volumes are.
        case: position in `store.cases`.
        patch_size: voxels (depth, height, width).
    Raises:
        IndexError: there is no such case.
        ValueError: `patch_size` is not three positive whole numbers.
    """
    if not 0 <= case < len(store):
        raise IndexError(f"case must be 0 to {len(store) - 1}, got {case}")
    size = check_patch_size(patch_size)
    return _sample(store, case, centred(store.cases[case].shape, size), size, SpatialTransform())


def split_cases(store: VolumeStore, validation_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits the cases of a store in two, by a hash of their subjects; cases of no known subject by their names.

    All cases of a subject are on one side. Which side that is depends on subject and seed, not on the order or place
    of the files, and few subjects change sides when some are added.

    Args:
        store: where the volumes are.
        validation_fraction: in [0, 1), as nearly as whole subjects allow; of 2 or more subjects each side gets at least
            one, unless the fraction is 0.
        seed: another seed, another split.
    Returns: training and validation cases, ascending positions in `store.cases`. One subject alone is for training.
    Raises:
        ValueError: `validation_fraction` is out of range.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be within [0, 1), got {validation_fraction}")
    people: dict[str, list[int]] = {}
    for case, record in enumerate(store.cases):
        people.setdefault(record.name if record.subject is None else record.subject, []).append(case)
    wanted = max(round(validation_fraction * len(store)), 1) if validation_fraction > 0 else 0

    ranked = sorted(people, key=lambda person: hashlib.sha256(f"{seed}/{person}".encode()).digest())
    validation: list[int] = []
    for person in ranked[:-1]:  # one is left for training
        # Taken if that comes nearer to the wanted number.
        if len(validation) + len(people[person]) / 2 <= wanted:
            validation += people[person]
    if wanted and not validation and len(ranked) > 1:
        validation = people[ranked[0]]
    return sorted(set(range(len(store))) - set(validation)), sorted(validation)


def check_patch_size(patch_size: Sequence[int]) -> tuple[int, int, int]:
    """`patch_size` as a tuple; ValueError unless it is three positive whole numbers."""
    sizes = tuple(patch_size)
    if len(sizes) != 3 or not all(isinstance(side, (int, np.integer)) and side >= 1 for side in sizes):
        raise ValueError(f"patch_size must be three positive whole numbers, got {patch_size!r}")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def centred(volume_shape: Sequence[int], patch_size: Sequence[int]) -> list[int]:
    """First voxel of the centred patch; negative where the patch is larger than the volume."""
    return [(side - length) // 2 for side, length in zip(volume_shape, patch_size)]


def _sample(
    store: VolumeStore, case: int, start: Sequence[int], patch_size: tuple[int, int, int], transform: SpatialTransform
) -> Sample:
    """The patch whose first voxel is `start` before it is transformed around its centre."""
    record = store.cases[case]
    centre = [first + (length - 1) / 2 for first, length in zip(start, patch_size)]
    region_start, region_shape = (
        transform.source_region(centre, patch_size, record.shape)
        if transform.interpolates
        else overlap(start, patch_size, record.shape)
    )

    def show(region: Tensor, outside: float) -> Tensor:
        """[1, D, H, W]: what the patch shows of the region that was read."""
        if transform.interpolates:
            patch = transform.resample(region, region_start, centre, patch_size, outside)
        else:
            patch = padded(region, [low - first for low, first in zip(region_start, start)], patch_size, outside)
        mirrored = [axis for axis, mirror in enumerate(transform.mirror) if mirror]
        return (patch.flip(mirrored) if mirrored else patch)[None]  # flip copies, along no axis too

    region = torch.from_numpy(store.read(case, region_start, region_shape))
    sample: Sample = {"image": show(region, record.background), "case": record.name}
    if store.has_anonymised:
        anonymised = store.read_anonymised(case, region_start, region_shape)
        if anonymised is None or not anonymised.any():
            sample["valid"] = torch.ones(1, *patch_size, dtype=torch.bool)
        else:
            # Interpolated like the image: a voxel is valid if none that it is made from is anonymised.
            sample["valid"] = show(torch.from_numpy(anonymised).float(), 0.0) < 1e-4
    return sample


def overlap(
    start: Sequence[int], patch_size: Sequence[int], volume_shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and shape of the part of the volume that the patch at `start` covers."""
    low = tuple(max(first, 0) for first in start)
    high = [min(first + length, side) for first, length, side in zip(start, patch_size, volume_shape)]
    return low, tuple(after - before for before, after in zip(low, high))


def padded(region: Tensor, place: Sequence[int], patch_size: Sequence[int], outside: float) -> Tensor:
    """A patch [D, H, W] that shows `region` from voxel `place` on."""
    if region.shape == torch.Size(patch_size):
        return region
    patch = torch.full(tuple(patch_size), outside, dtype=region.dtype)
    patch[tuple(slice(first, first + length) for first, length in zip(place, region.shape))] = region
    return patch
