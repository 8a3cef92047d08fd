"""Anatomy and anonymisation masks, from the image files to training samples."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from s3d.data import (
    BadImageError,
    ImageSource,
    PatchDataset,
    SpatialAugmentation,
    SpatialTransform,
    VolumeStore,
    load_volume,
    preprocess,
    validation_sample,
)

WriteNifti = Callable[..., Path]
MakeHead = Callable[..., NDArray[np.float32]]


def box_mask(shape: tuple[int, ...], *box: slice) -> NDArray[np.uint8]:
    mask = np.zeros(shape, np.uint8)
    mask[box] = 1
    return mask


@pytest.fixture
def masked(write_nifti: WriteNifti, make_head: MakeHead) -> ImageSource:
    """An image of 40 x 36 x 32 voxels [x, y, z] of 2 mm, its anatomy and its removed face."""
    shape, affine = (40, 36, 32), np.diag([2.0, 2.0, 2.0, 1.0])
    return ImageSource(
        write_nifti("a.nii.gz", make_head(shape), affine),
        subject="p1",
        anatomy_mask=write_nifti("anatomy.nii.gz", box_mask(shape, slice(4, 34), slice(3, 33), slice(2, 30)), affine),
        anonymisation_mask=write_nifti("face.nii.gz", box_mask(shape, slice(10, 20), slice(20, 36), slice(6)), affine),
    )


def test_volume_is_cropped_to_the_anatomy_mask(masked: ImageSource) -> None:
    volume = load_volume(masked, None)
    whole = load_volume(masked.path, None)
    assert volume.voxels.shape == (28, 30, 30)
    assert volume.source_shape == (32, 36, 40)
    inner = whole.voxels[2:30, 3:33, 4:34] * whole.std + whole.mean
    np.testing.assert_allclose(volume.voxels * volume.std + volume.mean, inner, atol=1e-3)
    # Statistics are those of the whole crop: what lies in the mask is not preferred.
    np.testing.assert_allclose(volume.mean, inner.mean(dtype=np.float64), rtol=1e-5)
    assert volume.foreground.all()
    np.testing.assert_array_equal(whole.foreground, whole.voxels > 0)
    assert whole.anonymised is None


@pytest.mark.parametrize("spacing_mm", [None, 1.0, (3.0, 2.5, 4.0)])
def test_anonymisation_mask_goes_through_the_same_crop_and_resampling(
    masked: ImageSource, spacing_mm: float | tuple[float, ...] | None
) -> None:
    volume = load_volume(masked, spacing_mm)
    assert volume.anonymised is not None
    assert volume.anonymised.shape == volume.voxels.shape
    # The box of the face in mm, in the order of the array, relative to the crop, against the centres of the voxels.
    low, high = (2 * np.array(corner) for corner in ((0, 17, 6), (4, 30, 16)))
    centres = np.stack(np.meshgrid(*(np.arange(side) + 0.5 for side in volume.voxels.shape), indexing="ij"), -1)
    centres_mm = centres * np.array(volume.spacing_mm)
    inside = ((centres_mm > low) & (centres_mm < high)).all(-1)
    if spacing_mm is None:
        np.testing.assert_array_equal(volume.anonymised, inside)
        return
    # What any anonymised voxel is interpolated into: as far as the filter reaches, and no farther.
    reach = np.maximum(2.0, volume.spacing_mm)
    near = ((centres_mm > low - reach) & (centres_mm < high + reach)).all(-1)
    assert volume.anonymised[inside].all()
    assert not volume.anonymised[~near].any()
    assert volume.anonymised.sum() > inside.sum()


def test_mask_outside_the_crop_is_none(masked: ImageSource, write_nifti: WriteNifti) -> None:
    outside = write_nifti("o.nii.gz", box_mask((40, 36, 32), slice(3)), np.diag([2.0, 2.0, 2.0, 1.0]))
    assert load_volume(dataclasses.replace(masked, anonymisation_mask=outside)).anonymised is None


@pytest.mark.parametrize(
    ("shape", "shift_mm", "value", "message"),
    [
        ((40, 36, 30), 0.0, 1, "another grid than its image: 30 x 36 x 40 voxels, not 32 x 36 x 40"),
        ((40, 36, 32), 1.1, 1, r"another grid than its image: 1\.1 mm apart"),
        ((40, 36, 32), 0.0, 0, "empty: every voxel of the anatomy mask is zero"),
    ],
)
def test_masks_that_do_not_fit_are_named(
    masked: ImageSource,
    write_nifti: WriteNifti,
    shape: tuple[int, ...],
    shift_mm: float,
    value: int,
    message: str,
) -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[1, 3] = shift_mm
    wrong = write_nifti("wrong.nii.gz", np.full(shape, value, np.uint8), affine)
    with pytest.raises(BadImageError, match=message) as caught:
        load_volume(dataclasses.replace(masked, anatomy_mask=wrong))
    assert caught.value.path == wrong


@pytest.fixture
def store(masked: ImageSource, write_nifti: WriteNifti, make_head: MakeHead, tmp_path: Path) -> VolumeStore:
    """`a` with a removed face, `b` without."""
    images = [masked, ImageSource(write_nifti("b.nii.gz", make_head((24, 24, 24), 5)))]
    preprocess(images, tmp_path / "store", spacing_mm=None, progress=False)
    return VolumeStore(tmp_path / "store")


def test_store_keeps_subject_mask_and_foreground(store: VolumeStore, masked: ImageSource) -> None:
    volume = load_volume(masked, None)
    first, second = store.cases
    assert (first.subject, second.subject) == ("p1", None)
    assert store.has_anonymised
    assert volume.anonymised is not None
    np.testing.assert_array_equal(store.read_anonymised(0), volume.anonymised)
    part = store.read_anonymised(0, (1, 12, 5), (6, 10, 3))
    np.testing.assert_array_equal(part, volume.anonymised[1:7, 12:22, 5:8])
    assert store.read_anonymised(1) is None
    assert (store.folder / (first.anonymised_file or "")).stat().st_size < 1500
    places = store.foreground(1)
    inside = load_volume(second.source, None).foreground
    assert len(places) == 24**3 / 256
    assert len(np.unique(places, axis=0)) == len(places)
    assert inside[tuple(places.T)].all()
    np.testing.assert_allclose(places.mean(0), np.argwhere(inside).mean(0), atol=3)


def test_changed_or_lost_mask_is_redone(store: VolumeStore, masked: ImageSource, tmp_path: Path) -> None:
    images = [masked, ImageSource(Path(store.cases[1].source))]

    def again() -> int:
        return preprocess(images, tmp_path / "store", spacing_mm=None, progress=False).written

    assert again() == 0
    assert masked.anonymisation_mask is not None
    masked.anonymisation_mask.touch()
    assert again() == 1
    (store.folder / (store.cases[0].anonymised_file or "")).unlink()
    assert again() == 1
    images[1] = dataclasses.replace(images[1], subject="p2")  # that takes no work
    assert again() == 0
    assert VolumeStore(tmp_path / "store").cases[1].subject == "p2"


@dataclasses.dataclass(frozen=True)
class Always(SpatialAugmentation):
    """Draws one given transform."""

    transform: SpatialTransform = dataclasses.field(default_factory=SpatialTransform)

    def draw(self, rng: np.random.Generator) -> SpatialTransform:
        return self.transform


def test_a_voxel_is_valid_if_nothing_anonymised_shows_in_it(store: VolumeStore) -> None:
    """Oracle: the same patch of a volume that is 1000 where it is anonymised and 0 elsewhere."""
    anonymised = store.read_anonymised(0)
    assert anonymised is not None
    marked = np.where(anonymised, 1000.0, 0.0).astype(np.float32)

    class MarkedStore(VolumeStore):
        def read(self, case, start=None, shape=None):  # type: ignore[no-untyped-def]
            return marked[tuple(slice(first, first + length) for first, length in zip(start, shape))].copy()

    marked_store = MarkedStore(store.folder)
    marked_store.cases = (dataclasses.replace(store.cases[0], background=0.0),)
    transforms = [SpatialTransform(mirror=mirror) for mirror in itertools.product((False, True), repeat=3)]
    transforms += [
        SpatialTransform((20.0, -10.0, 5.0), 1.3, (False, True, True)),
        SpatialTransform((0.0, 0.0, 30.0), 0.8),
        SpatialTransform(scale=1.2),
    ]
    for transform, size in itertools.product(transforms, [(16, 20, 24), (40, 33, 50)]):
        options = {"patch_size": size, "seed": 3, "augmentation": Always(transform=transform), "length": 3}
        for i in range(3):
            sample = PatchDataset(store, [0], **options)[i]  # type: ignore[arg-type]
            marks = PatchDataset(marked_store, [0], **options)[i]["image"]  # type: ignore[arg-type]
            assert sample["valid"].dtype == torch.bool
            assert sample["valid"].shape == sample["image"].shape == (1, *size)
            assert torch.equal(sample["valid"], marks < 0.1)


def test_all_samples_of_a_store_with_anonymised_regions_collate(store: VolumeStore) -> None:
    batch = next(iter(DataLoader(PatchDataset(store, None, (28, 30, 30), seed=0, augmentation=None, length=2), 2)))
    assert batch["valid"].shape == (2, 1, 28, 30, 30)
    whole = batch["valid"].flatten(1).all(1).tolist()
    assert dict(zip(batch["case"], whole)) == {"a": False, "b": True}


def test_validation_sample(store: VolumeStore) -> None:
    sample = validation_sample(store, 0, (28, 30, 30))
    np.testing.assert_array_equal(sample["image"][0], store.read(0))
    np.testing.assert_array_equal(~sample["valid"][0].numpy(), store.read_anonymised(0))
    assert validation_sample(store, 1, (8, 8, 8))["valid"].all()


def test_without_anonymised_regions_there_is_no_such_key(masked: ImageSource, tmp_path: Path) -> None:
    preprocess([masked.path], tmp_path / "plain", progress=False)
    store = VolumeStore(tmp_path / "plain")
    assert not store.has_anonymised
    assert validation_sample(store, 0, (8, 8, 8)).keys() == {"image", "case"}
