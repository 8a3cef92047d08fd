from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from s3d.data import PatchDataset, SpatialAugmentation, VolumeStore, split_cases, validation_patch


def dataset(
    store: VolumeStore,
    *,
    seed: int = 0,
    patch_size: tuple[int, ...] = (20, 24, 16),
    augmentation: SpatialAugmentation | None = SpatialAugmentation(),
    length: int = 24,
    cases: list[int] | None = None,
) -> PatchDataset:
    return PatchDataset(store, cases, patch_size, seed=seed, augmentation=augmentation, length=length)


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


# Python 3.12 warns of forks in processes with threads; a forked worker is what this is about.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
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


def test_validation_patch_is_the_centre(store: VolumeStore) -> None:
    expected = store.read(0)[40:60, 35:55, 25:45]
    actual = validation_patch(store, 0, (20, 20, 20))
    assert actual.shape == (1, 20, 20, 20)
    np.testing.assert_array_equal(actual[0], expected)
    padded = validation_patch(store, 2, (22, 20, 20))[0]
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
        validation_patch(store, 4, (8, 8, 8))
    with pytest.raises(ValueError, match="validation_fraction must be within"):
        split_cases(store, 1.0, seed=0)
