from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from small_dataset import save, write_dataset

from s3d.data import BadImageError
from s3d.segmentation import case_store
from s3d.segmentation.case_store import CaseStore, open_dataset, prepare_dataset
from s3d.segmentation.plan import SegmentationPlan
from s3d.segmentation.planning import fixed_plan
from s3d.segmentation.prepared_case import prepare_case
from s3d.segmentation.raw_dataset import RawCase, RawDataset, read_raw_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> RawDataset:
    return read_raw_dataset(write_dataset(tmp_path / "raw", channels=("T1", "T2"), spacing_mm=(1.2, 1.0, 1.5)))


@pytest.fixture
def plan(dataset: RawDataset) -> SegmentationPlan:
    return fixed_plan(dataset, "tiny", 1.0, (8, 8, 8))


def prepare(dataset: RawDataset, plan: SegmentationPlan, folder: Path, **options: object) -> CaseStore:
    return prepare_dataset(dataset.training, plan, folder, progress=False, **options)  # type: ignore[arg-type]


def spoil(dataset: RawDataset, number: int) -> None:
    """An empty label."""
    label = dataset.training[number].label
    assert label is not None
    stored = nib.load(label)
    save(label, np.zeros(stored.shape, np.uint8), stored.affine)


def test_what_is_stored_is_the_prepared_case(dataset: RawDataset, plan: SegmentationPlan, tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(prepare(dataset, plan, tmp_path / "store")))
    assert [case.name for case in store.cases] == ["case_0", "case_1", "case_2"]
    assert store.classes == 3
    for number, raw in enumerate(dataset.training):
        case, prepared = store.cases[number], prepare_case(raw, plan)
        assert store.position(raw.name) == number
        assert (case.grid, case.spacing_mm, case.shape) == (prepared.grid, prepared.spacing_mm, prepared.grid.shape)
        assert (case.images, case.label) == (tuple(map(str, raw.images)), str(raw.label))
        np.testing.assert_allclose(store.read(number), prepared.voxels, rtol=2**-10, atol=1e-4)
        np.testing.assert_array_equal(store.read_labels(number), prepared.labels)
        assert case.background == tuple(store.read(number).min(axis=(1, 2, 3)))


def test_a_region_is_that_part_of_the_case(dataset: RawDataset, plan: SegmentationPlan, tmp_path: Path) -> None:
    store = prepare(dataset, plan, tmp_path / "store")
    start, shape = (3, 0, 5), (4, 9, 2)
    region = tuple(slice(first, first + length) for first, length in zip(start, shape))
    np.testing.assert_array_equal(store.read(1, start, shape), store.read(1)[(slice(None), *region)])
    np.testing.assert_array_equal(store.read_labels(1, start, shape), store.read_labels(1)[region])
    with pytest.raises(ValueError, match="do not describe a region of case 'case_1'"):
        store.read(1, (3, 0, 5), (4, 90, 2))
    with pytest.raises(ValueError, match="holds no case 'case_9'"):
        store.position("case_9")


