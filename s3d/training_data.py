"""The volumes of a run, and the order in which its processes read patches of them."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from .data import PatchDataset, SpatialAugmentation, VolumeStore, find_images, preprocess, split_cases
from .distributed import Processes
from .pretext.registry import METHODS
from .pretrain_config import PretrainConfig
from .run_settings import RunSettings
from .stop_signals import ignore_stop_signals

log = logging.getLogger(__name__)


def prepare_volumes(config: PretrainConfig, processes: Processes) -> tuple[VolumeStore, list[int], list[int]]:
    """Open the volumes; preprocess images that are not yet. Returns: volumes, those for training, for validation.

    Raises:
        ValueError: neither volumes nor images are given, or images to several processes.
        FileNotFoundError: ``volumes`` is no folder that `s3d preprocess` has filled.
        BadImageError: an image cannot be used (and not ``skip_bad``).
    """
    folder = config.volumes
    if folder is None:
        if not config.images:
            raise ValueError("give volumes (a folder that `s3d preprocess` has filled) or images")
        if processes.world > 1:
            raise ValueError(
                f"images go with one process, not with {processes.world}: preprocess them first, with "
                "`s3d preprocess`, and give volumes"
            )
        folder = config.output_dir / "volumes"
        summary = preprocess(
            find_images(config.images),
            folder,
            spacing_mm=config.spacing_mm,
            skip_bad=config.skip_bad,
            workers=config.workers,
        )
        log.info("%s", summary)
    store = VolumeStore(folder)
    return store, *split_cases(store, config.validation_fraction, config.seed)


class StepOrder(Sampler[list[int]]):
    """Numbers of the samples that a process reads, one list for each part of each step.

    Sample i of the run is the same whoever reads it: step s has the samples from s * batch_size on, and the processes
    share them evenly.

    Args:
        config: of the run.
        processes: that share a batch.
        parts: into which each cuts its share.
        start_step: steps already done.
    """

    def __init__(self, config: RunSettings, processes: Processes, parts: int, start_step: int) -> None:
        self.config = config
        self.processes = processes
        self.parts = parts
        self.start_step = start_step

    def __len__(self) -> int:
        return (self.config.steps - self.start_step) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        size = self.config.batch_size // (self.processes.world * self.parts)
        for step in range(self.start_step, self.config.steps):
            first = step * self.config.batch_size + self.processes.rank * self.parts * size
            for part in range(self.parts):
                yield list(range(first + part * size, first + (part + 1) * size))


def training_batches(
    config: PretrainConfig,
    store: VolumeStore,
    cases: list[int],
    processes: Processes,
    parts: int = 1,
    start_step: int = 0,
) -> Iterator[dict[str, Any]]:
    """The parts of the remaining steps' batches that this process trains on."""
    augmentation = SpatialAugmentation()
    if not METHODS[config.method].mirrored:
        augmentation = replace(augmentation, mirror_probability=0.0)
    dataset = PatchDataset(
        store,
        cases,
        config.patch_size,
        seed=config.seed,
        augmentation=augmentation if config.augment else None,
        length=config.steps * config.batch_size,
        foreground_share=config.foreground,
    )
    return step_batches(config, dataset, processes, parts, start_step)


def step_batches(
    config: RunSettings, dataset: Dataset[Any], processes: Processes, parts: int, start_step: int
) -> Iterator[dict[str, Any]]:
    """Batches of a data set whose samples are those of the run, in the order of `StepOrder`."""
    loader = DataLoader(
        dataset,
        batch_sampler=StepOrder(config, processes, parts, start_step),
        num_workers=config.workers,
        pin_memory=processes.device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
    )
    return iter(loader)


def usual_spacing(store: VolumeStore, cases: list[int]) -> list[float]:
    """Voxel size (depth, height, width) in mm that volumes were resampled to, or the median of their own."""
    if store.spacing_mm is not None:
        return list(store.spacing_mm)
    return [statistics.median(sizes) for sizes in zip(*(store.cases[case].spacing_mm for case in cases), strict=True)]


def data_record(store: VolumeStore, training: list[int], validation: list[int]) -> dict[str, list[list[Any]]]:
    """What a run is trained and validated on, in order: name, shape, mean and standard deviation of every volume."""

    def describe(cases: list[int]) -> list[list[Any]]:
        return [[c.name, *c.shape, c.mean, c.std] for c in (store.cases[i] for i in cases)]

    return {"training": describe(training), "validation": describe(validation)}


def check_same_data(present: dict[str, list[list[Any]]], saved: dict[str, list[list[Any]]], folder: Path) -> None:
    """A resumed run must see the same volumes in the same order, or it would silently be another run.

    Raises:
        ValueError: names what differs.
    """
    for part, now in present.items():
        before = saved[part]
        if now == before:
            continue
        old, new = ({row[0]: row for row in rows} for rows in (before, now))
        changed = {
            "added": sorted(new.keys() - old.keys()),
            "removed": sorted(old.keys() - new.keys()),
            "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
        }
        listed = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for what, names in changed.items()
            if names
        )
        raise ValueError(
            f"the {part} images of the run in {folder} are not the same as before: {listed or 'another order'}. "
            "Restore them to go on, or give another output_dir."
        )
