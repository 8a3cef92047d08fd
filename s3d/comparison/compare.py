"""s3d compare: methods of pre-training on the same data, networks, budgets and seeds, as one command."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from s3d.data import find_images, preprocess
from s3d.data.workers import available_cores

from .cells import Cell, FinetuningCell, Matrix, PretrainingCell, plan_matrix
from .collect import collect
from .kept_protocol import check_protocol, keep_protocol, known_methods
from .labelled_cases import labelled_cases, link_test_cases
from .page import write_comparison
from .prediction import predicted_cost, relative_cost
from .protocol import Protocol, read_protocol
from .run_cell import Workplace, alone, links_of, read_record, shared_volumes
from .scheduler import run_cells

log = logging.getLogger(__name__)


class FailedCellsError(ChildProcessError):
    """Some cells could not be finished; the message names them."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods of pre-training: pre-train, fine-tune and score each on each data set, label count and seed."""

    config: tyro.conf.Positional[Path]
    """The protocol, a JSON file; see docs/comparison.md."""
    output_dir: Path
    """Folder of all runs, tables and the page. What is finished there is not done again."""
    data_dir: Path | None = None
    """Folder that paths of the protocol begin at. Default: that of the file."""
    devices: tuple[str, ...] = ("auto",)
    """A worker for each, such as cuda:0 cuda:0 cuda:1 or cpu cpu, which share the cores; auto: one for each GPU, or one
    on the CPU. None given: everything in this process."""
    dry_run: bool = False
    """Print the matrix and its predicted cost, and stop."""
    tflops: float | None = None
    """Of the predicted cost: operations of a device, in 1e12 per second, for runs of which none is finished."""
    report_only: bool = False
    """Write tables and page of what is finished, and stop."""

    def __post_init__(self) -> None:
        if self.tflops is not None and not self.tflops > 0:
            raise ValueError(f"tflops must be positive, got {self.tflops}")
        if self.dry_run and self.report_only:
            raise ValueError("dry_run and report_only exclude each other; give one of them")


def compare(config: CompareConfig) -> None:
    """Run what is not finished of a comparison, write its tables and its page, and print the tables.

    Every run lies in a folder of its own with its settings (`config.json`), log, checkpoint, predictions, scores
    (`evaluation/cases.csv`), what it printed (`output.txt`) and what it cost (`cell.json`). All of it is kept.

    Raises:
        FileNotFoundError: the protocol or data are missing.
        ValueError: the protocol is wrong, does not fit the data, or the folder holds runs of another one.
        FailedCellsError: some cells failed, the others are finished; the next call tries them again.
        KeyboardInterrupt: SIGINT or SIGTERM; what was running has saved a checkpoint, and the next call goes on.
    """
    protocol = read_protocol(config.config)
    output = config.output_dir.resolve()
    data = (config.data_dir or config.config.resolve().parent).resolve()
    place = Workplace(output, data, protocol.budget)
    matrix = plan_matrix(protocol, known_methods(output))
    if config.dry_run:
        print(predicted_cost(matrix, place, config.tflops))
        return
    check_protocol(protocol, output)
    if config.report_only:
        _report(protocol, matrix, place)
        return
    devices = _devices(config.devices)
    output.mkdir(parents=True, exist_ok=True)
    with alone(output):  # another call may prepare the same
        _prepare(matrix, place, available_cores() if devices else 0)
        # Last, so that a mistake that stops the first call can be corrected in the file.
        keep_protocol(protocol, output)
    cost = functools.lru_cache(None)(functools.partial(relative_cost, place=place))
    outcome = run_cells(matrix.cells, place, devices, cost)
    if outcome.stopped:
        raise KeyboardInterrupt
    _report(protocol, matrix, place)
    if outcome.failed:
        named = "; ".join(f"{cell.title} ({why})" for cell, why in outcome.failed)
        raise FailedCellsError(
            f"{len(outcome.failed)} of {len(matrix.cells)} runs failed: {named}. What is finished is kept, and the "
            "same command tries them again."
        )


def _report(protocol: Protocol, matrix: Matrix, place: Workplace) -> None:
    results = collect(protocol, matrix, place)
    tables = write_comparison(
        title="Comparison of pre-training methods",
        description=protocol.description,
        results=results,
        comparison=protocol.comparison,
        ablation=protocol.ablation,
        reference=protocol.reference,
        output_dir=place.output,
    )
    print(tables)


def _devices(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """One name for each worker.

    Raises:
        ValueError: no such device here.
    """
    # Asking torch for a tensor there would take memory of every GPU for this process, which needs none.
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    names = [name for device in wanted for name in ((gpus or ["cpu"]) if device == "auto" else [device])]
    for name in names:
        if name not in ("cpu", *gpus):
            raise ValueError(
                f"devices must be auto, cpu or GPUs of this machine ({', '.join(gpus) or 'none'}), got {name!r}"
            )
    return tuple(names)


def _prepare(matrix: Matrix, place: Workplace, workers: int) -> None:
    """What cells share, and mistakes that would stop them: before the first one begins."""
    left: list[Cell] = [cell for cell in matrix.cells if read_record(place.output / cell.folder) is None]
    datasets: dict[str, FinetuningCell] = {}
    volumes: dict[Path, PretrainingCell] = {}
    for cell in left:
        if isinstance(cell, FinetuningCell):
            datasets[cell.dataset.name] = cell
        elif (shared := shared_volumes(cell.settings, place)) is not None:
            volumes[shared[0]] = cell
    for tuning in datasets.values():
        link_test_cases(labelled_cases(tuning.dataset, place.data, links_of(tuning, place)))
    for training in volumes.values():
        _preprocess(training, place, workers)


def _preprocess(cell: PretrainingCell, place: Workplace, workers: int) -> None:
    volumes = shared_volumes(cell.settings, place)
    assert volumes is not None
    folder, settings = volumes
    images = find_images(settings["images"])
    summary = preprocess(
        images,
        folder,
        spacing_mm=settings["spacing_mm"],
        skip_bad=settings["skip_bad"],
        workers=workers,
    )
    log.info("%s", summary)
