"""Prepared cases on disk: compressed, and any region can be read without reading the rest.

As `s3d.data.store` for pre-training: one blosc2 array a case (`<name>-<hash of what it is made from>.b2nd`, float16
[C, D, H, W]) that carries its own record and some places of each class; beside it its labels (`<...>-labels.b2nd`,
uint8 [D, H, W]); and one `index.json` that lists the cases of a finished preparation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from s3d.data.preparing import random_places, short_hash
from s3d.data.reading import BadImageError
from s3d.data.store import (
    INDEX,
    RECORD,
    SUFFIX,
    compressed,
    damage_named,
    read_record,
    region_of,
    remove_unfinished,
    write_atomically,
)
from s3d.data.workers import sort_out
from s3d.segmentation.plan import Millimetres, SegmentationPlan, Voxels
from s3d.segmentation.prepared_case import CaseGrid, prepare_case
from s3d.segmentation.raw_dataset import RawCase

FORMAT = 2
"""Goes up when preparation or storage changes, so that older files are made again."""
KIND = "segmentation"
PLACES_A_CLASS = 4096
"""Most voxels of a class that are remembered of a case (24 KB)."""
PLACES = "s3d_places_{}"  # of a class


@dataclass(frozen=True)
class StoredLabelledCase:
    """The record of a stored case. Axes are those of `s3d.data.volume.Volume`."""

    name: str  # unique in its store
    file: str  # relative to the store's folder
    label_file: str
    images: tuple[str, ...]  # what it is made from
    label: str
    grid: CaseGrid
    spacing_mm: Millimetres
    background: tuple[float, ...]  # the minimum of each channel: what stands for "nothing there"
    digest: str  # of voxels and labels

    @property
    def shape(self) -> Voxels:
        """Voxels of the prepared case."""
        return self.grid.shape

    @staticmethod
    def from_json(record: dict[str, Any]) -> StoredLabelledCase:
        grid = record["grid"]
        (d, h, w) = (tuple(side) for side in grid["box"])
        return StoredLabelledCase(
            **{
                **record,
                **{name: tuple(record[name]) for name in ("images", "spacing_mm", "background")},
                "grid": CaseGrid(tuple(grid["source_shape"]), (d, h, w), tuple(grid["shape"])),
            }
        )


class CaseStore:
    """Reads regions of the cases that `prepare_dataset` has written; can be pickled, as it holds the index only.

    Args:
        folder: that `prepare_dataset` has filled.
        index: what to read in it, if that is known; default: what the last `prepare_dataset` was asked for.
    Attributes:
        cases: the record of each case.
        classes: how many there are, background included.
        skipped: cases that were left out, and why.
    Raises:
        FileNotFoundError: `folder` holds no finished store.
        ValueError: it is a store of something else, or of another version of this software.
    """

    def __init__(self, folder: str | Path, index: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        file = self.folder / INDEX
        if index is None:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: no such file; the cases are not prepared, or not all: prepare them again"
                )
            index = json.loads(file.read_text(encoding="utf-8"))
        if (index.get("kind"), index.get("format")) != (KIND, FORMAT):
            raise ValueError(
                f"{file}: is a store of kind {index.get('kind')!r} and format {index.get('format')}, not {KIND!r} and "
                f"{FORMAT}; prepare the cases in a new folder"
            )
        self.cases: tuple[StoredLabelledCase, ...] = tuple(map(StoredLabelledCase.from_json, index["cases"]))
        self.classes: int = index["classes"]
        self.skipped: tuple[BadImageError, ...] = tuple(
            BadImageError(record["file"], record["reason"]) for record in index["skipped"]
        )
        self._positions = {case.name: position for position, case in enumerate(self.cases)}

    def __len__(self) -> int:
        return len(self.cases)

    def position(self, name: str) -> int:
        """Where in `cases` the case of a name is; ValueError if it is not in the store."""
        if name not in self._positions:
            raise ValueError(f"{self.folder}: holds no case {name!r}; prepare it into this folder first")
        return self._positions[name]

    def describe(self, names: Sequence[str]) -> list[list[Any]]:
        """What some cases are, in order: name, and digest of voxels and labels."""
        return [[name, self.cases[self.position(name)].digest] for name in names]

    def read(
        self, case: int, start: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """The voxels of a region.

        Args:
            case: position in `cases`.
            start: first voxel (depth, height, width); default the case's first.
            shape: voxels along each axis; default the rest of the case.
        Returns: float32 [C, *shape].
        Raises:
            ValueError: the region does not lie within the case.
            OSError: the file is gone or damaged.
        """
        record = self.cases[case]
        region = region_of(record.name, record.shape, start, shape)
        with damage_named(self.folder / record.file) as array:
            return np.asarray(array[(slice(None), region[0], region[1], region[2])], dtype=np.float32)

    def read_labels(
        self, case: int, start: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> NDArray[np.uint8]:
        """The labels of a region, uint8 `shape`; arguments and errors as for `read`."""
        record = self.cases[case]
        region = region_of(record.name, record.shape, start, shape)
        with damage_named(self.folder / record.label_file) as array:
            return np.asarray(array[region])

    def places(self, case: int) -> dict[int, NDArray[np.uint16]]:
        """Some voxels of each class but the background that the case has: class -> [n, 3], (depth, height, width)."""
        with damage_named(self.folder / self.cases[case].file) as array:
            stored = {value: array.schunk.vlmeta[PLACES.format(value)] for value in range(1, self.classes)}
        return {value: np.frombuffer(text, "<u2").reshape(-1, 3) for value, text in stored.items() if text}


def prepare_dataset(
    cases: Sequence[RawCase],
    plan: SegmentationPlan,
    folder: str | Path,
    *,
    skip_bad: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> CaseStore:
    """Prepares labelled cases (see `prepare_case`) into a folder.

    Can be stopped and run again: a case that is there already is kept, unless its files or what the plan asks for
    have changed. The store then holds exactly `cases`.

    Args:
        cases: with labels.
        plan: spacing, normalisation and classes.
        folder: of the store; made if it is missing.
        skip_bad: leave out cases that cannot be used (`CaseStore.skipped` names them) instead of raising.
        workers: processes that prepare cases beside each other; 0 does it in the caller's. A script that asks for
            workers needs the usual `if __name__ == "__main__":`.
        progress: show a progress bar.
    Raises:
        BadImageError: a case cannot be used and `skip_bad` is off, see `prepare_case`.
        OSError: the disk is full or the folder cannot be written. What was done until then is kept.
        WorkerDiedError: a worker process was killed or crashed; says on which case.
        ValueError: no cases, all are bad, or one has no label or another number of channels than the plan.
    """
    if not cases:
        raise ValueError("cases is empty; at least one labelled case is needed")
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    done: dict[str, StoredLabelledCase] = {}
    bad: dict[str, BadImageError] = {}
    todo: list[_Task] = []
    for case in sorted(cases, key=lambda case: case.name):
        try:
            task = _task(case, plan, folder)
        except BadImageError as error:
            if not skip_bad:
                raise
            bad[case.name] = error
            continue
        stored = _read_stored(task)
        if stored is None:
            todo.append(task)
        else:
            done[case.name] = stored
    if todo:  # the index speaks of files that are about to change
        (folder / INDEX).unlink(missing_ok=True)
    ready = len(done) + len(bad)
    bar = tqdm(total=len(cases), initial=ready, desc="prepare", unit="case", disable=not progress)
    good, unusable = sort_out(_store, todo, workers, skip_bad=skip_bad, bar=bar)
    done |= {task.case.name: case for task, case in good}
    bad |= {task.case.name: error for task, error in unusable}
    if not done:
        raise ValueError(f"all {len(bad)} cases are bad, for example {next(iter(bad.values()))}")
    index = _index(done, bad, plan)
    write_atomically(folder / INDEX, json.dumps(index, indent=1).encode())
    # Not read again: another run may have written its own by now.
    return CaseStore(folder, index)


def open_dataset(cases: Sequence[RawCase], plan: SegmentationPlan, folder: str | Path) -> CaseStore:
    """The store of cases that `prepare_dataset` has prepared for the same plan; writes nothing.

    Raises:
        ValueError: a case is not prepared, nor was it skipped as bad.
    """
    folder = Path(folder)
    skipped = {error.path: error for error in CaseStore(folder).skipped} if (folder / INDEX).is_file() else {}
    done, bad = {}, {}
    for case in cases:
        stored = _read_stored(_task(case, plan, folder))
        if stored is not None:
            done[case.name] = stored
            continue
        known = [skipped[file] for file in (*case.images, case.label) if file in skipped]
        if not known:
            raise ValueError(
                f"case {case.name} is not prepared in {folder}; run the same command in one process with "
                "--prepare-only first"
            )
        bad[case.name] = known[0]
    return CaseStore(folder, _index(done, bad, plan))


def _index(
    done: dict[str, StoredLabelledCase], bad: dict[str, BadImageError], plan: SegmentationPlan
) -> dict[str, Any]:
    return {
        "kind": KIND,
        "format": FORMAT,
        "classes": len(plan.class_names),
        "cases": [dataclasses.asdict(done[name]) for name in sorted(done)],
        "skipped": [{"file": str(bad[name].path), "reason": bad[name].reason} for name in sorted(bad)],
    }


@dataclass(frozen=True)
class _Task:
    """One case that is to be prepared; as text, its first image."""

    case: RawCase
    label: Path
    plan: SegmentationPlan
    folder: Path
    stem: str  # of its files
    made_from: dict[str, Any]  # a file that says it was made from the same need not be made again

    def __str__(self) -> str:
        return str(self.case.images[0])


def _task(case: RawCase, plan: SegmentationPlan, folder: Path) -> _Task:
    """Raises BadImageError if a file is missing."""
    if case.label is None:
        raise ValueError(f"case {case.name} ({case.images[0]}) has no label; only labelled cases can be prepared")
    files = [*case.images, case.label]
    for file in files:
        if not file.is_file():
            raise BadImageError(file, "no such file")
    # A folder may serve several runs: other files or plans under the same name get files of their own.
    key = {
        "kind": KIND,
        "format": FORMAT,
        "spacing_mm": list(plan.spacing_mm),
        "normalization": [dataclasses.asdict(channel) for channel in plan.normalization],
        "class_names": list(plan.class_names),
        "files": [str(file.absolute()) for file in files],
    }
    versions = [[file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    stem = f"{case.name}-{short_hash(json.dumps(key))}"
    return _Task(case, case.label, plan, folder, stem, made_from={**key, "versions": versions})


def _read_stored(task: _Task) -> StoredLabelledCase | None:
    """The record of a complete case that is made from just this; None where there is none."""
    record = read_record(task.folder / f"{task.stem}{SUFFIX}")
    if record is None or record.get("made_from") != task.made_from:
        return None
    case = StoredLabelledCase.from_json(record["case"])
    return case if (task.folder / case.label_file).is_file() else None


def _store(task: _Task) -> StoredLabelledCase | BadImageError:
    """Writes the case, its voxels last: when they are there, it is complete; its record, or what is wrong with it."""
    try:
        prepared = prepare_case(task.case, task.plan)
    except BadImageError as error:
        return error
    assert prepared.labels is not None
    voxels = prepared.voxels.astype(np.float16)
    case = StoredLabelledCase(
        name=task.case.name,
        file=f"{task.stem}{SUFFIX}",
        label_file=f"{task.stem}-labels{SUFFIX}",
        images=tuple(str(image) for image in task.case.images),
        label=str(task.label),
        grid=prepared.grid,
        spacing_mm=prepared.spacing_mm,
        background=tuple(float(channel.min()) for channel in voxels),
        digest=hashlib.sha256(voxels.tobytes() + prepared.labels.tobytes()).hexdigest(),
    )
    array = compressed(voxels)
    array.schunk.vlmeta[RECORD] = json.dumps({"made_from": task.made_from, "case": dataclasses.asdict(case)})
    for value in range(1, len(task.plan.class_names)):
        seed = int(short_hash(f"{task.stem}{value}"), 16)
        places = random_places(prepared.labels == value, PLACES_A_CLASS, seed)
        array.schunk.vlmeta[PLACES.format(value)] = places.astype("<u2").tobytes()
    write_atomically(task.folder / case.label_file, compressed(prepared.labels).to_cframe())
    write_atomically(task.folder / case.file, array.to_cframe())
    return case
