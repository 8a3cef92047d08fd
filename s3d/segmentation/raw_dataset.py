"""A data set in the raw layout of nnU-Net v2: which images, which labels, which classes, which split.

Source: nnU-Net, documentation/dataset_format.md (Isensee et al., Nature Methods 2021).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from s3d.data.reading import IMAGE_SUFFIXES, is_image

FOLDS = 5
MOST_CLASSES = 256  # labels are stored in one byte


@dataclass(frozen=True)
class RawCase:
    """The files of a case.

    Attributes:
        name: unique in its data set; the file names without channel number and ending.
        images: one a channel, in the order of the channels.
        label: the segmentation; None where there is none.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class RawDataset:
    """A labelled data set.

    Attributes:
        folder: that holds it.
        name: of the folder.
        channel_names: in the order of the files `_0000`, `_0001`, ...
        class_names: of label value 0 (background), 1, ...
        file_ending: of images and labels, such as ".nii.gz".
        training: the cases with labels, sorted by name.
    """

    folder: Path
    name: str
    channel_names: tuple[str, ...]
    class_names: tuple[str, ...]
    file_ending: str
    training: tuple[RawCase, ...]


def read_raw_dataset(folder: str | Path) -> RawDataset:
    """The data set of a folder with `dataset.json`, `imagesTr` and `labelsTr`; no image is opened.

    Raises:
        FileNotFoundError: a folder or file is missing, such as a channel or the label of a case.
        ValueError: `dataset.json` says something that is not supported, or files are not named as it says.
    """
    folder = Path(folder)
    file = folder / "dataset.json"
    description = _read_description(file)
    class_names = _class_names(file, description)
    channel_names = _channel_names(file, description)
    file_ending = description.get("file_ending")
    if file_ending not in IMAGE_SUFFIXES:
        raise ValueError(
            f"{file}: file_ending is {file_ending!r}; it must be one of {', '.join(IMAGE_SUFFIXES)}, convert the images"
        )
    if "dataset" in description:
        raise ValueError(
            f"{file}: lists files under 'dataset', which is not supported; put them into imagesTr and labelsTr and "
            "remove the entry"
        )
    images = find_cases(folder / "imagesTr", len(channel_names), file_ending)
    labels = folder / "labelsTr"
    _check_files(labels, file_ending)
    training = tuple(RawCase(case.name, case.images, labels / f"{case.name}{file_ending}") for case in images)
    for case in training:
        if case.label is not None and not case.label.is_file():
            raise FileNotFoundError(
                f"{case.label}: no such file; every case of imagesTr needs a label of its name, without channel number"
            )
    surplus = sorted({path.name for path in image_files(labels)} - {case.name + file_ending for case in images})
    if surplus:
        raise FileNotFoundError(
            f"{labels / surplus[0]}: imagesTr holds no image of this label; add it as "
            f"{surplus[0].removesuffix(file_ending)}_0000{file_ending} or remove the label"
        )
    expected = description.get("numTraining", len(training))
    if expected != len(training):
        raise ValueError(
            f"{file}: numTraining is {expected}, but imagesTr holds {len(training)} cases; add what is missing or "
            "correct the number"
        )
    return RawDataset(folder, folder.resolve().name, channel_names, class_names, file_ending, training)


def find_cases(folder: Path, channels: int, file_ending: str) -> tuple[RawCase, ...]:
    """The cases of a folder of images `<name>_0000.nii.gz`, `<name>_0001.nii.gz`, ..., sorted by name, without labels.

    Args:
        folder: that holds the images, such as `imagesTs`.
        channels: that each case must have.
        file_ending: of the images, such as ".nii.gz".
    Raises:
        FileNotFoundError: there is no such folder, no image in it, or a channel of a case is missing.
        ValueError: a file has another ending, no channel number or one too many.
    """
    _check_files(folder, file_ending)
    files = image_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder}: holds no images; put files like case_0000{file_ending} into it")
    found: dict[str, dict[int, Path]] = {}
    for path in files:
        parts = re.fullmatch(r"(.+)_(\d{4})", path.name.removesuffix(file_ending))
        if parts is None:
            raise ValueError(
                f"{path}: its name has no channel number; the first channel must be called "
                f"{path.name.removesuffix(file_ending)}_0000{file_ending}"
            )
        found.setdefault(parts[1], {})[int(parts[2])] = path
    for name, images in found.items():
        missing = [channel for channel in range(channels) if channel not in images]
        if missing:
            raise FileNotFoundError(
                f"{folder / f'{name}_{missing[0]:04d}{file_ending}'}: no such file; every case needs {channels} "
                f"channel{'s' if channels > 1 else ''}, and {name} has {len(images)}"
            )
        if len(images) > channels:
            raise ValueError(
                f"{images[max(images)]}: is channel {max(images)} where there are {channels} (counted from 0); remove "
                "the file or name the channel in dataset.json"
            )
    return tuple(
        RawCase(name, tuple(images[channel] for channel in range(channels)), None)
        for name, images in sorted(found.items())
    )


def read_class_names(dataset_json: Path) -> tuple[str, ...]:
    """The names of the label values 0, 1, ... of a `dataset.json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the labels are not whole numbers from 0 on, each with a name.
    """
    return _class_names(dataset_json, _read_description(dataset_json))


