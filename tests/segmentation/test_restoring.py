from __future__ import annotations

import dataclasses
import gzip
import weakref
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from torch import Tensor

from s3d.model import preset_shape
from s3d.segmentation import restoring
from s3d.segmentation.plan import Normalization, SegmentationPlan
from s3d.segmentation.prepared_case import CaseGrid, PreparedCase, prepare_case
from s3d.segmentation.raw_dataset import RawCase
from s3d.segmentation.restoring import restore, write_segmentation

SHAPE = (22, 17, 13)
SPACING = (0.8, 1.1, 2.5)  # mm along the axes of the file's array in RAS


def plan(spacing_mm: tuple[float, float, float]) -> SegmentationPlan:
    return SegmentationPlan(
        dataset="Dataset001_Corners",
        channel_names=("MRI",),
        class_names=("background", "front", "top"),
        file_ending=".nii.gz",
        kind="fixed",
        spacing_mm=spacing_mm,
        patch_size=(8, 8, 8),
        normalization=(Normalization("zscore"),),
        network=preset_shape("tiny"),
    )


def oriented(codes: str, tilt: float = 0.0) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64]]:
    """An image with an empty border, its labels (no symmetry), and the affine, with axes of this orientation."""
    label = np.zeros(SHAPE, np.uint8)
    label[3:11, 4:9, 2:8] = 1
    label[9:18, 8:14, 7:11] = 2
    image = np.zeros(SHAPE, np.uint8)
    image[2:20, 3:16, 1:12] = 50
    image += 40 * label
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    affine = rotation @ nib.affines.from_matvec(np.diag(SPACING), (-30, 12, 7))
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    image, label = (nib.apply_orientation(array, change) for array in (image, label))
    return image, label, affine @ inv_ornt_aff(change, SHAPE)


def save(path: Path, image: NDArray[np.generic], affine: NDArray[np.float64]) -> Path:
    path.parent.mkdir(exist_ok=True)
    kind = nib.MGHImage if path.suffix in (".mgh", ".mgz") else nib.Nifti1Image
    nib.save(kind(image, affine), path)
    return path


def prepared(
    folder: Path,
    image: NDArray[np.generic],
    label: NDArray[np.generic],
    affine: NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
) -> tuple[PreparedCase, Path]:
    reference = save(folder / "a_0000.nii.gz", image, affine)
    truth = save(folder / "labels" / "a.nii.gz", label, affine)
    return prepare_case(RawCase("a", (reference,), truth), plan(spacing_mm)), reference


def scores(case: PreparedCase) -> Tensor:
    """Logits [3, D, H, W] that are sure of the labels of a prepared case."""
    assert case.labels is not None
    return torch.stack([torch.from_numpy(case.labels == value).float() for value in range(3)]) * 4 - 2


@pytest.mark.parametrize("codes", ["RAS", "LPI", "PIR", "SLA", "ASL"])
@pytest.mark.parametrize("tilt", [0.0, 0.5])
def test_labels_on_the_grid_of_the_file_come_back_as_they_were(codes: str, tilt: float, tmp_path: Path) -> None:
    image, label, affine = oriented(codes, tilt)
    case, reference = prepared(tmp_path, image, label, affine, SPACING[::-1])
    assert case.grid.shape == (11, 13, 18)
    restored = restore(scores(case), case.grid, reference)
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, label)


