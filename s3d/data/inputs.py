"""From what a user names (folders, files, patterns, lists) to a list of images."""

from __future__ import annotations

import csv
import dataclasses
import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s3d.data import bids, dicom
from s3d.data.nnssl import nnssl_images
from s3d.data.reading import is_image
from s3d.data.source import ImageSource

KINDS = ".nii, .nii.gz, .mgh or .mgz"
ACCEPTED = (
    f"a folder (searched recursively for {KINDS} files and DICOM series), such a file, a glob pattern, a .csv list "
    "(column 'image' or 'path') or a .json list (of paths, of objects with 'image', or a pretrain_data.json of nnssl)"
)


def find_images(inputs: Sequence[str | Path]) -> list[ImageSource]:
    """The images that `inputs` name, with absolute paths, sorted and without duplicates.

    - Folders and patterns give the NIfTI (.nii, .nii.gz) and MGH (.mgh, .mgz) files and DICOM series that exist; names
      that start with a dot are left out. A pattern that matches a folder gives the DICOM series right in it.
    - In a BIDS data set, anywhere below a given folder, only anatomical raw images are taken: neither `derivatives`
      and `sourcedata` nor `func`, `dwi` and the like. To have those, name them. Subject and session come from the
      folders `sub-*` and `ses-*`.
    - Lists give what they say, whether it exists or not (`preprocess` reports a missing file like any other bad one);
      relative paths in a list are relative to the list. Columns, or keys of objects, are `image` (or `path`) and, if
      known, `subject`, `session`, `anatomy_mask`, `anonymisation_mask`.
    - Of an image that several inputs name is known what any of them says. Where they differ, a list counts more than
      names of folders, and the last list most. What is the mask of an image is no image itself.

    Symbolic links are not resolved, so that the names a user knows are kept, and links to folders are not entered.

    Args:
        inputs: each one a folder, an image file, a glob pattern (`**` is recursive), a .csv list or a .json list (of
            paths, of objects, or a `pretrain_data.json` of nnssl).
    Returns: images, sorted by path; each can be used as a path.
    Raises:
        TypeError: `inputs` is one string or path, not a sequence of them.
        ValueError: an input matches nothing, is a file of another kind, or is a list that cannot be read so.
    """
    if isinstance(inputs, (str, Path)):
        raise TypeError(f"inputs must be a sequence of paths, got the single {type(inputs).__name__} {str(inputs)!r}")
    if not inputs:
        raise ValueError(f"inputs is empty; each input is {ACCEPTED}")
    found: dict[tuple[str, str], ImageSource] = {}
    for given in sorted(inputs, key=_is_list):  # what a list says replaces what is known from names of folders
        images = [_absolute(image) for image in _expand(given)]
        if not images:
            raise ValueError(f"inputs: {str(given)!r} matches no {KINDS} file or DICOM series; an input is {ACCEPTED}")
        for image in images:
            key = (str(image.path), image.series or "")
            found[key] = _joined(found[key], image) if key in found else image
    masks = {mask for image in found.values() for mask in image.files[1:]}
    return [found[key] for key in sorted(found) if found[key].path not in masks]


def _is_list(given: str | Path) -> bool:
    return Path(given).suffix.lower() in (".csv", ".json")


def _expand(given: str | Path) -> Iterable[ImageSource]:
    path = Path(given).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        suffix = path.suffix.lower()
        if is_image(path):
            return [_image_file(path)]
        if suffix == ".csv":
            return _csv_images(path)
        if suffix == ".json":
            return _json_images(path)
        raise ValueError(f"inputs: {str(given)!r} is a {suffix or 'suffix-less'} file; an input is {ACCEPTED}")
    images: list[ImageSource] = []
    for match in map(Path, glob.glob(str(path), recursive=True)):
        images += dicom.series_of(match) if match.is_dir() else _image_files([match])
    return images


def _in_folder(folder: Path) -> list[ImageSource]:
    images: list[ImageSource] = []
    for place, folders, files in os.walk(folder):
        skipped = bids.left_out(Path(os.path.abspath(place)), files, folders)
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        images += _image_files(Path(place, file) for file in files if not bids.NO_IMAGE.search(file))
        images += dicom.series_of(Path(place))
    return images


