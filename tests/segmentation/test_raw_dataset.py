from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_dataset import ball, describe, save, write_dataset

from s3d.segmentation.raw_dataset import choose_split, default_folds, find_cases, read_class_names, read_raw_dataset


def test_what_is_in_the_folder_is_in_the_data_set(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Balls", cases=2, channels=("T1", "T2"))
    (folder / "imagesTr" / "._case_0_0000.nii.gz").touch()  # of macOS
    dataset = read_raw_dataset(folder)
    assert dataset.name == "Dataset001_Balls"
    assert dataset.channel_names == ("T1", "T2")
    assert dataset.class_names == read_class_names(folder / "dataset.json") == ("background", "shell", "core")
    assert [case.name for case in dataset.training] == ["case_0", "case_1"]
    assert dataset.training[1].images == tuple(folder / "imagesTr" / f"case_1_000{c}.nii.gz" for c in (0, 1))
    assert dataset.training[1].label == folder / "labelsTr" / "case_1.nii.gz"
    images = find_cases(folder / "imagesTr", 2, ".nii.gz")
    assert [(case.name, case.images, case.label) for case in images] == [
        (case.name, case.images, None) for case in dataset.training
    ]


def test_classes_are_in_the_order_of_their_values(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path)
    describe(folder, labels={"core": 2, "background": 0, "shell": 1})
    assert read_raw_dataset(folder).class_names == ("background", "shell", "core")


def _rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


def _remove(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None


def _describe(**changes: object) -> Callable[[Path], None]:
    return lambda folder: describe(folder, **changes)


def _write(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove("dataset.json"), "dataset.json: no such file"),
        (_write("dataset.json", "{"), "dataset.json: is not JSON"),
        (_write("dataset.json", "[]"), "dataset.json: must hold an object"),
        (_describe(file_ending=".png"), "file_ending is '.png'; it must be one of .nii"),
        (_describe(file_ending=".mgz"), "case_0_0000.nii.gz: does not end in '.mgz', the file_ending"),
        (_write("imagesTr/case_3_0000.mha", ""), "case_3_0000.mha: does not end in '.nii.gz', the file_ending"),
        (_rename("labelsTr/case_1.nii.gz", "labelsTr/case_1.nii"), "labelsTr/case_1.nii: does not end in '.nii.gz'"),
        (_rename("labelsTr", "labels"), "labelsTr: no such folder"),
        (_rename("imagesTr", "images"), "imagesTr: no such folder"),
        (_describe(channel_names={"0": "T1", "1": "T2"}), "case_0_0001.nii.gz: no such file; every case needs 2 cha"),
        (_describe(channel_names={"1": "T1"}), "channel_names is {'1': 'T1'}"),
        (_describe(channel_names={}), "channel_names is empty"),
        (_rename("imagesTr/case_1_0000.nii.gz", "imagesTr/case_0_0001.nii.gz"), "case_0_0001.nii.gz: is channel 1"),
        (_rename("imagesTr/case_1_0000.nii.gz", "imagesTr/case_1.nii.gz"), "case_1.nii.gz: its name has no channel nu"),
        (_remove("labelsTr/case_1.nii.gz"), "labelsTr/case_1.nii.gz: no such file; every case"),
        (_remove("imagesTr/case_1_0000.nii.gz"), "labelsTr/case_1.nii.gz: imagesTr holds no image"),
        (_remove("imagesTr/case_1_0000.nii.gz", "labelsTr/case_1.nii.gz"), "numTraining is 3, but imagesTr holds 2"),
        (_describe(dataset={}), "lists files under 'dataset'"),
        (_describe(labels={"background": 0, "core": 1, "ignore": 2}), "label 'ignore' is not supported"),
        (_describe(labels={"background": 0, "whole": [1, 2], "core": 2}), "label 'whole' is a region"),
        (_describe(labels={"0": "background", "1": "core"}), "old format"),
        (_describe(labels={"background": 0, "core": 2}), "without gaps"),
        (_describe(labels={"core": 0, "background": 1}), "0 called 'background'"),
        (_describe(labels={"background": 0}), "has 1 labels"),
        (_describe(labels=["background"]), "must map names to numbers"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    folder = write_dataset(tmp_path)
    read_raw_dataset(folder)
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_raw_dataset(folder)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_beside_the_images_do_not_matter(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path)
    for name in ("case_0_0000.json", "._case_0_0000.nii", "notes.txt"):
        (folder / "imagesTr" / name).touch()
    assert len(read_raw_dataset(folder).training) == 3


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        find_cases(tmp_path, 1, ".nii.gz")


def test_the_default_folds_are_those_of_nnunet() -> None:
    model_selection = pytest.importorskip("sklearn.model_selection")
    for count in (5, 7, 208):
        names = [f"case_{number:03d}" for number in range(count)]
        expected = [
            {"train": [names[row] for row in train], "val": [names[row] for row in validation]}
            for train, validation in model_selection.KFold(5, shuffle=True, random_state=12345).split(names)
        ]
        assert default_folds(names[::-1]) == expected


def test_the_default_folds_are_as_they_were() -> None:
    """What scikit-learn said, where it is not installed."""
    assert [fold["val"] for fold in default_folds(list("abcdefgh"))] == [
        ["d", "h"],
        ["a", "e"],
        ["b", "g"],
        ["f"],
        ["c"],
    ]


def test_splits(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", cases=6, shape=(4, 5, 6))
    dataset = read_raw_dataset(folder)

    def names(*arguments: object) -> tuple[list[str], list[str]]:
        train, validation = choose_split(dataset, *arguments)  # type: ignore[arg-type]
        return [case.name for case in train], [case.name for case in validation]

    everything = [case.name for case in dataset.training]
    assert names("all") == (everything, everything)
    validated = [names(fold)[1] for fold in range(5)]
    assert sorted(itertools.chain(*validated)) == everything
    for fold in range(5):
        train, validation = names(fold)
        assert sorted(train + validation) == everything

    own = [{"train": ["case_3", "case_1"], "val": ["case_0"]}]
    (folder / "splits_final.json").write_text(json.dumps(own))
    assert names(0) == (["case_1", "case_3"], ["case_0"])
    given = tmp_path / "mine.json"
    given.write_text(json.dumps([{"train": ["case_2"], "val": []}]))
    assert names(0, given) == (["case_2"], [])


@pytest.mark.parametrize(
    ("splits", "fold", "message"),
    [
        ([{"train": ["case_0"], "val": ["case_1"]}], 1, r"fold must be 'all' or 0 to 0"),
        ([{"train": ["case_9"], "val": ["case_1"]}], 0, "names the case 'case_9', which is not in"),
        ([{"train": ["case_0"], "val": ["case_0"]}], 0, "'case_0' for training and for validation"),
        ([{"train": [], "val": ["case_0"]}], 0, "has no case for training"),
        ([["case_0"]], 0, "must be a list of"),
        (None, 0, "2 cases are too few for 5 folds"),
    ],
)
def test_a_split_that_does_not_fit_is_named(tmp_path: Path, splits: object, fold: int, message: str) -> None:
    folder = write_dataset(tmp_path, cases=2, shape=(4, 5, 6))
    if splits is not None:
        (folder / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(ValueError, match=message):
        choose_split(read_raw_dataset(folder), fold)


def test_missing_splits_are_named(tmp_path: Path) -> None:
    dataset = read_raw_dataset(write_dataset(tmp_path, cases=1, shape=(4, 5, 6)))
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        choose_split(dataset, 0, tmp_path / "none.json")


def test_two_endings_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path)
    save(folder / "imagesTr" / "case_7_0000.nii", ball((4, 5, 6))[0], np.eye(4))
    with pytest.raises(ValueError, match=r"case_7_0000.nii: does not end in '.nii.gz'"):
        read_raw_dataset(folder)
