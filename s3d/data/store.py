"""Preprocessed volumes on disk: compressed, and any region can be read without reading the rest.

One blosc2 array a case (`<name>-<hash of what it is made from>.b2nd`), which carries its own record (source, shape,
affine, statistics) and some places of foreground; beside it, where parts of the image were made unrecognisable, a
mask of them (`<...>-anonymised.b2nd`); and one `index.json` that lists the records of a finished `preprocess`. The
files are the truth and the index is made from them, so an interrupted run loses only the cases it was working on.

Voxels are stored as float16: z-scored intensities keep 11 significant bits, which is the depth of the scanners'
own integers, for half the bytes of float32 at the same reading speed (see docs/data.md). They are read as float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from s3d.data.reading import BadImageError

FORMAT = 2
"""Goes up when preprocessing or storage changes, so that older files are made again."""
INDEX = "index.json"
SUFFIX = ".b2nd"
RECORD = "s3d_case"
FOREGROUND = "s3d_foreground"
UNFINISHED = ".tmp"

# Blocks are what is decompressed as a whole: a patch reads at most one block more than itself along each axis. Smaller
# ones cost compression and speed (8^3: 16 % larger and half as fast). Chunks are what is looked up in the file.
CHUNK_SIDE = 64
BLOCK_SIDE = 16
# Level 5 is 2 % smaller, reads no faster and writes three times as slowly.
COMPRESSION_LEVEL = 1


@dataclass(frozen=True)
class StoredCase:
    """The record of one stored volume. Axes are (depth, height, width) as in `Volume`."""

    name: str  # unique in its store
    file: str  # relative to the store's folder
    source: str  # absolute path of the image, or of the folder of a DICOM series
    source_bytes: int  # masks included
    source_mtime_ns: int
    source_shape: tuple[int, int, int]  # in canonical orientation, before cropping
    source_spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]  # 4 x 4, (width, height, depth, 1) of a voxel -> RAS+ millimetres
    mean: float  # of the intensities before they were normalised
    std: float
    background: float  # the volume's minimum: what stands for "nothing there"
    subject: str | None = None  # None: not known
    session: str | None = None
    series: str | None = None  # SeriesInstanceUID of a DICOM series
    anonymised_file: str | None = None  # relative to the store's folder; None: nothing is anonymised

    @staticmethod
    def from_json(record: dict[str, Any]) -> StoredCase:
        triples = ("source_shape", "source_spacing_mm", "shape", "spacing_mm")
        return StoredCase(
            **{
                **record,
                **{name: tuple(record[name]) for name in triples},
                "affine": tuple(tuple(row) for row in record["affine"]),
            }
        )


class VolumeStore:
    """Reads regions of the volumes that `preprocess` has written.

    Holds the index only: each read opens the file anew (0.15 ms), so that a store can be pickled, and used by
    forked or spawned workers and by threads. Each read runs on one thread; use several workers.

    Args:
        folder: a folder that `preprocess` has filled.
    Attributes:
        cases: the record of each volume.
        spacing_mm: voxel size that all were resampled to, (depth, height, width); None: each has its own.
        skipped: images that were left out, and why.
        has_anonymised: whether any volume has voxels that belong into no loss.
    Raises:
        FileNotFoundError: `folder` holds no finished store.
        ValueError: it was written by another version of this software.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index_file = self.folder / INDEX
        if not index_file.is_file():
            raise FileNotFoundError(
                f"folder {str(folder)!r} has no {INDEX}: it is no store, or its preprocessing did not finish "
                "(run it again; what is done is not redone)"
            )
        index = json.loads(index_file.read_text(encoding="utf-8"))
        if index.get("format") != FORMAT:
            raise ValueError(
                f"folder {str(folder)!r} has store format {index.get('format')}, this version reads {FORMAT}; "
                "preprocess the images again"
            )
        self.cases: tuple[StoredCase, ...] = tuple(StoredCase.from_json(record) for record in index["cases"])
        spacing_mm: Sequence[float] | None = index["wanted_spacing_mm"]
        self.spacing_mm = None if spacing_mm is None else tuple(spacing_mm)
        self.skipped: tuple[BadImageError, ...] = tuple(
            BadImageError(record["source"], record["reason"]) for record in index["skipped"]
        )
        self.has_anonymised = any(case.anonymised_file is not None for case in self.cases)

    def __len__(self) -> int:
        return len(self.cases)

    def read(
        self, case: int, start: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """The voxels of a region.

        Args:
            case: position in `cases`.
            start: first voxel (depth, height, width); default the volume's first.
            shape: voxels along each axis; default the rest of the volume.
        Returns: float32 `shape`.
        Raises:
            IndexError: there is no such case.
            ValueError: the region does not lie within the volume.
            OSError: the file is gone or damaged.
        """
        record, region = self._region(case, start, shape)
        with damage_named(self.folder / record.file) as array:
            return np.asarray(array[region], dtype=np.float32)

    def read_anonymised(
        self, case: int, start: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> NDArray[np.bool_] | None:
        """Which voxels of a region were made unrecognisable; arguments and errors as for `read`.

        Returns: bool `shape`, or None where the volume has no such voxel.
        """
        record, region = self._region(case, start, shape)
        if record.anonymised_file is None:
            return None
        with damage_named(self.folder / record.anonymised_file) as array:
            return np.asarray(array[region], dtype=bool)

    def foreground(self, case: int) -> NDArray[np.uint16]:
        """Some voxels of the foreground, drawn uniformly: [n, 3], n may be 0, (depth, height, width) each.

        Foreground is the anatomy mask or, where the image came without, what is brighter than the volume's mean.
        """
        record, _ = self._region(case, None, None)
        with damage_named(self.folder / record.file) as array:
            return np.frombuffer(array.schunk.vlmeta[FOREGROUND], dtype="<u2").reshape(-1, 3)

    def _region(
        self, case: int, start: Sequence[int] | None, shape: Sequence[int] | None
    ) -> tuple[StoredCase, tuple[slice, ...]]:
        if not 0 <= case < len(self.cases):
            raise IndexError(f"case must be 0 to {len(self.cases) - 1}, got {case}")
        record = self.cases[case]
        return record, region_of(record.name, record.shape, start, shape)


def region_of(
    name: str, volume_shape: Sequence[int], start: Sequence[int] | None, shape: Sequence[int] | None
) -> tuple[slice, ...]:
    """The slices of a region that begins at `start` (None: 0) and has a shape (None: all the rest).

    Raises:
        ValueError: the region does not lie within the volume of the case `name`.
    """
    begin = (0, 0, 0) if start is None else tuple(start)
    size = tuple(side - first for side, first in zip(volume_shape, begin)) if shape is None else tuple(shape)
    within = len(begin) == len(size) == 3 and all(
        first >= 0 and length >= 1 and first + length <= side for first, length, side in zip(begin, size, volume_shape)
    )
    if not within:
        raise ValueError(
            f"start {begin} and shape {size} do not describe a region of case {name!r}, whose shape is {volume_shape}"
        )
    return tuple(slice(first, first + length) for first, length in zip(begin, size))


def decompressed_voxels(start: Sequence[int], shape: Sequence[int], volume_shape: Sequence[int]) -> int:
    """How many voxels are decompressed to read a region: those of every block that it touches."""
    block = [min(BLOCK_SIDE, side) for side in volume_shape]
    return math.prod(
        min(-(-(first + length) // side) * side, whole) - first // side * side
        for first, length, side, whole in zip(start, shape, block, volume_shape)
    )


def write_case(
    folder: Path,
    made_from: dict[str, Any],
    case: StoredCase,
    voxels: NDArray[np.float16],  # [D, H, W]
    foreground: NDArray[np.uint16],  # [n, 3]
    anonymised: NDArray[np.bool_] | None,  # [D, H, W]
) -> None:
    """Writes the files of a case, that of the voxels last: when it is there, the case is complete.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing unfinished is left under a final name.
    """
    array = compressed(voxels)
    array.schunk.vlmeta[RECORD] = json.dumps({"made_from": made_from, "case": dataclasses.asdict(case)})
    array.schunk.vlmeta[FOREGROUND] = foreground.astype("<u2").tobytes()
    # The index speaks of files that are about to change.
    (folder / INDEX).unlink(missing_ok=True)
    if case.anonymised_file is not None and anonymised is not None:
        write_atomically(folder / case.anonymised_file, compressed(anonymised).to_cframe())
    write_atomically(folder / case.file, array.to_cframe())


def read_case(folder: Path, file: str, made_from: dict[str, Any]) -> StoredCase | None:
    """The record of a complete case that is made from just this; None where there is none."""
    record = read_record(folder / file)
    if record is None or record.get("made_from") != made_from:
        return None
    case = StoredCase.from_json(record["case"])
    if case.anonymised_file is not None and not (folder / case.anonymised_file).is_file():
        return None
    return case


def compressed(values: NDArray[Any]) -> blosc2.NDArray:
    """[D, H, W], or [C, D, H, W] of channels that can be read apart, in blocks and in memory."""
    chunk = (1,) * (values.ndim - 3) + tuple(min(CHUNK_SIDE, side) for side in values.shape[-3:])
    return blosc2.asarray(
        values,
        chunks=chunk,
        blocks=tuple(min(BLOCK_SIDE, side) for side in chunk),
        cparams={
            "codec": blosc2.Codec.ZSTD,
            "clevel": COMPRESSION_LEVEL,
            "filters": [blosc2.Filter.SHUFFLE],
            "nthreads": 1,
        },
    )


def read_record(file: Path) -> dict[str, Any] | None:
    """What a case file says of itself; None where there is no file, or none that can be read."""
    if not file.is_file():
        return None
    try:
        array = open_array(file)  # by a name: the records die with it
        record: dict[str, Any] = json.loads(array.schunk.vlmeta[RECORD])
    except (RuntimeError, ValueError, KeyError):  # a damaged or foreign file is written anew
        return None
    return record


@contextlib.contextmanager
def damage_named(file: Path) -> Iterator[blosc2.NDArray]:
    """The open array; what blosc2 says of a damaged file becomes an OSError that names it."""
    try:
        yield open_array(file)
    except (RuntimeError, FileNotFoundError) as error:
        raise OSError(
            f"{file} is damaged or gone; prepare the same images in this folder again, which makes only this one anew"
        ) from error


def open_array(file: Path) -> blosc2.NDArray:
    """The array of a file, to be read on one thread."""
    # One thread: blosc2's thread pool would not survive a fork.
    return blosc2.open(str(file), mode="r", dparams={"nthreads": 1})


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left behind; what is younger than a day may belong to one that is alive."""
    for left in folder.glob(f".*{UNFINISHED}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 86_400:
                left.unlink()


def write_atomically(file: Path, content: bytes) -> None:
    """`file` is either as it was before or complete, whenever the process or the machine stops.

    Raises:
        OSError: the disk is full or the folder cannot be written; says what to do.
    """
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        with unfinished.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, file)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OSError(
            f"cannot write {file} ({len(content) / 1e6:.1f} MB): {error.strerror or error}; "
            f"{'free some space there' if full else 'make its folder writable'} and run the same command again: what "
            "is done is kept"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