def choose_split(
    dataset: RawDataset, fold: int | Literal["all"], splits: Path | None = None
) -> tuple[tuple[RawCase, ...], tuple[RawCase, ...]]:
    """The training and validation cases of a fold.

    Args:
        dataset: that is split.
        fold: number of the split, from 0; "all" takes all cases for both sides.
        splits: a file in the format of nnU-Net's `splits_final.json`; None takes the one of the data set's folder or,
            without one, nnU-Net's own 5 folds.
    Raises:
        FileNotFoundError: `splits` is missing.
        ValueError: no such fold, too few cases for 5 folds, or a split that does not fit the data set.
    """
    if fold == "all":
        return dataset.training, dataset.training
    own = dataset.folder / "splits_final.json"
    file = splits if splits is not None else own if own.is_file() else None
    if file is not None:
        folds = _read_json(file)
        pairs = isinstance(folds, list) and all(
            isinstance(split, dict) and {"train", "val"} <= split.keys() for split in folds
        )
        if not pairs:
            raise ValueError(f'{file}: must be a list of {{"train": [names], "val": [names]}}, as nnU-Net writes it')
    else:
        names = [case.name for case in dataset.training]
        if len(names) < FOLDS:
            raise ValueError(
                f"{dataset.folder}: {len(names)} cases are too few for {FOLDS} folds; use fold 'all' or add a "
                "splits_final.json"
            )
        folds = default_folds(names)
    if not 0 <= fold < len(folds):
        raise ValueError(f"fold must be 'all' or 0 to {len(folds) - 1}, as there are {len(folds)} splits, got {fold}")
    train, val = ([str(name) for name in folds[fold][side]] for side in ("train", "val"))
    known = {case.name: case for case in dataset.training}
    for name in (*train, *val):
        if name not in known:
            raise ValueError(f"{file}: fold {fold} names the case {name!r}, which is not in {dataset.folder}/imagesTr")
    both = sorted(set(train) & set(val))
    if both:
        raise ValueError(
            f"{file}: fold {fold} has the case {both[0]!r} for training and for validation; remove it from one"
        )
    if not train:
        raise ValueError(f"{file}: fold {fold} has no case for training; add some")
    return tuple(known[name] for name in sorted(set(train))), tuple(known[name] for name in sorted(set(val)))


def default_folds(names: list[str]) -> list[dict[str, list[str]]]:
    """nnU-Net's own split: scikit-learn's KFold(5, shuffle=True, random_state=12345) of the sorted names."""
    names = sorted(names)
    order = np.arange(len(names))
    np.random.RandomState(12345).shuffle(order)  # what scikit-learn does
    folds = []
    for validation in np.array_split(order, FOLDS):
        chosen = set(validation.tolist())
        folds.append(
            {
                "train": [name for place, name in enumerate(names) if place not in chosen],
                "val": [name for place, name in enumerate(names) if place in chosen],
            }
        )
    return folds


def image_files(folder: Path) -> list[Path]:
    """The images right in a folder, sorted."""
    # Names that begin with a dot are what macOS leaves beside files.
    return sorted(path for path in folder.iterdir() if is_image(path) and not path.name.startswith("."))


def _check_files(folder: Path, file_ending: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; it must hold files that end in {file_ending}")
    for path in sorted(folder.iterdir()):
        # An image of another format, such as case_0000.mha, is known by its channel number.
        numbered = re.search(r"_\d{4}\.", path.name) is not None and path.suffix != ".json"
        if (numbered or is_image(path)) and not path.name.startswith(".") and not path.name.endswith(file_ending):
            raise ValueError(
                f"{path}: does not end in {file_ending!r}, the file_ending of dataset.json; convert or remove the "
                "file, or correct file_ending"
            )


def _read_json(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{file}: is not JSON ({error}); correct or restore the file") from error


def _read_description(file: Path) -> dict[str, Any]:
    description = _read_json(file)
    if not isinstance(description, dict):
        raise ValueError(f"{file}: must hold an object with channel_names, labels and file_ending")
    return description


def _channel_names(file: Path, description: dict[str, Any]) -> tuple[str, ...]:
    channels = description.get("channel_names")
    if not isinstance(channels, dict) or set(channels) != {str(channel) for channel in range(len(channels))}:
        raise ValueError(
            f'{file}: channel_names is {channels!r}; it must name each channel by its number, as in {{"0": "MRI"}}'
        )
    if not channels:
        raise ValueError(f'{file}: channel_names is empty; name at least one channel, as in {{"0": "MRI"}}')
    return tuple(str(channels[str(channel)]) for channel in range(len(channels)))


def _class_names(file: Path, description: dict[str, Any]) -> tuple[str, ...]:
    labels = description.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise ValueError(
            f'{file}: labels is {labels!r}; it must map names to numbers, as in {{"background": 0, "tumour": 1}}'
        )
    if "ignore" in labels:
        raise ValueError(f"{file}: the label 'ignore' is not supported; remove it from labels and from the files")
    for name, value in labels.items():
        if isinstance(value, (list, tuple)):
            raise ValueError(
                f"{file}: label {name!r} is a region ({value}), which is not supported; give every class one number"
            )
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(
                f"{file}: label {name!r} has the value {value!r}; labels must map names to whole numbers (the other "
                "way round is the old format: convert it with nnUNetv2_convert_MSD_dataset)"
            )
    by_value = {value: name for name, value in labels.items()}
    if sorted(labels.values()) != list(range(len(labels))) or by_value[0] != "background":
        raise ValueError(f"{file}: labels are {labels}; they must be 0, 1, 2, ... without gaps, 0 called 'background'")
    if not 2 <= len(labels) <= MOST_CLASSES:
        raise ValueError(f"{file}: has {len(labels)} labels; 2 to {MOST_CLASSES} are supported")
    return tuple(by_value[value] for value in range(len(labels)))
