from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from s3d.data import (
    PatchDataset,
    SpatialAugmentation,
    VolumeStore,
    loader_speed,
    preprocess,
    split_cases,
    validation_sample,
)


def dataset(
    store: VolumeStore,
    *,
    seed: int = 0,
    patch_size: tuple[int, ...] = (20, 24, 16),
    augmentation: SpatialAugmentation | None = SpatialAugmentation(),
    length: int = 24,
    cases: list[int] | None = None,
    foreground_share: float = 0.0,
) -> PatchDataset:
    return PatchDataset(
        store,
        cases,
        patch_size,
        seed=seed,
        augmentation=augmentation,
        length=length,
        foreground_share=foreground_share,
    )


def global_random_state() -> tuple[object, ...]:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def test_a_sample_depends_on_seed_and_number_only(store: VolumeStore) -> None:
    forwards = [dataset(store)[i] for i in range(24)]
    torch.manual_seed(5)
    np.random.seed(5)
    before = global_random_state()
    other = dataset(store, length=1000)
    backwards = {i: other[i] for i in reversed(range(24))}
    assert global_random_state() == before
    for i, sample in enumerate(forwards):
        assert sample["case"] == backwards[i]["case"]
        assert torch.equal(sample["image"], backwards[i]["image"])
        assert sample["image"].shape == (1, 20, 24, 16)
        assert sample["image"].dtype == torch.float32
    assert len({sample["image"].numpy().tobytes() for sample in forwards}) == 24


def test_another_seed_gives_other_samples(store: VolumeStore) -> None:
    assert not any(torch.equal(dataset(store)[i]["image"], dataset(store, seed=1)[i]["image"]) for i in range(8))


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_and_resumed_runs_give_the_same_samples(store: VolumeStore, start_method: str) -> None:
    samples = dataset(store)
    expected = [samples[i] for i in range(6, 24)]  # also reads in this process before the fork
    loader = DataLoader(
        samples, batch_size=3, sampler=range(6, 24), num_workers=1, multiprocessing_context=start_method
    )
    batches = list(loader)
    assert [case for batch in batches for case in batch["case"]] == [sample["case"] for sample in expected]
    assert torch.equal(
        torch.cat([batch["image"] for batch in batches]), torch.stack([sample["image"] for sample in expected])
    )


def test_epochs_are_permutations(store: VolumeStore) -> None:
    cases = [0, 2, 3]
    drawn = [sample["case"] for sample in dataset(store, cases=cases, length=60, augmentation=None)]
    epochs = [tuple(drawn[first : first + 3]) for first in range(0, 60, 3)]
    assert all(sorted(epoch) == ["case0", "case2", "case3"] for epoch in epochs)
    assert len(set(epochs)) > 1
    assert Counter(drawn) == {"case0": 20, "case2": 20, "case3": 20}


