from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from s3d.data import PatchDataset, SpatialAugmentation, SpatialTransform, VolumeStore

CUBE = 1  # the store's case of 66^3


@dataclass(frozen=True)
class Always(SpatialAugmentation):
    """Draws one given transform."""

    transform: SpatialTransform = field(default_factory=SpatialTransform)

    def draw(self, rng: np.random.Generator) -> SpatialTransform:
        return self.transform


def patch(store: VolumeStore, case: int, patch_size: tuple[int, ...], transform: SpatialTransform) -> NDArray:
    dataset = PatchDataset(store, [case], patch_size, seed=0, augmentation=Always(transform=transform), length=1)
    return dataset[0]["image"][0].numpy()


def trilinear(volume: NDArray, places: NDArray[np.float64], background: float) -> NDArray:
    """Oracle: linear interpolation at places [..., 3], background beyond the volume."""
    padded = np.pad(volume, 1, constant_values=background).astype(np.float64)
    places = np.clip(places + 1, 0, np.array(padded.shape) - 1)
    low = np.minimum(np.floor(places).astype(int), np.array(padded.shape) - 2)
    part = places - low
    total = np.zeros(places.shape[:-1])
    for corner in itertools.product((0, 1), repeat=3):
        weight = np.prod(np.where(corner, part, 1 - part), axis=-1)
        total += weight * padded[tuple(np.moveaxis(low + np.array(corner), -1, 0))]
    return total


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_rot90(store: VolumeStore, axis: int, turns: int) -> None:
    angles = [0.0, 0.0, 0.0]
    angles[axis] = 90.0 * turns
    first, second = (other for other in range(3) if other != axis)
    expected = np.rot90(store.read(CUBE), k=-turns, axes=(first, second))
    actual = patch(store, CUBE, (66, 66, 66), SpatialTransform(angles_degrees=(angles[0], angles[1], angles[2])))
    np.testing.assert_allclose(actual, expected, atol=2e-4)


@pytest.mark.parametrize("mirror", list(itertools.product((False, True), repeat=3)))
def test_mirror_is_flip_and_exact(store: VolumeStore, mirror: tuple[bool, bool, bool]) -> None:
    expected = np.flip(store.read(CUBE), [axis for axis in range(3) if mirror[axis]])
    np.testing.assert_array_equal(patch(store, CUBE, (66, 66, 66), SpatialTransform(mirror=mirror)), expected)


def test_mirror_comes_after_rotation(store: VolumeStore) -> None:
    turned = SpatialTransform(angles_degrees=(20.0, 0.0, 0.0))
    both = SpatialTransform(angles_degrees=(20.0, 0.0, 0.0), mirror=(False, False, True))
    expected = np.flip(patch(store, CUBE, (40, 40, 40), turned), 2)
    np.testing.assert_array_equal(patch(store, CUBE, (40, 40, 40), both), expected)


def test_scale_two_shows_twice_the_extent(store: VolumeStore) -> None:
    shown = patch(store, CUBE, (66, 66, 66), SpatialTransform(scale=2.0))
    places = 32.5 + 2 * (np.stack(np.meshgrid(*[np.arange(66)] * 3, indexing="ij"), -1) - 32.5)
    expected = trilinear(store.read(CUBE), places, store.cases[CUBE].background)
    np.testing.assert_allclose(shown, expected, atol=2e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("patch_size", [(24, 20, 28), (48, 64, 40)], ids=["inside", "beyond the volume"])
def test_reading_the_region_only_changes_nothing(store: VolumeStore, seed: int, patch_size: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    case = seed % len(store)
    full = store.read(case)
    background = store.cases[case].background
    transform = SpatialAugmentation(rotation_probability=1, scale_probability=1).draw(rng)
    centre = rng.uniform(0, np.array(full.shape) - 1)
    start, shape = transform.source_region(centre, patch_size, full.shape)
    region = full[tuple(slice(first, first + length) for first, length in zip(start, shape))]
    actual = transform.resample(torch.from_numpy(region.copy()), start, centre, patch_size, background)

    offsets = np.stack(np.meshgrid(*map(np.arange, patch_size), indexing="ij"), -1) - (np.array(patch_size) - 1) / 2
    expected = trilinear(full, centre + offsets @ transform.matrix.T, background)
    np.testing.assert_allclose(actual.numpy(), expected, atol=5e-4)


def test_region_is_the_bounding_box_of_what_is_shown() -> None:
    rng = np.random.default_rng(0)
    augmentation = SpatialAugmentation(rotation_probability=1, scale_probability=1)
    patch_size = np.array([16, 32, 24])
    corners = np.array(list(itertools.product((-0.5, 0.5), repeat=3))) * (patch_size - 1)
    for _ in range(200):
        transform = augmentation.draw(rng)
        centre = rng.uniform(100, 101, size=3)
        start, shape = transform.source_region(centre, patch_size, (200, 200, 200))
        shown = centre + corners @ transform.matrix.T
        np.testing.assert_array_equal(start, np.floor(shown.min(axis=0)))
        np.testing.assert_array_equal(np.array(start) + shape - 1, np.ceil(shown.max(axis=0)))


def test_default_augmentation_reads_little_more_than_the_patch() -> None:
    rng = np.random.default_rng(0)
    sizes = []
    for _ in range(4000):
        transform = SpatialAugmentation().draw(rng)
        if transform.interpolates:
            _, shape = transform.source_region((500, 500, 500), (96, 96, 96), (1000, 1000, 1000))
            sizes.append(np.prod(shape) / 96**3)
        else:
            sizes.append(1.0)
    assert np.mean(sizes) < 1.6  # a region that is enough for every draw is (257 / 160)^3 = 4.1 patches
    assert np.median(sizes) == 1.0


def test_untouched_patches_are_plain_crops(store: VolumeStore) -> None:
    off = SpatialAugmentation(rotation_probability=0, scale_probability=0, mirror_probability=0)
    plain, same = (
        PatchDataset(store, None, (32, 32, 32), seed=3, augmentation=augmentation, length=8)
        for augmentation in (None, off)
    )
    for i in range(8):
        assert torch.equal(plain[i]["image"], same[i]["image"])


def test_draws_follow_the_settings() -> None:
    rng = np.random.default_rng(0)
    draws = [SpatialAugmentation().draw(rng) for _ in range(4000)]
    angles = np.array([draw.angles_degrees for draw in draws if any(draw.angles_degrees)])
    scales = np.array([draw.scale for draw in draws if draw.scale != 1])
    assert len(angles) / 4000 == pytest.approx(0.2, abs=0.02)
    assert len(scales) / 4000 == pytest.approx(0.2, abs=0.02)
    np.testing.assert_allclose([angles.min(), angles.max()], [-30, 30], atol=0.5)
    np.testing.assert_allclose([scales.min(), scales.max()], [0.7, 1.4], atol=0.01)
    np.testing.assert_allclose(np.mean([draw.mirror for draw in draws], axis=0), 0.5, atol=0.03)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rotation_probability", 1.5),
        ("scale_probability", -0.1),
        ("mirror_probability", float("nan")),
        ("max_rotation_degrees", 200),
        ("scale_range", (1.4, 0.7)),
        ("scale_range", (0, 1)),
    ],
)
def test_settings_are_checked(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be"):
        SpatialAugmentation(**{setting: value})
