from __future__ import annotations

import numpy as np
import pytest
import torch
from small_dataset import write_dataset

from s3d.data import SpatialAugmentation, SpatialTransform
from s3d.segmentation.augmentation import Augmentation
from s3d.segmentation.case_store import CaseStore, prepare_dataset
from s3d.segmentation.patches import SegmentationPatches
from s3d.segmentation.planning import fixed_plan
from s3d.segmentation.raw_dataset import read_raw_dataset


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    folder = tmp_path_factory.mktemp("augmentation")
    dataset = read_raw_dataset(write_dataset(folder / "raw", cases=2, shape=(34, 38, 30)))
    return prepare_dataset(
        dataset.training, fixed_plan(dataset, "tiny", 1.0, (8, 8, 8)), folder / "store", progress=False
    )


class Always(SpatialAugmentation):
    """One transform, whatever is drawn."""

    def draw(self, rng: np.random.Generator) -> SpatialTransform:
        return SpatialTransform((15.0, -20.0, 25.0), 0.85, (True, False, True))


def test_label_and_image_are_moved_alike(store: CaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each voxel of the label is the class that the (noisy) intensities show there."""
    dataset = SegmentationPatches(store, ["case_0"], (24, 28, 26), seed=0, length=9, augmentation=True)
    plain = SegmentationPatches(store, ["case_0"], (24, 28, 26), seed=0, length=9, augmentation=False)
    assert dataset.augmentation is not None
    monkeypatch.setattr(dataset.augmentation, "spatial", Always())
    monkeypatch.setattr(dataset.augmentation, "change_intensities", lambda image, rng: image)
    whole, labels = store.read(0)[0], store.read_labels(0)
    means = [whole[labels == value].mean() for value in range(3)]
    edges = [(means[0] + means[1]) / 2, (means[1] + means[2]) / 2]
    for i in range(9):
        sample = dataset[i]
        shown = np.digitize(sample["image"][0].numpy(), edges)
        assert (shown == sample["label"][0].numpy()).mean() > 0.93
        assert not torch.equal(sample["label"], plain[i]["label"])
        assert set(sample["label"].unique().tolist()) == {0, 1, 2}


def test_a_label_is_that_of_the_nearest_voxel(store: CaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch is as large as the case, so that it lies in its middle."""
    size = store.cases[0].shape
    dataset = SegmentationPatches(store, ["case_0"], size, seed=0, length=1, augmentation=True)
    assert dataset.augmentation is not None
    monkeypatch.setattr(dataset.augmentation, "spatial", Always())
    labels = store.read_labels(0)
    middle = (np.array(size) - 1) / 2
    offsets = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1) - middle
    places = np.round(middle + offsets @ Always().draw(np.random.default_rng()).matrix.T).astype(int)
    within = ((places >= 0) & (places < size)).all(axis=-1)
    expected = np.where(within, labels[tuple(np.moveaxis(places.clip(0, np.array(size) - 1), -1, 0))], 0)
    assert (dataset[0]["label"][0].numpy() == np.flip(expected, (0, 2))).mean() > 0.999


