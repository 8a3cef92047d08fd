"""Training patches with labels from a store of prepared cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torch.utils.data import Dataset

from s3d.data.augment import SpatialTransform
from s3d.data.patches import (
    SAMPLE_STREAM,
    check_patch_size,
    check_sampling,
    overlap,
    padded,
    place_in_epoch,
    place_in_volume,
)
from s3d.segmentation.case_store import CaseStore

if TYPE_CHECKING:
    from s3d.segmentation.augmentation import Augmentation


class LabelledSample(TypedDict):
    """One training sample."""

    image: Tensor  # float32 [C, D, H, W]
    label: Tensor  # uint8 [1, D, H, W]
    case: str


class SegmentationPatches(Dataset[LabelledSample]):
    """Random patches of labelled cases; sample `i` is the `i`-th of the whole training run.

    A sample is a pure function of (seed, i), as in `s3d.data.patches.PatchDataset`: nothing to save, and a run that
    goes on after k samples reads k, k + 1, ... An epoch is `len(cases)` samples, a permutation of the cases.

    A share of the patches is centred on a voxel of a class, as close as the border of the case allows: first a class
    is drawn among those the case has, each as likely, then one of its voxels. All others lie anywhere within the case.
    Where a case is smaller than the patch, the patch is centred and shows background around it: the minimum of each
    channel, and label 0.

    Args:
        store: where the cases are.
        cases: names of those to draw from.
        patch_size: voxels (depth, height, width).
        seed: 0 or more.
        length: number of samples of the run.
        augmentation: whether patches are transformed as in nnU-Net (`s3d.segmentation.augmentation`).
        foreground_share: in [0, 1], the share of patches that are centred on a voxel of a class.
    Raises:
        ValueError: an argument is out of range or a case is not in the store; says which.
    """

    def __init__(
        self,
        store: CaseStore,
        cases: Sequence[str],
        patch_size: Sequence[int],
        *,
        seed: int,
        length: int,
        augmentation: bool,
        foreground_share: float = 1 / 3,
    ) -> None:
        self.store = store
        self.cases = tuple(store.position(name) for name in cases)
        if not self.cases:
            raise ValueError("cases is empty; at least one case is needed")
        self.patch_size = check_patch_size(patch_size)
        check_sampling(seed, length, foreground_share)
        self.seed = seed
        self.length = length
        self.augmentation: Augmentation | None = None
        if augmentation:
            from s3d.segmentation.augmentation import Augmentation  # takes seconds to import

            self.augmentation = Augmentation(self.patch_size)
        self.foreground_share = foreground_share

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> LabelledSample:
        if not 0 <= i < self.length:
            raise IndexError(f"sample {i} of {self.length}")
        case = self.cases[place_in_epoch(self.seed, i, len(self.cases))]
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, SAMPLE_STREAM, i]))
        start = self._place(case, rng)
        if self.augmentation is None:
            image, label = self._show(case, start, SpatialTransform())
        else:
            image, label = self._show(case, start, self.augmentation.spatial.draw(rng))
            image = self.augmentation.change_intensities(image, rng)
        return {"image": image, "label": label[None], "case": self.store.cases[case].name}

    def _place(self, case: int, rng: np.random.Generator) -> list[int]:
        centre = None
        if rng.random() < self.foreground_share:
            places = self.store.places(case)
            if places:  # resampling may have left none of a few voxels
                voxels = places[int(rng.choice(sorted(places)))]
                centre = voxels[rng.integers(len(voxels))].tolist()
        return place_in_volume(self.store.cases[case].shape, self.patch_size, centre, rng)

    def _show(self, case: int, start: Sequence[int], transform: SpatialTransform) -> tuple[Tensor, Tensor]:
        """Image [C, D, H, W] and label [D, H, W] of the patch whose first voxel is `start` before it is transformed."""
        record = self.store.cases[case]
        centre = [first + (length - 1) / 2 for first, length in zip(start, self.patch_size)]
        low, shape = (
            transform.source_region(centre, self.patch_size, record.shape)
            if transform.interpolates
            else overlap(start, self.patch_size, record.shape)
        )
        image = torch.from_numpy(self.store.read(case, low, shape))
        label = torch.from_numpy(self.store.read_labels(case, low, shape))
        if transform.interpolates:
            background = torch.tensor(record.background).view(-1, 1, 1, 1)
            grid = transform.sampling_grid(shape, low, centre, self.patch_size)[None]
            # Outside the region the sampler sees zeros, so background is moved there and back. A label is that of the
            # nearest voxel: one class after the other, linearly, costs as many times as much.
            image = grid_sample((image - background)[None], grid, align_corners=False)[0].add_(background)
            label = grid_sample(label[None, None].float(), grid, mode="nearest", align_corners=False)[0, 0].to(
                torch.uint8
            )
        else:
            place = [begin - first for begin, first in zip(low, start)]
            image = torch.stack(
                [padded(channel, place, self.patch_size, least) for channel, least in zip(image, record.background)]
            )
            label = padded(label, place, self.patch_size, 0)
        mirrored = [axis - 3 for axis, mirror in enumerate(transform.mirror) if mirror]
        return (image.flip(mirrored), label.flip(mirrored)) if mirrored else (image, label)
