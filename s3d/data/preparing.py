"""Images -> a store: the loop over images, in several processes, that can be stopped and run again at any time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from s3d.data.reading import BadImageError, stem
from s3d.data.source import ImageSource
from s3d.data.store import (
    FORMAT,
    INDEX,
    SUFFIX,
    StoredCase,
    read_case,
    remove_unfinished,
    write_atomically,
    write_case,
)
from s3d.data.volume import check_spacing, load_volume
from s3d.data.workers import sort_out

FOREGROUND_PLACES = 4096
"""Most voxels of the foreground that are remembered of a volume (24 KB, 1 % of a head), ..."""
VOXELS_A_PLACE = 256
"""... and not more than one for so many voxels, as small volumes are stored in little more."""


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
    images: Sequence[str | os.PathLike[str]],
    folder: str | Path,
    *,
    spacing_mm: float | Sequence[float] | None = 1.0,
    skip_bad: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> PreprocessSummary:
    """Brings images into a store (see `load_volume` for what is done to each) that `VolumeStore` reads.

    Resumable: a case that is there already is kept, unless its source or a mask of it changed (size or modification
    time) or another spacing is wanted. The store then holds exactly `images`; files of cases that are not among them
    stay in the folder, unlisted, and are used again if asked for. While cases are being written there is no index, so
    that an unfinished store cannot be mistaken for a finished one. Bad images are tried again each time.

    Args:
        images: as `find_images` gives them, or plain paths.
        folder: the store; made if it is missing.
        spacing_mm: voxel size in mm, one number or (depth, height, width); None keeps each image's own.
        skip_bad: leave bad images out (the summary and the index name them) instead of raising.
        workers: processes that prepare images beside each other; 0 does it in the caller's. Each needs memory for a
            few copies of a volume. A script that asks for workers needs the usual `if __name__ == "__main__":`.
        progress: show a progress bar.
    Returns: how many cases were written, reused and skipped, and which were skipped why.
    Raises:
        BadImageError: an image cannot be used and `skip_bad` is off; missing ones are noticed before any is read.
            What was done until then is kept.
        OSError: the disk is full or the folder cannot be written. What was done until then is kept.
        WorkerDiedError: a worker process was killed or crashed; says on which image. What was done is kept.
        ValueError: no images, all images are bad, or an argument is out of range.
    """
    wanted_mm = check_spacing(spacing_mm)
    if isinstance(images, (str, Path)):
        raise TypeError(f"images must be a sequence of paths, got the single {type(images).__name__} {str(images)!r}")
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    sources = list({str(source): source for source in map(_source, images)}.values())
    if not sources:
        raise ValueError("images is empty; preprocess needs at least one image file")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)

    done: dict[int, StoredCase] = {}
    bad: dict[int, BadImageError] = {}
    todo: list[_Task] = []
    for number, (name, source) in enumerate(zip(case_names(sources), sources)):
        try:
            task = _task(number, folder, name, source, wanted_mm)
        except BadImageError as error:
            if not skip_bad:
                raise
            bad[number] = error
            continue
        stored = read_case(folder, task.file, task.made_from)
        if stored is None:
            todo.append(task)
        else:
            # The name depends on what else is in the store, and whose image it is on what the user says today.
            done[number] = dataclasses.replace(stored, name=name, subject=source.subject, session=source.session)
    reused = len(done)

    bar = tqdm(total=len(sources), initial=reused + len(bad), desc="preprocess", unit="image", disable=not progress)
    good, unusable = sort_out(_store, todo, workers, skip_bad=skip_bad, bar=bar)
    done |= {task.number: case for task, case in good}
    bad |= {task.number: error for task, error in unusable}
    errors = [bad[number] for number in sorted(bad)]
    if not done:
        raise ValueError(f"all {len(errors)} images are bad, for example {errors[0]}")
    index = {
        "format": FORMAT,
        "wanted_spacing_mm": wanted_mm,
        "cases": [dataclasses.asdict(done[number]) for number in sorted(done)],
        "skipped": [{"source": str(error.path), "reason": error.reason} for error in errors],
    }
    write_atomically(folder / INDEX, json.dumps(index, indent=1).encode())
    return PreprocessSummary(folder=folder, written=len(done) - reused, reused=reused, bad=tuple(errors))


def case_names(sources: Sequence[ImageSource]) -> list[str]:
    """A unique name for each of some different images: the file's own, with as many of its folders as it takes.

    `a/t1.nii.gz`, `b/t1.nii.gz`, `b/t2.nii` -> `a__t1`, `b__t1`, `t2`. Unique also where case is ignored in file names.
    """
    parts = [[*source.path.parts[1:-1], _last_part(source)] for source in sources]
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
        names[row] += "-" + short_hash(str(sources[row]))
    return names


def _last_part(source: ImageSource) -> str:
    # A folder may hold many series, whose own names are 64 digits long.
    return stem(source.path) if source.series is None else f"{source.path.name}-{short_hash(source.series)}"


def short_hash(text: str) -> str:
    """8 hexadecimal digits that stand for a text."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


