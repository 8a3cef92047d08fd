"""A cell of the matrix, from the first step to its record. Whatever is done is not done again.

A cell is finished when its folder holds `cell.json`, which is written last. Until then training goes on from its
checkpoint, and cases that are segmented stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shutil
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from s3d.data.preparing import short_hash
from s3d.data.store import write_atomically
from s3d.pretext.registry import METHODS
from s3d.pretrain import pretrain
from s3d.pretrain_config import PretrainConfig
from s3d.segmentation.evaluate import EvaluateConfig, evaluate
from s3d.segmentation.finetune import finetune
from s3d.segmentation.finetune_config import FinetuneConfig
from s3d.segmentation.predict import PredictConfig, predict

from .cells import Cell, FinetuningCell, PretrainingCell
from .labelled_cases import choose_cases, labelled_cases
from .protocol import UNKNOWN_STEPS, Budget, Settings, finetuning_settings, pretraining_settings, slug_of
from .step_cost import forget_peak_memory, measured_steps, step_flops, trained_parameters

log = logging.getLogger(__name__)

RECORD = "cell.json"
OUTPUT = "output.txt"
BUDGET = "budget.json"
LOCK = ".lock"  # the process that works in a folder, or was the last to do so
SCORES = Path("evaluation", "cases.csv")
# Steps whose time is taken where time is the budget, and those before them, in which caches and choices of kernels warm
# up.
WARM_STEPS, TIMED_STEPS = 3, 10

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)


class CellStoppedError(Exception):
    """A signal has stopped a cell before its end."""


@dataclass(frozen=True)
class Workplace:
    """Where cells are run.

    Attributes:
        output: folder of the comparison.
        data: that paths of the protocol are relative to.
        budget: of each run.
    """

    output: Path
    data: Path
    budget: Budget | None


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a finished cell has measured; None where the cell is not finished."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def run_cell(cell: Cell, place: Workplace, device: str) -> None:
    """Do what is left of a cell. What it says goes to the end of `output.txt` in its folder.

    Raises:
        CellStoppedError: a signal has stopped it; the next call goes on.
        Exception: it has failed; the traceback is in `output.txt`.
    """
    folder = place.output / cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder), _output_to(folder / OUTPUT):
        if read_record(folder) is not None:
            return
        try:
            if isinstance(cell, PretrainingCell):
                record = _pretrain(cell, place, device)
            else:
                record = _finetune(cell, place, device)
        except Exception:
            traceback.print_exc()
            raise
        write_atomically(folder / RECORD, (json.dumps({**record, "device": device}, indent=2) + "\n").encode())


def shared_volumes(settings: Settings, place: Workplace) -> tuple[Path, dict[str, Any]] | None:
    """Images are preprocessed once for all methods: the folder, and the settings that decide what is in it.

    Returns: None where the settings name a folder of volumes.
    """
    values = pretraining_settings(settings, place.data)
    if not values.get("images"):
        return None
    names = ("images", "spacing_mm", "skip_bad")
    chosen = {name: values.get(name, getattr(PretrainConfig, name)) for name in names}
    key = json.dumps({**chosen, "images": settings["images"]})
    return place.output / "volumes" / short_hash(key), chosen


def pretrain_config(cell: PretrainingCell, place: Workplace, device: str, steps: int | None = None) -> PretrainConfig:
    """Settings of a pre-training.

    Args:
        cell: of the matrix.
        place: where it is run.
        device: as in `RunSettings`.
        steps: in place of those of the settings. Default where time is the budget: more than any warm-up.
    """
    values = pretraining_settings(cell.settings, place.data)
    volumes = shared_volumes(cell.settings, place)
    if volumes is not None:
        values |= {"volumes": volumes[0], "images": ()}
    if steps is not None or place.budget is not None:
        values["steps"] = UNKNOWN_STEPS if steps is None else steps
    return PretrainConfig(output_dir=place.output / cell.folder, seed=cell.seed, device=device, **values)


def finetune_config(cell: FinetuningCell, place: Workplace, device: str, steps: int | None = None) -> FinetuneConfig:
    """Settings of a fine-tuning; arguments as of `pretrain_config`."""
    values = finetuning_settings(cell.settings)
    start = cell.pretraining
    if steps is not None or place.budget is not None:
        values["steps"] = UNKNOWN_STEPS if steps is None else steps
    folder = place.output / cell.folder
    return FinetuneConfig(
        output_dir=folder,
        seed=cell.seed,
        device=device,
        dataset=place.data / cell.dataset.folder,
        checkpoint=None if start is None else place.output / start.folder / "checkpoint.pt",
        splits=folder / "splits.json",
        cases=place.output / "cases" / slug_of(cell.dataset.name),
        **values,
    )


def links_of(cell: FinetuningCell, place: Workplace) -> Path:
    """Folder for links to test cases."""
    return place.output / "test" / slug_of(cell.dataset.name)


def test_images(cell: FinetuningCell, place: Workplace) -> Path:
    """Folder of the images of test cases: links, or the data set's own."""
    links = links_of(cell, place)
    return (links if links.is_dir() else place.data / cell.dataset.folder) / "imagesTs"


