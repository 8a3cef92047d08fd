from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from small_dataset import CLASSES, ball, save

from s3d.data import BadImageError, load_volume
from s3d.model import preset_shape
from s3d.segmentation.plan import Normalization, SegmentationPlan
from s3d.segmentation.prepared_case import prepare_case
from s3d.segmentation.raw_dataset import RawCase


def plan(spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0), channels: int = 1) -> SegmentationPlan:
    return SegmentationPlan(
        dataset="Dataset001_Balls",
        channel_names=("MRI",) * channels,
        class_names=CLASSES,
        file_ending=".nii.gz",
        kind="fixed",
        spacing_mm=spacing_mm,
        patch_size=(8, 8, 8),
        normalization=(Normalization("zscore"),) * channels,
        network=preset_shape("tiny"),
    )


def write_case(
    folder: Path, image: NDArray[np.generic], label: NDArray[np.generic], affine: NDArray[np.float64]
) -> RawCase:
    return RawCase(
        "a", (save(folder / "a_0000.nii.gz", image, affine),), save(folder / "labels" / "a.nii.gz", label, affine)
    )


def test_a_case_on_its_own_grid_is_cropped_and_normalised(tmp_path: Path) -> None:
    image, label = ball((16, 20, 12))
    prepared = prepare_case(write_case(tmp_path, image, label, np.eye(4)), plan())
    assert prepared.name == "a"
    assert prepared.grid.source_shape == (12, 20, 16)
    assert prepared.grid.box == ((0, 12), (0, 18), (1, 16))
    assert prepared.grid.shape == (12, 18, 15)
    assert prepared.spacing_mm == (1.0, 1.0, 1.0)
    assert prepared.labels is not None
    assert prepared.labels.dtype == np.uint8
    np.testing.assert_array_equal(prepared.labels, label.T[:, :18, 1:])
    crop = image.T[:, :18, 1:]
    np.testing.assert_allclose(prepared.voxels[0], (crop - crop.mean()) / crop.std(), atol=1e-5)


def test_the_voxels_are_those_of_pre_training(tmp_path: Path) -> None:
    image, label = ball((16, 20, 12))
    case = write_case(tmp_path, image, label, np.diag([1.3, 0.9, 2.0, 1.0]))
    prepared = prepare_case(case, plan())
    volume = load_volume(case.images[0])
    np.testing.assert_array_equal(prepared.voxels[0], volume.voxels)
    assert prepared.spacing_mm == volume.spacing_mm
    assert prepared.grid.shape == prepared.labels.shape == volume.voxels.shape  # type: ignore[union-attr]


def test_labels_stay_where_the_image_is(tmp_path: Path) -> None:
    """The core is the brightest: on a finer and on a coarser grid the label tells where."""
    _, label = ball((24, 28, 20))
    image = 10 + 30.0 * label
    case = write_case(tmp_path, image.astype(np.float32), label, np.diag([1.0, 1.0, 1.5, 1.0]))
    for spacing in ((0.8, 0.7, 0.9), (1.9, 1.6, 1.4)):
        prepared = prepare_case(case, plan(spacing))
        assert prepared.labels is not None
        assert prepared.labels.shape == prepared.voxels.shape[1:]
        intensities = prepared.voxels[0] * image.T.std() + image.T.mean()
        from_image = np.digitize(intensities, [25, 55])
        assert (from_image == prepared.labels).mean() > 0.97
        shares = [(prepared.labels == k).mean() / (label == k).mean() for k in range(3)]
        assert np.allclose(shares, 1, atol=0.12), shares


def test_each_voxel_gets_the_class_with_the_largest_share(tmp_path: Path) -> None:
    """Three classes in the proportion 2 : 1 : 2 in a line of five, halfway: no class between two others appears."""
    label = np.zeros((20, 8, 8), np.uint8)
    label[10:] = 2
    image = np.random.default_rng(0).normal(100, 1, label.shape).astype(np.float32)
    prepared = prepare_case(write_case(tmp_path, image, label, np.eye(4)), plan((1.0, 1.0, 0.7)))
    assert prepared.labels is not None
    assert set(np.unique(prepared.labels)) == {0, 2}