def test_a_mirrored_patch_is_the_patch_mirrored(store: CaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrored, plain = (
        SegmentationPatches(store, ["case_0", "case_1"], (12, 16, 20), seed=0, length=4, augmentation=augmentation)
        for augmentation in (True, False)
    )
    assert mirrored.augmentation is not None
    monkeypatch.setattr(mirrored.augmentation, "spatial", SpatialAugmentation(0.0, 0.0, (1, 1), 0.0, 1.0))
    monkeypatch.setattr(mirrored.augmentation, "change_intensities", lambda image, rng: image)
    for i in range(4):
        assert torch.equal(mirrored[i]["image"], plain[i]["image"].flip(1, 2, 3))
        assert torch.equal(mirrored[i]["label"], plain[i]["label"].flip(1, 2, 3))


def test_what_lies_outside_a_turned_case_is_background(store: CaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = SegmentationPatches(store, ["case_0"], (60, 60, 60), seed=0, length=1, augmentation=True)
    assert dataset.augmentation is not None
    monkeypatch.setattr(dataset.augmentation, "spatial", Always())
    monkeypatch.setattr(dataset.augmentation, "change_intensities", lambda image, rng: image)
    sample = dataset[0]
    assert sample["image"][0, 0, 0, 0] == store.cases[0].background[0]
    assert sample["label"][0, 0, 0, 0] == 0
    assert sample["label"].max() == 2


def test_patches_are_flat_where_another_side_is_over_three_times_as_long() -> None:
    assert Augmentation((40, 56, 40)).flat_axis is None
    assert Augmentation((24, 72, 72)).flat_axis is None
    for axis, patch_size in enumerate([(16, 64, 64), (64, 16, 64), (64, 64, 16)]):
        spatial = Augmentation(patch_size).spatial
        rng = np.random.default_rng(0)
        drawn = [spatial.draw(rng) for _ in range(400)]
        others = [other for other in range(3) if other != axis]
        assert all(transform.angles_degrees[other] == 0 for transform in drawn for other in others)
        assert max(abs(transform.angles_degrees[axis]) for transform in drawn) > 120
        for transform in drawn:
            unit = np.eye(3)[axis]
            np.testing.assert_allclose(transform.matrix @ unit, unit, atol=1e-12)
        assert any(transform.scale != 1 for transform in drawn)


@pytest.mark.parametrize("patch_size", [(20, 24, 22), (6, 24, 22)], ids=["cube", "flat"])
def test_intensities_are_changed_as_often_as_they_should(patch_size: tuple[int, int, int]) -> None:
    augmentation = Augmentation(patch_size)
    image = torch.randn(1, *patch_size, generator=torch.Generator().manual_seed(0))
    unchanged = 0
    for seed in range(400):
        changed = augmentation.change_intensities(image, np.random.default_rng(seed))
        assert type(changed) is torch.Tensor
        assert changed.dtype == torch.float32
        assert changed.shape == image.shape
        assert changed.isfinite().all()
        unchanged += torch.equal(changed, image)
    # Of noise, blur, brightness, contrast, low resolution and both gammas, none.
    expected = 0.9 * (1 - 0.2 * 0.5) * 0.85 * 0.85 * (1 - 0.25 * 0.5) * 0.9 * 0.7
    assert unchanged / 400 == pytest.approx(expected, abs=0.07)


def test_channels_change_by_themselves() -> None:
    augmentation = Augmentation((12, 12, 12))
    image = torch.randn(1, 12, 12, 12, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    differ = 0
    for seed in range(100):
        first, second = augmentation.change_intensities(image, np.random.default_rng(seed))
        differ += not torch.equal(first, second)
    assert differ > 40


def test_each_change_is_of_the_strength_it_should_have() -> None:
    """In the order of nnU-Net: noise, blur, brightness, contrast, low resolution, gamma of the negative, gamma."""
    augmentation = Augmentation((24, 24, 24))
    image = torch.randn(24, 24, 24, generator=torch.Generator().manual_seed(0)) + 3

    def results(number: int) -> list[torch.Tensor]:
        change = augmentation._changes[number]
        drawn = []
        for seed in range(60):
            change.transform.set_random_state(seed=seed)
            drawn.append(augmentation._changed(image, change))
        return drawn

    noise = [float((changed - image).std()) for changed in results(0)]
    assert max(noise) == pytest.approx(0.1, abs=0.01)
    assert min(noise) < 0.01
    blurred = [float(changed.std() / image.std()) for changed in results(1)]
    assert 0.1 < min(blurred) < max(blurred) < 0.7
    factors = [float((changed / image).mean()) for changed in results(2)]
    np.testing.assert_allclose([min(factors), max(factors)], [0.75, 1.25], atol=0.03)
    for changed in results(3):
        assert image.min() <= changed.min() < changed.max() <= image.max()
        assert float(changed.mean()) == pytest.approx(float(image.mean()), abs=0.01)
    coarse = [float(changed.std() / image.std()) for changed in results(4)]
    assert 0.3 < min(coarse) < max(coarse) <= 1.0
    for number in (5, 6):
        for changed in results(number):
            assert float(changed.mean()) == pytest.approx(float(image.mean()), abs=0.01)
            assert float(changed.std()) == pytest.approx(float(image.std()), abs=0.01)
            order = image.flatten().argsort()
            assert (changed.flatten()[order].diff() >= -1e-4).all()


def test_low_resolution_of_a_flat_patch_keeps_its_slices_apart() -> None:
    augmentation = Augmentation((6, 24, 24))
    image = torch.zeros(6, 24, 24)
    image[2] = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    change = augmentation._changes[4]
    change.transform.set_random_state(seed=0)
    changed = augmentation._changed(image, change)
    assert not torch.equal(changed[2], image[2])
    assert not changed[[0, 1, 3, 4, 5]].any()