@dataclass(frozen=True)
class _Task:
    """One image that is to be brought in; as text, the image."""

    number: int
    folder: Path
    name: str
    source: ImageSource
    wanted_mm: tuple[float, float, float] | None
    file: str
    made_from: dict[str, Any]  # a file that says it was made from the same need not be made again

    def __str__(self) -> str:
        return str(self.source)


def _source(image: str | os.PathLike[str]) -> ImageSource:
    return image if isinstance(image, ImageSource) else ImageSource(Path(os.path.abspath(image)))


def _task(
    number: int, folder: Path, name: str, source: ImageSource, wanted_mm: tuple[float, float, float] | None
) -> _Task:
    """Raises BadImageError if a file is missing."""
    # A folder may serve several runs: other sources or spacings under the same name get files of their own.
    key = {
        "format": FORMAT,
        "wanted_spacing_mm": None if wanted_mm is None else list(wanted_mm),
        "sources": [str(file) for file in source.files],
        "series": source.series,
        "anatomy_mask": source.anatomy_mask is not None,
    }
    size, changed_ns = _size_and_time(source)
    return _Task(
        number,
        folder,
        name,
        source,
        wanted_mm,
        file=f"{name}-{short_hash(json.dumps(key))}{SUFFIX}",
        made_from={**key, "source_bytes": size, "source_mtime_ns": changed_ns},
    )


def _size_and_time(source: ImageSource) -> tuple[int, int]:
    """Bytes of all files of an image and the time in ns of the last change to any."""
    sizes, times = [], []
    for given in source.files:
        in_folder = source.series is not None and given == source.path and given.is_dir()
        files = [file for file in (given.iterdir() if in_folder else [given]) if file.is_file()]
        if not files:
            raise BadImageError(given, "no such file")
        for file in files:
            stat = file.stat()
            sizes.append(stat.st_size)
            times.append(stat.st_mtime_ns)
    return sum(sizes), max(times)


def _store(task: _Task) -> StoredCase | BadImageError:
    """Writes the case; its record, or what is wrong with its image."""
    try:
        volume = load_volume(task.source, task.wanted_mm)
    except BadImageError as error:
        return error
    voxels = volume.voxels.astype(np.float16)
    case = StoredCase(
        name=task.name,
        file=task.file,
        source=str(task.source.path),
        source_bytes=task.made_from["source_bytes"],
        source_mtime_ns=task.made_from["source_mtime_ns"],
        source_shape=volume.source_shape,
        source_spacing_mm=volume.source_spacing_mm,
        shape=(voxels.shape[0], voxels.shape[1], voxels.shape[2]),
        spacing_mm=volume.spacing_mm,
        affine=tuple(tuple(row) for row in volume.affine.tolist()),
        mean=volume.mean,
        std=volume.std,
        background=float(voxels.min()),
        subject=task.source.subject,
        session=task.source.session,
        series=task.source.series,
        anonymised_file=None if volume.anonymised is None else f"{task.file.removesuffix(SUFFIX)}-anonymised{SUFFIX}",
    )
    foreground = random_places(volume.foreground, _most_places(volume.foreground), seed=int(short_hash(task.file), 16))
    write_case(task.folder, task.made_from, case, voxels, foreground, volume.anonymised)
    return case


def _most_places(mask: NDArray[np.bool_]) -> int:
    return min(FOREGROUND_PLACES, -(-mask.size // VOXELS_A_PLACE))


def random_places(mask: NDArray[np.bool_], most: int, seed: int) -> NDArray[np.uint16]:
    """Random voxels of a mask, [n, 3]; all of them if they are not more than `most`."""
    inside = np.flatnonzero(mask)
    if len(inside) > most:
        inside = np.random.default_rng(seed).choice(inside, most, replace=False, shuffle=False)
    return np.stack(np.unravel_index(inside, mask.shape), axis=-1).astype(np.uint16)