def test_channels_keep_their_order_and_share_one_crop(tmp_path: Path) -> None:
    first, second = np.zeros((10, 12, 14), np.float32), np.zeros((10, 12, 14), np.float32)
    first[2:5], second[4:9] = np.random.default_rng(0).normal(5, 1, (2, 1, 12, 14))
    first[2, 0, 0], second[4, 0, 0] = 100, -100
    images = tuple(save(tmp_path / f"a_000{c}.nii.gz", v, np.eye(4)) for c, v in enumerate((first, second)))
    prepared = prepare_case(RawCase("a", images, None), plan(channels=2))
    assert prepared.labels is None
    assert prepared.voxels.shape == (2, 14, 12, 7)
    assert prepared.grid.box[2] == (2, 9)
    np.testing.assert_allclose(prepared.voxels.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(prepared.voxels.std(axis=(1, 2, 3)), 1, atol=1e-5)
    assert prepared.voxels[0].argmax() == np.ravel_multi_index((0, 0, 0), (14, 12, 7))
    assert prepared.voxels[1].argmin() == np.ravel_multi_index((0, 0, 2), (14, 12, 7))


def test_orientation_of_the_files_does_not_matter(tmp_path: Path) -> None:
    """Image and label may even be stored in different orientations."""
    image, label = ball((16, 20, 12))
    straight = prepare_case(write_case(tmp_path / "straight", image, label, np.eye(4)), plan())
    turned = nib.as_closest_canonical(nib.Nifti1Image(label, np.eye(4))).as_reoriented(
        np.array([[1, 1], [0, -1], [2, -1]])
    )
    nib.save(turned, tmp_path / "turned.nii.gz")
    mixed = RawCase("a", (tmp_path / "straight" / "a_0000.nii.gz",), tmp_path / "turned.nii.gz")
    other = prepare_case(mixed, plan())
    np.testing.assert_array_equal(straight.labels, other.labels)


def test_ct_is_cut_and_normalised_by_the_data_set(tmp_path: Path) -> None:
    image, label = ball((16, 20, 12))
    ct = dataclasses.replace(plan(), normalization=(Normalization("ct", low=15.0, high=60.0, mean=40.0, std=8.0),))
    prepared = prepare_case(write_case(tmp_path, image, label, np.eye(4)), ct)
    np.testing.assert_allclose(prepared.voxels[0], (image.T[:, :18, 1:].clip(15, 60) - 40) / 8, rtol=1e-5, atol=1e-5)


def test_what_is_wrong_with_a_case_is_named(tmp_path: Path) -> None:
    image, label = ball((16, 20, 12))
    eye = np.eye(4)

    def refused(image: NDArray[np.generic], label: NDArray[np.generic], affine: NDArray[np.float64] = eye) -> str:
        image_file = save(tmp_path / "a_0000.nii.gz", image, eye)
        label_file = save(tmp_path / "labels" / "a.nii.gz", label, affine)
        with pytest.raises(BadImageError) as caught:
            prepare_case(RawCase("a", (image_file,), label_file), plan())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    outside = label.copy()
    outside[3, 3, 3], outside[4, 4, 4] = 7, 3
    assert refused(image, outside).startswith(
        f"{tmp_path}/labels/a.nii.gz: holds values that dataset.json does not name: 3, 7 (it names 0 to 2)"
    )
    assert "not name: -1 (" in refused(image, label.astype(np.int16) - 1)
    assert "not name: 0.5, 1.5 (" in refused(image, label.astype(np.float32) / 2 + np.float32(0.5))
    assert "labels/a.nii.gz: is empty" in refused(image, np.zeros_like(label))
    cropped_away = np.zeros_like(label)
    cropped_away[0] = 1
    assert "labels/a.nii.gz: is empty" in refused(image, cropped_away)
    other_grid = f"labels/a.nii.gz: lies on another grid than {tmp_path}/a_0000.nii.gz: "
    assert f"{other_grid}12 x 20 x 15 voxels, not 12 x 20 x 16" in refused(image, label[1:])
    moved = eye.copy()
    moved[1, 3] = 0.7
    assert f"{other_grid}0.7 mm apart" in refused(image, label, moved)
    assert "a_0000.nii.gz: empty: every voxel is zero" in refused(np.zeros_like(image), label)
    assert "a_0000.nii.gz: constant" in refused(np.full_like(image, 3), label)


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    image, _ = ball((16, 20, 12))
    first = save(tmp_path / "a_0000.nii.gz", image, np.eye(4))
    second = save(tmp_path / "a_0001.nii.gz", image, np.diag([1.1, 1, 1, 1]))
    with pytest.raises(BadImageError, match=r"a_0001.nii.gz: lies on another grid than .*a_0000.nii.gz: 1.5 mm"):
        prepare_case(RawCase("a", (first, second), None), plan(channels=2))
    with pytest.raises(ValueError, match=r"case a has 2 channels, but the plan has 1 \(MRI\)"):
        prepare_case(RawCase("a", (first, second), None), plan())
