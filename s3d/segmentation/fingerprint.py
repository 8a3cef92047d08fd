"""What plans are made from: voxel sizes, shapes and, of CT, the intensities of the training cases.

Source: nnU-Net's DatasetFingerprintExtractor (Isensee et al., Nature Methods 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from s3d.data.preparing import short_hash
from s3d.data.reading import BadImageError, spacing_of
from s3d.data.workers import sort_out
from s3d.segmentation.plan import Millimetres
from s3d.segmentation.prepared_case import crop_case
from s3d.segmentation.raw_dataset import RawCase, RawDataset

VOXELS_A_CASE = 10_000
"""Foreground voxels of a case whose intensities count."""


@dataclass(frozen=True)
class Fingerprint:
    """Of the training cases of a data set; rows are cases, axes (depth, height, width)."""

    spacings_mm: NDArray[np.float64]  # [n, 3]
    shapes: NDArray[np.int64]  # [n, 3], after cropping
    foreground: NDArray[np.float32]  # [C, voxels], intensities of some voxels of any class but the background


def read_fingerprint(
    dataset: RawDataset, *, skip_bad: bool = False, workers: int = 0, progress: bool = True
) -> Fingerprint:
    """Reads all training cases of a data set.

    Args:
        dataset: whose training cases are read.
        skip_bad: leave out cases that cannot be used instead of raising.
        workers: processes that read cases beside each other; 0 does it in the caller's.
        progress: show a progress bar.
    Raises:
        BadImageError: a case cannot be used and `skip_bad` is off, see `prepared_case.prepare_case`.
        ValueError: all cases are bad.
        WorkerDiedError: a worker process was killed or crashed; says on which case.
    """
    tasks = [_Task(case, dataset.class_names) for case in dataset.training]
    bar = tqdm(total=len(tasks), desc="plan", unit="case", disable=not progress)
    good, bad = sort_out(_read, tasks, workers, skip_bad=skip_bad, bar=bar)
    if not good:
        raise ValueError(f"all {len(tasks)} training cases of {dataset.folder} are bad, for example {bad[-1][1]}")
    facts = [fact for _, fact in sorted(good, key=lambda read: read[0].case.name)]
    return Fingerprint(
        spacings_mm=np.array([fact.spacing_mm for fact in facts]),
        shapes=np.array([fact.shape for fact in facts]),
        foreground=np.concatenate([fact.foreground for fact in facts], axis=1),
    )


@dataclass(frozen=True)
class _Task:
    """One case that is to be read; as text, its first image."""

    case: RawCase
    class_names: Sequence[str]

    def __str__(self) -> str:
        return str(self.case.images[0])


@dataclass(frozen=True)
class _Facts:
    spacing_mm: Millimetres
    shape: tuple[int, ...]
    foreground: NDArray[np.float32]  # [C, n]


def _read(task: _Task) -> _Facts | BadImageError:
    try:
        cropped = crop_case(task.case, task.class_names)
    except BadImageError as error:
        return error
    assert cropped.labels is not None
    inside = np.flatnonzero(cropped.labels)
    if len(inside) > VOXELS_A_CASE:
        rng = np.random.default_rng(int(short_hash(task.case.name), 16))
        inside = rng.choice(inside, VOXELS_A_CASE, replace=False)
    return _Facts(
        spacing_mm=spacing_of(cropped.affine),
        shape=cropped.images.shape[1:],
        foreground=cropped.images.reshape(len(cropped.images), -1)[:, inside],
    )