def _image_files(paths: Iterable[Path]) -> list[ImageSource]:
    # Names with a leading dot are no images: macOS leaves '._x.nii.gz' beside 'x.nii.gz' on foreign file systems.
    return [_image_file(path) for path in paths if is_image(path) and not path.name.startswith(".") and path.is_file()]


def _image_file(path: Path) -> ImageSource:
    subject, session = bids.subject_and_session(Path(os.path.abspath(path)))
    return ImageSource(path, subject=subject, session=session)


def _absolute(image: ImageSource) -> ImageSource:
    def absolute(path: Path | None) -> Path | None:
        return None if path is None else Path(os.path.abspath(path))

    return dataclasses.replace(
        image,
        path=Path(os.path.abspath(image.path)),
        anatomy_mask=absolute(image.anatomy_mask),
        anonymisation_mask=absolute(image.anonymisation_mask),
    )


def _joined(before: ImageSource, after: ImageSource) -> ImageSource:
    """What both say of one image; `after` counts where they differ."""
    known = {field.name: getattr(after, field.name) for field in dataclasses.fields(after)}
    return dataclasses.replace(before, **{name: value for name, value in known.items() if value is not None})


def _csv_images(listing: Path) -> list[ImageSource]:
    try:
        with listing.open(newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines)
            columns = table.fieldnames or []
            if not {"image", "path"} & set(columns):
                raise ValueError(
                    f"inputs: list {str(listing)!r} has the columns {list(columns)}; one must be 'image' or 'path'"
                )
            rows = [row for row in table if row.get("image") or row.get("path")]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"inputs: list {str(listing)!r} is no readable csv file: {error}") from error
    return [image for row in rows for image in _listed(listing, row)]


def _json_images(listing: Path) -> list[ImageSource]:
    try:
        entries = json.loads(listing.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"inputs: list {str(listing)!r} is no readable json file: {error}") from error
    if isinstance(entries, dict) and "datasets" in entries:
        images = nnssl_images(listing, entries)
        for image in images:
            _check_kind(listing, image.path)
        return images
    if not isinstance(entries, list):
        raise ValueError(
            f"inputs: list {str(listing)!r} holds a {type(entries).__name__}; it must hold a list, or the 'datasets' "
            "of a pretrain_data.json of nnssl"
        )
    return [
        image for entry in entries for image in _listed(listing, {"image": entry} if isinstance(entry, str) else entry)
    ]


def _listed(listing: Path, entry: Mapping[str, Any]) -> list[ImageSource]:
    """The images of one entry of a list: one, or all DICOM series if it names a folder."""
    path = (entry.get("image") or entry.get("path")) if isinstance(entry, dict) else None
    if not isinstance(path, str):
        raise ValueError(f"inputs: list {str(listing)!r}: {entry!r} is neither a path nor an object with 'image'")

    def mask(*names: str) -> Path | None:
        given = next((entry[name] for name in names if entry.get(name)), None)
        return None if given is None else listing.parent / Path(given).expanduser()

    def text(name: str) -> str | None:
        return None if entry.get(name) in (None, "") else str(entry[name])

    place = listing.parent / Path(path).expanduser()
    if place.is_dir():
        images = dicom.series_of(place)
        if not images:
            raise ValueError(
                f"inputs: list {str(listing)!r} has the entry {str(place)!r}, a folder without DICOM files"
            )
    else:
        _check_kind(listing, place)
        images = [_image_file(place)]
    said = ImageSource(
        place,
        subject=text("subject"),
        session=text("session"),
        anatomy_mask=mask("anatomy_mask"),
        anonymisation_mask=mask("anonymisation_mask", "anonymization_mask"),
    )
    return [_joined(image, said) for image in images]


def _check_kind(listing: Path, path: Path) -> None:
    if not is_image(path):
        raise ValueError(f"inputs: list {str(listing)!r} has the entry {str(path)!r}; entries are {KINDS} files")