def test_place_is_uniform_over_all_places(store: VolumeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    read = VolumeStore.read
    monkeypatch.setattr(
        VolumeStore, "read", lambda self, case, start, shape: starts.append(start) or read(self, case, start, shape)
    )
    samples = dataset(store, cases=[3], patch_size=(24, 23, 15), augmentation=None, length=400)
    for i in range(400):
        samples[i]
    depth, height, width = np.array(starts).T
    assert set(depth) == {0}
    assert 160 < (height == 0).sum() < 240
    assert set(height) == {0, 1}
    counts = np.bincount(width, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 20
    assert counts.max() < 65


def test_small_volume_is_centred_on_background(store: VolumeStore) -> None:
    inner = store.read(3)
    background = store.cases[3].background
    expected = np.pad(inner, ((4, 4), (0, 0), (9, 8)), constant_values=background)
    sample = dataset(store, cases=[3], patch_size=(32, 24, 41), augmentation=None)[0]
    np.testing.assert_array_equal(sample["image"][0], expected)
    assert background == inner.min() < 0


def test_validation_sample_is_the_centre(store: VolumeStore) -> None:
    expected = store.read(0)[40:60, 35:55, 25:45]
    actual = validation_sample(store, 0, (20, 20, 20))["image"]
    assert actual.shape == (1, 20, 20, 20)
    np.testing.assert_array_equal(actual[0], expected)
    padded = validation_sample(store, 2, (22, 20, 20))["image"][0]
    np.testing.assert_array_equal(padded[1:21], store.read(2)[:, 15:35, 20:40])
    assert (padded[[0, 21]] == store.cases[2].background).all()


def test_split_is_complete_deterministic_and_by_name(store: VolumeStore, tmp_path: Path) -> None:
    train, validation = split_cases(store, 0.25, seed=0)
    assert sorted(train + validation) == [0, 1, 2, 3]
    assert len(validation) == 1
    assert split_cases(store, 0.25, seed=0) == (train, validation)
    assert len({split_cases(store, 0.25, seed=seed)[1][0] for seed in range(20)}) == 4

    held_out = store.cases[validation[0]].name
    shuffled = VolumeStore(store.folder)
    shuffled.cases = tuple(reversed(store.cases))
    assert [shuffled.cases[case].name for case in split_cases(shuffled, 0.25, seed=0)[1]] == [held_out]


@pytest.mark.parametrize(("fraction", "size"), [(0.0, 0), (0.01, 1), (0.5, 2), (0.99, 3)])
def test_each_side_of_a_split_has_a_case(store: VolumeStore, fraction: float, size: int) -> None:
    train, validation = split_cases(store, fraction, seed=0)
    assert (len(train), len(validation)) == (4 - size, size)


def test_one_case_is_for_training(store: VolumeStore) -> None:
    single = VolumeStore(store.folder)
    single.cases = store.cases[:1]
    assert split_cases(single, 0.5, seed=0) == ([0], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": []}, "cases must be one or more of 0 to 3"),
        ({"cases": [4]}, "cases must be one or more of 0 to 3, got"),
        ({"patch_size": (8, 8)}, "patch_size must be three positive whole numbers"),
        ({"patch_size": (8, 8, 0)}, "patch_size must be three positive whole numbers"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"length": 0}, "length must be 1 or more, got 0"),
        ({"foreground_share": 1.1}, "foreground_share must be within"),
    ],
)
def test_arguments_are_checked(store: VolumeStore, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(store, **changes)  # type: ignore[arg-type]


def test_numbers_out_of_range(store: VolumeStore) -> None:
    samples = dataset(store)
    for i in (-1, 24):
        with pytest.raises(IndexError, match=f"sample {i} of 24"):
            samples[i]
    with pytest.raises(IndexError, match="case must be 0 to 3"):
        validation_sample(store, 4, (8, 8, 8))["image"]
    with pytest.raises(ValueError, match="validation_fraction must be within"):
        split_cases(store, 1.0, seed=0)


@pytest.fixture
def corner_store(write_nifti: Callable[..., Path], tmp_path: Path) -> VolumeStore:
    """A dark noisy volume of 64^3 with a small bright ball near one corner."""
    axes = np.indices((64, 64, 64))
    ball = ((axes - 8) ** 2).sum(axis=0) < 25
    noise = np.random.default_rng(0).normal(10, 0.1, size=ball.shape)
    image = write_nifti("ball.nii.gz", np.where(ball, 1000, noise).astype(np.float32))
    preprocess([image], tmp_path / "balls", progress=False)
    return VolumeStore(tmp_path / "balls")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_patches_is_centred_on_foreground(corner_store: VolumeStore, share: float) -> None:
    assert len(corner_store.foreground(0)) == 485  # all voxels of the ball
    samples = dataset(
        corner_store, patch_size=(11, 11, 11), augmentation=None, length=400, foreground_share=share, seed=1
    )
    centred = [samples[i]["image"].max() > 10 for i in range(400)]
    by_chance = 0.02
    assert np.mean(centred) == pytest.approx(share + (1 - share) * by_chance, abs=0.06)
    if share == 1:
        assert all(samples[i]["image"][0, 5, 5, 5] > 10 for i in range(400))


def test_patches_on_foreground_stay_within_the_volume(corner_store: VolumeStore) -> None:
    (sample,) = list(dataset(corner_store, patch_size=(40, 40, 40), augmentation=None, length=1, foreground_share=1))
    np.testing.assert_array_equal(sample["image"][0], corner_store.read(0, (0, 0, 0), (40, 40, 40)))
    larger = dataset(corner_store, patch_size=(80, 40, 40), augmentation=None, length=1, foreground_share=1)[0]["image"]
    np.testing.assert_array_equal(larger[0, 8:72], corner_store.read(0, (0, 0, 0), (64, 40, 40)))


def with_subjects(store: VolumeStore, subjects: list[str | None]) -> VolumeStore:
    """A store of one case each, all made of the first."""
    copy = VolumeStore(store.folder)
    copy.cases = tuple(
        dataclasses.replace(store.cases[0], name=f"case{number}", subject=subject)
        for number, subject in enumerate(subjects)
    )
    return copy


@pytest.mark.parametrize("seed", range(10))
def test_split_keeps_the_images_of_a_subject_together(store: VolumeStore, seed: int) -> None:
    subjects = [f"p{number % 20}" for number in range(60)] + [None] * 40
    many = with_subjects(store, subjects)
    train, validation = split_cases(many, 0.2, seed)
    assert sorted(train + validation) == list(range(100))
    assert not {subjects[case] for case in train} & {subjects[case] for case in validation} - {None}
    assert 18 <= len(validation) <= 22
    few = with_subjects(store, ["a", "a", "a", "b", "b", "b"])
    assert [len(side) for side in split_cases(few, 0.05, seed)] == [3, 3]
    assert split_cases(with_subjects(store, ["a", "a", "a"]), 0.5, seed) == ([0, 1, 2], [])


@pytest.mark.parametrize("augmented", [False, True])
def test_loader_speed_counts_what_is_decompressed(store: VolumeStore, augmented: bool) -> None:
    speed = loader_speed(store.folder, (32, 32, 32), augmented=augmented, seconds=0.2)
    assert speed.patches >= 3
    assert speed.voxels_per_second == speed.patches_per_second * 32**3
    # At most one more block than the patch along each axis, if it is not turned.
    assert 1 <= speed.read_amplification < (4 if augmented else (48 / 32) ** 3)
    assert loader_speed(store.folder, (1, 1, 1), augmented=False, seconds=0).read_amplification > 1000
