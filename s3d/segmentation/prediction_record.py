"""prediction.json: what the segmentations of a folder were made with, so that a folder never holds a mixture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s3d.data.reading import is_image
from s3d.data.store import write_atomically
from s3d.segmentation.raw_dataset import RawCase

RECORD = "prediction.json"
BYTES = "image_bytes"  # of each case, by name: what tells other images of the same name, wherever they lie


def begin_predictions(
    folder: Path, settings: dict[str, Any], cases: Mapping[Path, RawCase], overwrite: bool = False
) -> None:
    """Make the output folder, or make sure that what it has is what would be made again.

    Args:
        folder: of the segmentations.
        settings: that they depend on, plain JSON types.
        cases: of each segmentation that is to be there in the end.
        overwrite: remove those that are there.
    Raises:
        ValueError: the folder holds segmentations of something else, or of other settings or images.
    """
    there = {path: case for path, case in cases.items() if path.exists()}
    file = folder / RECORD
    before = _read(file)
    if there and before is None:
        raise ValueError(
            f"output_dir {folder} holds {next(iter(there)).name} but no {RECORD}, so `s3d predict` did not write it; "
            "give another folder, or remove the file"
        )
    before = before or {**settings, BYTES: {}}
    differing = [name for name, value in settings.items() if before.get(name) != value]
    known: dict[str, list[int]] = before.get(BYTES, {})
    now = {case.name: [image.stat().st_size for image in case.images] for case in cases.values()}
    if not overwrite:
        if differing:
            named = ", ".join(f"{name} {before.get(name)!r} (now {settings[name]!r})" for name in differing)
            raise ValueError(
                f"output_dir {folder} was begun with {named}; give another folder, or --overwrite to do all of it again"
            )
        for path, case in there.items():
            if known.get(case.name) != now[case.name]:
                raise ValueError(
                    f"{path} was not made from {case.images[0]} as it is now, whose size differs; give another "
                    "output_dir, or --overwrite to do all of it again"
                )
    elif differing and folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if is_image(path) and path not in cases)
        if others:
            raise ValueError(
                f"output_dir {folder} holds {others[0]} too, which is not among these cases and was made with another "
                f"{differing[0]}; give another folder, or remove the file"
            )
    if overwrite:
        for path in there:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({**settings, BYTES: {**known, **now}}, indent=2).encode())


def _read(file: Path) -> dict[str, Any] | None:
    """The record; None where there is none."""
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # UnicodeDecodeError too
        record = None
    if not isinstance(record, dict) or not isinstance(record.get(BYTES, {}), dict):
        raise ValueError(
            f"{file}: is damaged, so it does not say what the segmentations beside it were made with; remove it with "
            "them, or give another output_dir"
        )
    return record