@pytest.mark.parametrize("codes", ["RAS", "LPI", "PIR", "ASL"])
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.0, 0.5, 1.2)])
def test_what_lies_on_another_grid_comes_back_in_place(
    codes: str, spacing_mm: tuple[float, float, float], tmp_path: Path
) -> None:
    """The image is a slope and the class where it is high: linear interpolation keeps it, but for the border."""
    axes = np.meshgrid(*(np.arange(side) for side in SHAPE), indexing="ij")
    slope = 200 + sum(step * axis for axis, step in zip(axes, (3.1, 5.3, 8.7)))
    inside = np.zeros(SHAPE, bool)
    inside[2:20, 3:16, 1:12] = True
    interior = np.zeros(SHAPE, bool)
    interior[4:18, 5:14, 3:10] = True
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    slope, inside, interior = (nib.apply_orientation(array, change) for array in (slope, inside, interior))
    reference = save(tmp_path / "a_0000.nii.gz", (slope * inside).astype(np.float32), oriented(codes, tilt=0.2)[2])
    intensities = Normalization("ct", low=-1e9, high=1e9, mean=0.0, std=1.0)
    as_they_are = dataclasses.replace(plan(spacing_mm), normalization=(intensities,))
    case = prepare_case(RawCase("a", (reference,), None), as_they_are)
    assert case.grid.shape != tuple(stop - start for start, stop in case.grid.box)
    voxels = torch.from_numpy(case.voxels[0])
    restored = restore(torch.stack([torch.full_like(voxels, 335), voxels]), case.grid, reference)
    assert restored.shape == slope.shape
    wrong = (restored != (slope > 335)) & interior
    assert np.abs(slope[wrong] - 335).max(initial=0) < 1  # less than a third of a voxel from the border
    assert not restored[~inside].any()


def test_logits_are_interpolated_and_not_classes(tmp_path: Path) -> None:
    """A class that is second on both sides of a border wins in the middle of it, which no map of classes says."""
    reference = save(tmp_path / "a_0000.nii.gz", np.ones((8, 2, 2), np.uint8), np.eye(4))
    logits = torch.tensor([[9.0, 9, 0, 0], [0, 0, 9, 9], [6, 6, 6, 6]])[:, None, None, :].expand(3, 2, 2, 4)
    restored = restore(logits, CaseGrid((2, 2, 8), ((0, 2), (0, 2), (0, 8)), (2, 2, 4)), reference)
    assert restored[:, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    logits = logits.clone()
    logits[2] = 7
    restored = restore(logits, CaseGrid((2, 2, 8), ((0, 2), (0, 2), (0, 8)), (2, 2, 4)), reference)
    assert restored[:, 0, 0].tolist() == [0, 0, 0, 2, 2, 1, 1, 1]


def test_the_first_of_equal_classes_wins_and_logits_stay_as_they_are(tmp_path: Path) -> None:
    reference = save(tmp_path / "a_0000.nii.gz", np.ones((2, 2, 2), np.uint8), np.eye(4))
    logits = torch.zeros(3, 2, 2, 2)
    logits[1:, 0] = 1
    before = logits.clone()
    restored = restore(logits, CaseGrid((2, 2, 2), ((0, 2),) * 3, (2, 2, 2)), reference)
    assert restored[:, :, 0].tolist() == [[1, 1], [1, 1]]
    assert restored[:, :, 1].tolist() == [[0, 0], [0, 0]]
    assert torch.equal(logits, before)


def test_maps_on_the_file_are_made_one_class_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = restoring.resample_to
    alive: list[weakref.ref[NDArray[np.float32]]] = []
    most = 0

    def counted(intensities: NDArray[np.float32], shape: tuple[int, int, int]) -> NDArray[np.float32]:
        nonlocal most
        made = original(intensities, shape)
        alive.append(weakref.ref(made))
        most = max(most, sum(reference() is not None for reference in alive))
        return made

    monkeypatch.setattr(restoring, "resample_to", counted)
    reference = save(tmp_path / "a_0000.nii.gz", np.ones((8, 8, 8), np.uint8), np.eye(4))
    restore(torch.randn(12, 4, 4, 4), CaseGrid((8, 8, 8), ((0, 8),) * 3, (4, 4, 4)), reference)
    assert len(alive) == 12
    assert most <= 3


@pytest.mark.parametrize(
    ("stored", "highest", "expected"),
    [
        (np.int16, 2, np.int16),
        (np.uint16, 2, np.uint16),
        (np.int32, 2, np.int32),
        (np.uint8, 255, np.uint8),
        (np.int8, 2, np.int8),
        (np.int8, 200, np.uint8),
        (np.float32, 2, np.uint8),
        (np.float64, 2, np.uint8),
        (np.int64, 2, np.int64),
        (">i2", 2, np.int16),
    ],
)
def test_data_types_of_nifti(stored: str | type, highest: int, expected: type, tmp_path: Path) -> None:
    _, label, affine = oriented("LPI", 0.3)
    label[label == 2] = highest
    image = nib.Nifti1Image(label.astype(stored, copy=False) % 100, affine, dtype=np.dtype(stored))
    nib.save(image, tmp_path / "reference.nii.gz")
    write_segmentation(tmp_path / "a.nii.gz", label, tmp_path / "reference.nii.gz")
    written = nib.load(tmp_path / "a.nii.gz")
    assert written.get_data_dtype() == expected
    assert np.asanyarray(written.dataobj).dtype == expected  # no scaling
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), label)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 2), (0, 1), (4, 0), (0, 0)])
def test_the_header_of_nifti_says_of_the_grid_what_the_reference_says(
    kind: type[nib.Nifti1Image], codes: tuple[int, int], tmp_path: Path
) -> None:
    image, label, affine = oriented("PIR", 0.3)
    reference = kind((image * 1.0)[..., None], affine)
    other = affine.copy()
    other[:3, 3] += 5
    reference.set_qform(affine, codes[0])
    reference.set_sform(other, codes[1])
    reference.header.set_xyzt_units("micron", "sec")
    reference.header["descrip"] = b"Mrs Example"
    reference.header["cal_max"] = 77
    reference.header.set_slope_inter(3, 1)
    reference.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"comment"))
    nib.save(reference, tmp_path / "reference.nii")
    write_segmentation(tmp_path / "a.nii", label, tmp_path / "reference.nii")
    written, stored = nib.load(tmp_path / "a.nii"), nib.load(tmp_path / "reference.nii")
    assert type(written) is kind
    assert written.shape == SHAPE_IN_FILE
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), label)
    np.testing.assert_array_equal(written.affine, stored.affine)
    for name in ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "srow_x", "srow_y", "srow_z"):
        np.testing.assert_array_equal(written.header[name], stored.header[name])
    np.testing.assert_array_equal(written.header["pixdim"][:4], stored.header["pixdim"][:4])
    assert written.header.get_xyzt_units() == ("micron", "unknown")
    assert bytes(written.header["descrip"].item()).strip(b"\0") == b""
    assert float(written.header["cal_max"]) == 0
    assert not written.header.extensions


