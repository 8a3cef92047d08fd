"""From what a user names (folders, files, patterns, lists) to a list of image files."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

IMAGE_SUFFIXES = (".nii", ".nii.gz")
ACCEPTED = (
    "a folder (searched recursively), a .nii or .nii.gz file, a glob pattern, a .csv list (column 'image' or 'path') "
    "or a .json list (of paths, or of objects with 'image')"
)


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """The NIfTI files that `inputs` name, as absolute paths, sorted and without duplicates.

    Folders and patterns give the files that exist; names that start with a dot are left out. Lists give what they
    say, whether it exists or not (`preprocess` reports a missing file like any other bad one); relative paths in a
    list are relative to the list. Symbolic links are not followed, so that the names a user knows are kept.

    Args:
        inputs: each one a folder (searched recursively), a .nii or .nii.gz file, a glob pattern (`**` is recursive),
            a .csv list (column `image` or `path`) or a .json list (of paths, or of objects with `image`).
    Returns: absolute paths, sorted.
    Raises:
        TypeError: `inputs` is one string or path, not a sequence of them.
        ValueError: an input matches nothing, is a file of another kind, or is a list that cannot be read so.
    """
    if isinstance(inputs, (str, Path)):
        raise TypeError(f"inputs must be a sequence of paths, got the single {type(inputs).__name__} {str(inputs)!r}")
    if not inputs:
        raise ValueError(f"inputs is empty; each input is {ACCEPTED}")
    found: set[str] = set()
    for given in inputs:
        images = [os.path.abspath(image) for image in _expand(given)]
        if not images:
            raise ValueError(f"inputs: {str(given)!r} matches no .nii or .nii.gz file; an input is {ACCEPTED}")
        found.update(images)
    return [Path(image) for image in sorted(found)]


def is_image(path: str | Path) -> bool:
    """Whether the file name is that of a NIfTI image."""
    return os.fspath(path).lower().endswith(IMAGE_SUFFIXES)


def _expand(given: str | Path) -> Iterable[str | Path]:
    path = Path(given).expanduser()
    if path.is_dir():
        return _visible_images(path.rglob("*"))
    if path.is_file():
        suffix = path.suffix.lower()
        if is_image(path):
            return [path]
        if suffix == ".csv":
            return _listed(path, _csv_entries(path))
        if suffix == ".json":
            return _listed(path, _json_entries(path))
        raise ValueError(f"inputs: {str(given)!r} is a {suffix or 'suffix-less'} file; an input is {ACCEPTED}")
    return _visible_images(Path(match) for match in glob.glob(str(path), recursive=True))


def _visible_images(paths: Iterable[Path]) -> list[Path]:
    # Names with a leading dot are no images: macOS leaves '._x.nii.gz' beside 'x.nii.gz' on foreign file systems.
    return [path for path in paths if is_image(path) and not path.name.startswith(".") and path.is_file()]


def _listed(listing: Path, entries: list[str]) -> list[Path]:
    images = [listing.parent / Path(entry).expanduser() for entry in entries]
    for image in images:
        if not is_image(image):
            raise ValueError(f"inputs: list {str(listing)!r} has the entry {str(image)!r}; entries are .nii or .nii.gz")
    return images


def _csv_entries(listing: Path) -> list[str]:
    try:
        with listing.open(newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines)
            columns = table.fieldnames or []
            column = next((name for name in ("image", "path") if name in columns), None)
            if column is None:
                raise ValueError(
                    f"inputs: list {str(listing)!r} has the columns {list(columns)}; one must be 'image' or 'path'"
                )
            return [row[column] for row in table if row[column]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"inputs: list {str(listing)!r} is no readable csv file: {error}") from error


def _json_entries(listing: Path) -> list[str]:
    try:
        entries = json.loads(listing.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"inputs: list {str(listing)!r} is no readable json file: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"inputs: list {str(listing)!r} holds a {type(entries).__name__}; it must hold a list")
    images = []
    for entry in entries:
        image = entry.get("image") if isinstance(entry, dict) else entry
        if not isinstance(image, str):
            raise ValueError(f"inputs: list {str(listing)!r}: {entry!r} is neither a path nor an object with 'image'")
        images.append(image)
    return images
