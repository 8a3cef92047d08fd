"""Which cases of a data set are for training, for the learning curve and for the test."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from s3d.data.reading import stem
from s3d.segmentation.raw_dataset import RawDataset, choose_split, find_cases, image_files, read_raw_dataset

from .protocol import LabelledDataset


@dataclass(frozen=True)
class LabelledCases:
    """The cases of a data set.

    Attributes:
        images, labels: folders of the test cases.
        training: names of the cases that training and validation are chosen from.
        linked: cases whose files `images` and `labels` must have links to; none where these are the data set's own.
    """

    images: Path
    labels: Path
    training: tuple[str, ...]
    linked: tuple[tuple[tuple[Path, ...], Path], ...]


def labelled_cases(dataset: LabelledDataset, data_dir: Path, links: Path) -> LabelledCases:
    """The test cases are those of imagesTs and labelsTs; where there are no labelsTs, those that nnU-Net's first fold
    leaves out, which are not trained on then.

    Args:
        dataset: of the protocol.
        data_dir: that its folder is relative to.
        links: folder for links to test cases out of imagesTr.
    Raises:
        FileNotFoundError: the data set lacks a file.
        ValueError: it is not as `dataset.json` says, or has too few cases.
    """
    raw = read_raw_dataset(data_dir / dataset.folder)
    images, labels = raw.folder / "imagesTs", raw.folder / "labelsTs"
    if labels.is_dir():
        names = {case.name for case in find_cases(images, len(raw.channel_names), raw.file_ending)}
        missing = sorted(stem(path) for path in image_files(labels) if stem(path) not in names)
        if missing:
            raise FileNotFoundError(f"{labels}: {missing[0]} has no image in {images}; add it or remove the label")
        cases = LabelledCases(images, labels, tuple(case.name for case in raw.training), ())
    else:
        cases = _of_first_fold(raw, links)
    wanted = max((number for number in dataset.labels if number is not None), default=1)
    left = len(cases.training) - dataset.validation_cases
    if left < wanted:
        raise ValueError(
            f"datasets.{dataset.name}: {wanted} training cases are wanted, but {raw.folder} has "
            f"{len(cases.training)} that are not for the test, of which {dataset.validation_cases} are for validation"
        )
    return cases


def _of_first_fold(raw: RawDataset, links: Path) -> LabelledCases:
    training, test = choose_split(raw, 0)
    if not test:
        raise ValueError(f"{raw.folder}: the first fold has no case for validation, and there are no labelsTs: no test")
    linked = tuple((case.images, case.label) for case in test if case.label is not None)
    names = tuple(case.name for case in training)
    return LabelledCases(links / "imagesTs", links / "labelsTs", names, linked)


def link_test_cases(cases: LabelledCases) -> None:
    """Make the links of test cases that lie among those for training, and no other: a case that was for the test under
    other splits may be trained on now."""
    wanted = {file.name for images, label in cases.linked for file in (*images, label)}
    for folder in (cases.images, cases.labels) if cases.linked else ():
        for link in folder.glob("*"):
            if link.name not in wanted:
                link.unlink()
    for images, label in cases.linked:
        for folder, files in ((cases.images, images), (cases.labels, (label,))):
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                link = folder / file.name
                if not link.is_file() or not link.samefile(file):
                    link.unlink(missing_ok=True)  # of data that have moved
                    os.symlink(file.resolve(), link)


def choose_cases(names: tuple[str, ...], labels: int | None, validation: int, seed: int) -> dict[str, list[str]]:
    """Cases for training and validation, as in nnU-Net's splits_final.json.

    Those for validation are the same whatever the seed and the number of labels. Those for training are nested: the 8
    of a seed are among its 16.

    Args:
        names: of all cases.
        labels: how many to train on; None: all that are left.
        validation: how many to validate on.
        seed: of the choice.
    """
    order = sorted(names)
    random.Random(0).shuffle(order)
    held_out, rest = order[:validation], sorted(order[validation:])
    random.Random(seed).shuffle(rest)
    return {"train": sorted(rest[:labels]), "val": sorted(held_out)}