SHAPE_IN_FILE = oriented("PIR")[0].shape


# nibabel leaves MGH files open until it forgets them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["a.mgh", "a.mgz"])
@pytest.mark.parametrize(("stored", "expected"), [(np.int16, ">i2"), (np.float32, "u1"), (np.uint8, "u1")])
def test_mgh(name: str, stored: type, expected: str, tmp_path: Path) -> None:
    image, label, affine = oriented("LIA", 0.3)
    reference = save(tmp_path / f"reference{Path(name).suffix}", image.astype(stored), affine)
    write_segmentation(tmp_path / name, label, reference)
    written = nib.load(tmp_path / name)
    assert isinstance(written, nib.MGHImage)
    assert written.get_data_dtype() == np.dtype(expected)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), label)
    np.testing.assert_array_equal(written.affine, nib.load(reference).affine)


def test_equal_maps_are_equal_files_and_gzipped_by_name(tmp_path: Path) -> None:
    image, label, affine = oriented("LPI")
    reference = save(tmp_path / "reference.nii.gz", image, affine)
    for name in ("a.nii.gz", "b.nii.gz", "c.nii"):
        write_segmentation(tmp_path / name, label, reference)
    compressed = (tmp_path / "a.nii.gz").read_bytes()
    assert compressed == (tmp_path / "b.nii.gz").read_bytes()
    assert compressed[4:8] == bytes(4)  # no time
    assert gzip.decompress(compressed) == (tmp_path / "c.nii").read_bytes()


def test_a_map_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, label, affine = oriented("RAS")
    reference = save(tmp_path / "reference.nii.gz", image, affine)
    (tmp_path / "a.nii.gz").write_bytes(b"before")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.nii\.gz"):
        write_segmentation(tmp_path / "a.nii.gz", label, reference)
    assert (tmp_path / "a.nii.gz").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "reference.nii.gz"]
