"""Preprocessed volumes on disk: compressed, and any region can be read without reading the rest.

One blosc2 array a case (`<name>-<hash of source and spacing>.b2nd`), which carries its own record (source, shape,
affine, statistics), and one `index.json` that lists the records of a finished `preprocess`. The files are the truth
and the index is made from them, so an interrupted run loses only the case it was working on.

Voxels are stored as float16: z-scored intensities keep 11 significant bits, which is the depth of the scanners'
own integers, for half the bytes of float32 at the same reading speed (see docs/data.md). They are read as float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from s3d.data.volume import BadImageError, check_spacing, load_volume

FORMAT = 1
"""Goes up when preprocessing or storage changes, so that older files are made again."""
INDEX = "index.json"
SUFFIX = ".b2nd"
RECORD = "s3d_case"

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
    source: str  # absolute path of the image
    source_bytes: int
    source_mtime_ns: int
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]  # 4 x 4, (width, height, depth, 1) of a voxel -> RAS+ millimetres
    mean: float  # of the intensities before they were normalised
    std: float
    background: float  # the volume's minimum: what stands for "nothing there"

    @staticmethod
    def from_json(record: dict[str, Any]) -> StoredCase:
        return StoredCase(
            **{
                **record,
                "shape": tuple(record["shape"]),
                "spacing_mm": tuple(record["spacing_mm"]),
                "affine": tuple(tuple(row) for row in record["affine"]),
            }
        )


@dataclass(frozen=True)
class PreprocessSummary:
    """What `preprocess` did; `str(summary)` is for people."""

    folder: Path
    written: int
    reused: int  # done by an earlier run
    bad: tuple[BadImageError, ...]  # each with .path and .reason

    @property
    def skipped(self) -> int:
        return len(self.bad)

    def __str__(self) -> str:
        head = f"{self.written} written, {self.reused} reused, {self.skipped} skipped in {self.folder}"
        return "\n".join([head, *(f"  skipped {error}" for error in self.bad)])


def preprocess(
    images: Sequence[str | Path],
    folder: str | Path,
    *,
    spacing_mm: float | Sequence[float] | None = 1.0,
    skip_bad: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> PreprocessSummary:
    """Brings images into a store (see `load_volume` for what is done to each) that `VolumeStore` reads.

    Resumable: a case that is there already is kept, unless its source changed (size or modification time) or
    another spacing is wanted. The store then holds exactly `images`; files of cases that are not among them stay in
    the folder, unlisted, and are used again if asked for. While cases are being written there is no index, so that
    an unfinished store cannot be mistaken for a finished one. Bad images are tried again each time.

    Args:
        images: image files, as `find_images` gives them.
        folder: the store; made if it is missing.
        spacing_mm: voxel size in mm, one number or (depth, height, width); None keeps each image's own.
        skip_bad: leave bad images out (the summary and the index name them) instead of raising.
        workers: threads that prepare images beside each other (decompression, resampling and compression run outside
            Python's lock); 0 does it in the caller's thread. Each needs memory for a few copies of a volume.
        progress: show a progress bar.
    Returns: how many cases were written, reused and skipped, and which were skipped why.
    Raises:
        BadImageError: an image cannot be used and `skip_bad` is off. What was done until then is kept.
        ValueError: no images, all images are bad, or an argument is out of range.
    """
    wanted_mm = check_spacing(spacing_mm)
    if isinstance(images, (str, Path)):
        raise TypeError(f"images must be a sequence of paths, got the single {type(images).__name__} {str(images)!r}")
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    sources = [Path(path) for path in dict.fromkeys(os.path.abspath(image) for image in images)]
    if not sources:
        raise ValueError("images is empty; preprocess needs at least one image file")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def bring_in(name: str, source: Path) -> tuple[StoredCase, bool] | BadImageError:
        try:
            return _store_case(folder, name, source, wanted_mm)
        except BadImageError as error:
            if not skip_bad:
                raise
            return error

    cases: list[StoredCase] = []
    bad: list[BadImageError] = []
    reused = 0
    with contextlib.ExitStack() as stack:
        run: Callable[..., Iterator[Any]] = stack.enter_context(ThreadPoolExecutor(workers)).map if workers else map
        outcomes = run(bring_in, case_names(sources), sources)
        for outcome in tqdm(outcomes, total=len(sources), desc="preprocess", unit="image", disable=not progress):
            if isinstance(outcome, BadImageError):
                bad.append(outcome)
            else:
                cases.append(outcome[0])
                reused += outcome[1]
    if not cases:
        raise ValueError(f"all {len(bad)} images are bad, for example {bad[0]}")
    index = {
        "format": FORMAT,
        "wanted_spacing_mm": wanted_mm,
        "cases": [dataclasses.asdict(case) for case in cases],
        "skipped": [{"source": str(error.path), "reason": error.reason} for error in bad],
    }
    _write_atomically(folder / INDEX, json.dumps(index, indent=1).encode())
    return PreprocessSummary(folder=folder, written=len(cases) - reused, reused=reused, bad=tuple(bad))


class VolumeStore:
    """Reads regions of the volumes that `preprocess` has written.

    Holds the index only: each read opens the file anew (0.15 ms), so that a store can be pickled, and used by
    forked or spawned workers and by threads. Each read runs on one thread; use several workers.

    Args:
        folder: a folder that `preprocess` has filled.
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
        index = json.loads(index_file.read_text())
        if index.get("format") != FORMAT:
            raise ValueError(
                f"folder {str(folder)!r} has store format {index.get('format')}, this version reads {FORMAT}; "
                "preprocess the images again"
            )
        self.cases: tuple[StoredCase, ...] = tuple(StoredCase.from_json(record) for record in index["cases"])
        self.skipped: tuple[BadImageError, ...] = tuple(
            BadImageError(record["source"], record["reason"]) for record in index["skipped"]
        )

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
        """
        if not 0 <= case < len(self.cases):
            raise IndexError(f"case must be 0 to {len(self.cases) - 1}, got {case}")
        record = self.cases[case]
        begin = (0, 0, 0) if start is None else tuple(start)
        size = tuple(side - first for side, first in zip(record.shape, begin)) if shape is None else tuple(shape)
        within = len(begin) == len(size) == 3 and all(
            first >= 0 and length >= 1 and first + length <= side
            for first, length, side in zip(begin, size, record.shape)
        )
        if not within:
            raise ValueError(
                f"start {begin} and shape {size} do not describe a region of case {record.name!r}, whose shape is "
                f"{record.shape}"
            )
        array = _open_array(self.folder / record.file)
        region = array[tuple(slice(first, first + length) for first, length in zip(begin, size))]
        return np.asarray(region, dtype=np.float32)


def case_names(sources: Sequence[Path]) -> list[str]:
    """A unique name for each of some different files: the file's own, with as many of its folders as it takes.

    `a/t1.nii.gz`, `b/t1.nii.gz`, `b/t2.nii` -> `a__t1`, `b__t1`, `t2`. Unique also where case is ignored in file names.
    """
    parts = [[*source.parts[1:-1], _stem(source)] for source in sources]
    used = [1] * len(sources)  # how many trailing parts make the name
    while True:
        names = ["__".join(part[-count:]) for part, count in zip(parts, used)]
        counts = Counter(name.casefold() for name in names)
        clashing = [row for row, name in enumerate(names) if counts[name.casefold()] > 1]
        longer = [row for row in clashing if used[row] < len(parts[row])]
        if not longer:
            break
        for row in longer:
            used[row] += 1
    for row in clashing:  # x.nii beside x.nii.gz, or paths that differ in case only
        names[row] += "-" + hashlib.sha256(os.fsencode(sources[row])).hexdigest()[:8]
    return names


def _stem(source: Path) -> str:
    name = source.name
    for suffix in (".nii.gz", ".nii"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return source.stem


def _store_case(
    folder: Path, name: str, source: Path, wanted_mm: tuple[float, float, float] | None
) -> tuple[StoredCase, bool]:
    """The record of the case, and whether it was there already."""
    if not source.is_file():
        raise BadImageError(source, "no such file")
    stat = source.stat()
    made_from = {
        "format": FORMAT,
        "wanted_spacing_mm": None if wanted_mm is None else list(wanted_mm),
        "source": str(source),
        "source_bytes": stat.st_size,
        "source_mtime_ns": stat.st_mtime_ns,
    }
    # A folder may serve several runs: other sources or spacings under the same name get files of their own.
    key = json.dumps([made_from["source"], made_from["wanted_spacing_mm"], FORMAT])
    file = folder / f"{name}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:8]}{SUFFIX}"
    stored = _read_record(file)
    if stored is not None and stored["made_from"] == made_from:
        # The name depends on what else is in the store.
        return dataclasses.replace(StoredCase.from_json(stored["case"]), name=name), True

    volume = load_volume(source, wanted_mm)
    voxels = volume.voxels.astype(np.float16)
    case = StoredCase(
        name=name,
        file=file.name,
        source=str(source),
        source_bytes=stat.st_size,
        source_mtime_ns=stat.st_mtime_ns,
        shape=(voxels.shape[0], voxels.shape[1], voxels.shape[2]),
        spacing_mm=volume.spacing_mm,
        affine=tuple(tuple(row) for row in volume.affine.tolist()),
        mean=volume.mean,
        std=volume.std,
        background=float(voxels.min()),
    )
    chunk = tuple(min(CHUNK_SIDE, side) for side in case.shape)
    array = blosc2.asarray(
        voxels,
        chunks=chunk,
        blocks=tuple(min(BLOCK_SIDE, side) for side in chunk),
        cparams={
            "codec": blosc2.Codec.ZSTD,
            "clevel": COMPRESSION_LEVEL,
            "filters": [blosc2.Filter.SHUFFLE],
            "nthreads": 1,
        },
    )
    array.schunk.vlmeta[RECORD] = json.dumps({"made_from": made_from, "case": dataclasses.asdict(case)})
    # The index speaks of files that are about to change.
    (folder / INDEX).unlink(missing_ok=True)
    _write_atomically(file, array.to_cframe())
    return case, False


def _read_record(file: Path) -> dict[str, Any] | None:
    """What a case file says of itself; None where there is no file, or none that can be read."""
    if not file.is_file():
        return None
    try:
        array = _open_array(file)  # by a name: the records die with it
        record: dict[str, Any] = json.loads(array.schunk.vlmeta[RECORD])
    except (RuntimeError, ValueError, KeyError):  # a damaged or foreign file is written anew
        return None
    return record


def _open_array(file: Path) -> blosc2.NDArray:
    # One thread: blosc2's thread pool would not survive a fork.
    return blosc2.open(str(file), mode="r", dparams={"nthreads": 1})


def _write_atomically(file: Path, content: bytes) -> None:
    """`file` is either as it was before or complete, whenever the process or the machine stops."""
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