def test_places_are_voxels_of_their_class(
    dataset: RawDataset, plan: SegmentationPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepare(dataset, plan, tmp_path / "store")
    labels = store.read_labels(0)
    assert set(store.places(0)) == {1, 2}
    for value, places in store.places(0).items():
        assert len({tuple(place) for place in places.tolist()}) == len(places) == (labels == value).sum()
        assert (labels[tuple(places.T)] == value).all()
    monkeypatch.setattr(case_store, "PLACES_A_CLASS", 7)
    few = prepare(dataset, plan, tmp_path / "few").places(0)
    assert [len(places) for places in few.values()] == [7, 7]


def test_a_class_that_a_case_lacks_has_no_places(dataset: RawDataset, plan: SegmentationPlan, tmp_path: Path) -> None:
    label = dataset.training[1].label
    assert label is not None
    stored = nib.load(label)
    save(label, np.where(stored.get_fdata() == 2, 2, 0).astype(np.uint8), stored.affine)
    assert set(prepare(dataset, plan, tmp_path / "store").places(1)) == {2}


def test_only_what_changed_is_made_again(dataset: RawDataset, plan: SegmentationPlan, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    prepare(dataset, plan, folder)

    def changed() -> set[str]:
        before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.b2nd")}
        prepare(dataset, plan, folder)
        after = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.b2nd")}
        return {name for name in after if before.get(name) != after[name]}

    assert changed() == set()
    label = dataset.training[1].label
    assert label is not None
    stored = nib.load(label)
    save(label, (stored.get_fdata() > 0).astype(np.uint8), stored.affine)
    os.utime(label, ns=(1, 1))
    assert len(changed()) == 2
    assert set(np.unique(CaseStore(folder).read_labels(1))) == {0, 1}
    next(folder.glob("case_2-*-labels.b2nd")).unlink()
    assert len(changed()) == 2
    next(folder.glob("case_0-????????.b2nd")).write_bytes(b"damaged")
    assert len(changed()) == 2


def test_another_plan_in_the_same_folder_gets_its_own_files(
    dataset: RawDataset, plan: SegmentationPlan, tmp_path: Path
) -> None:
    fine = prepare(dataset, plan, tmp_path / "store")
    coarse = prepare(dataset, dataclasses.replace(plan, spacing_mm=(2.0, 2.0, 2.0)), tmp_path / "store")
    assert coarse.cases[0].shape == tuple(round(side / 2) for side in fine.cases[0].shape)
    assert fine.read(0).shape[1:] == fine.cases[0].shape  # still there


def test_a_store_is_opened_where_all_is_prepared(dataset: RawDataset, plan: SegmentationPlan, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with pytest.raises(ValueError, match=r"case case_0 is not prepared in .*; run .* --prepare-only first"):
        open_dataset(dataset.training, plan, folder)
    assert not folder.exists()
    spoil(dataset, 1)
    store = prepare(dataset, plan, folder, skip_bad=True)
    before = sorted(file.stat().st_mtime_ns for file in folder.iterdir())
    opened = open_dataset(dataset.training, plan, folder)
    assert opened.cases == store.cases
    assert [error.path for error in opened.skipped] == [dataset.training[1].label]
    np.testing.assert_array_equal(opened.read(1), store.read(1))
    assert sorted(file.stat().st_mtime_ns for file in folder.iterdir()) == before
    with pytest.raises(ValueError, match=r"case case_0 is not prepared"):
        open_dataset(dataset.training, dataclasses.replace(plan, spacing_mm=(2.0, 2.0, 2.0)), folder)


def test_processes_make_the_same_store(dataset: RawDataset, plan: SegmentationPlan, tmp_path: Path) -> None:
    one, two = prepare(dataset, plan, tmp_path / "one"), prepare(dataset, plan, tmp_path / "two", workers=2)
    assert one.cases == two.cases
    for case in range(3):
        np.testing.assert_array_equal(one.read(case), two.read(case))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_case_stops_or_is_left_out(
    dataset: RawDataset, plan: SegmentationPlan, tmp_path: Path, workers: int
) -> None:
    folder = tmp_path / "store"
    prepare(dataset, plan, folder)
    spoil(dataset, 1)
    with pytest.raises(BadImageError, match=r"labelsTr/case_1\.nii\.gz: is empty"):
        prepare(dataset, plan, folder, workers=workers)
    with pytest.raises(FileNotFoundError, match="the cases are not prepared"):
        CaseStore(folder)
    store = prepare(dataset, plan, folder, workers=workers, skip_bad=True)
    assert [case.name for case in store.cases] == ["case_0", "case_2"]
    assert [(error.path, "is empty" in error.reason) for error in store.skipped] == [(dataset.training[1].label, True)]


def test_what_cannot_be_prepared_is_refused(dataset: RawDataset, plan: SegmentationPlan, tmp_path: Path) -> None:
    for number in range(3):
        spoil(dataset, number)
    with pytest.raises(ValueError, match="all 3 cases are bad, for example"):
        prepare(dataset, plan, tmp_path / "store", skip_bad=True)
    with pytest.raises(ValueError, match="cases is empty"):
        prepare_dataset([], plan, tmp_path / "store")
    unlabelled = RawCase("x", dataset.training[0].images, None)
    with pytest.raises(ValueError, match=r"case x \(.*\) has no label"):
        prepare_dataset([unlabelled], plan, tmp_path / "store")
    gone = RawCase("x", (tmp_path / "gone.nii.gz",) * 2, dataset.training[0].label)
    with pytest.raises(BadImageError, match=r"gone\.nii\.gz: no such file"):
        prepare_dataset([gone], plan, tmp_path / "store")


def test_a_store_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"format": 2, "cases": []}')
    with pytest.raises(ValueError, match="is a store of kind None and format 2"):
        CaseStore(tmp_path)


def test_a_damaged_file_is_named(dataset: RawDataset, plan: SegmentationPlan, tmp_path: Path) -> None:
    store = prepare(dataset, plan, tmp_path / "store")
    for file in (store.cases[0].file, store.cases[0].label_file):
        (store.folder / file).write_bytes(b"damaged")
    for read in (store.read, store.read_labels, store.places):
        with pytest.raises(OSError, match=r"case_0-.* is damaged or gone"):
            read(0)