def _pretrain(cell: PretrainingCell, place: Workplace, device: str) -> dict[str, Any]:
    steps = None
    if place.budget is not None:
        some = pretrain_config(cell, place, device, WARM_STEPS + TIMED_STEPS)
        some = dataclasses.replace(some, warmup_steps=0, validate_every=UNKNOWN_STEPS, checkpoint_every=UNKNOWN_STEPS)
        steps = _affordable_steps(some, place.budget.pretraining_seconds)
    config = pretrain_config(cell, place, device, steps)
    forget_peak_memory(device)
    result = pretrain(config)
    if result.steps < config.steps:
        raise CellStoppedError
    pretext = METHODS[config.method](config)
    return {
        **dataclasses.asdict(measured_steps(config.output_dir / "log.csv", config.batch_size)),
        "steps": config.steps,
        "trivial_loss": result.mean_loss,
        "loss_label": pretext.loss_label,
        "parameters": trained_parameters(pretext),
        "step_flops": step_flops(pretext, config),
    }


def _finetune(cell: FinetuningCell, place: Workplace, device: str) -> dict[str, Any]:
    cases = labelled_cases(cell.dataset, place.data, links_of(cell, place))
    folder = place.output / cell.folder
    split = choose_cases(cases.training, cell.labels, cell.dataset.validation_cases, cell.seed)
    write_atomically(folder / "splits.json", json.dumps([split], indent=1).encode())
    steps = None
    if place.budget is not None:
        some = finetune_config(cell, place, device, WARM_STEPS + TIMED_STEPS)
        unseen = folder / "splits-timing.json"
        write_atomically(unseen, json.dumps([{**split, "val": []}], indent=1).encode())
        some = dataclasses.replace(
            some, splits=unseen, warmup_steps=None, validate_every=UNKNOWN_STEPS, checkpoint_every=UNKNOWN_STEPS
        )
        steps = _affordable_steps(some, place.budget.finetuning_seconds)
    config = finetune_config(cell, place, device, steps)
    result = finetune(config)
    if result.steps < config.steps:
        raise CellStoppedError
    predictions = folder / "predictions"
    predict(
        PredictConfig(
            checkpoint=result.checkpoint,
            images=cases.images,
            output_dir=predictions,
            device=device,
            precision=config.precision,
        )
    )
    evaluate(
        EvaluateConfig(
            labels=cases.labels,
            predictions=(f"{slug_of(cell.method)}={predictions}",),
            output_dir=folder / SCORES.parent,
            dataset_json=place.data / cell.dataset.folder / "dataset.json",
            images=cases.images,
            workers=0,
        )
    )
    return {
        **dataclasses.asdict(measured_steps(folder / "log.csv", config.batch_size)),
        "steps": config.steps,
    }


def _affordable_steps(some: Config, seconds: float) -> int:
    """How many steps a budget of time pays; measured once for all seeds of a method and kept.

    Validation and checkpoints are not counted. Where a schedule freezes the encoder for a part of the run, its steps
    take less than the median step does, and the run ends somewhat early.

    Args:
        some: settings of a run of a few steps; its folder is that of the run itself.
        seconds: of the budget.
    """
    folder = some.output_dir
    kept = folder.parent / BUDGET
    with alone(folder.parent):
        if not kept.is_file():
            timing = folder / "timing"
            shutil.rmtree(timing, ignore_errors=True)
            some = dataclasses.replace(some, output_dir=timing)
            done = (pretrain(some) if isinstance(some, PretrainConfig) else finetune(some)).steps
            if done < some.steps:
                raise CellStoppedError
            step = measured_steps(timing / "log.csv", some.batch_size, WARM_STEPS).seconds_per_step
            record = {"seconds": seconds, "seconds_per_step": step, "steps": max(1, int(seconds / step))}
            write_atomically(kept, (json.dumps(record, indent=2) + "\n").encode())
            shutil.rmtree(timing)
    steps: int = json.loads(kept.read_text(encoding="utf-8"))["steps"]
    return steps


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process works in a folder, such as one whose scheduler was killed and that is ending."""
    with (folder / LOCK).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Sends what is printed and logged to the end of a file."""
    root = logging.getLogger()
    with (
        file.open("a", encoding="utf-8", buffering=1) as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        handler = logging.StreamHandler(stream)
        handlers, level = root.handlers[:], root.level
        root.handlers[:] = [handler]
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
