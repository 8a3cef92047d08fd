"""What the finished cells of a comparison have measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s3d.data.store import INDEX, VolumeStore
from s3d.segmentation.scores import read_scores
from s3d.training_log import read_log

from .cells import FinetuningCell, Matrix, PretrainingCell
from .protocol import Protocol
from .results import EvaluatedCell, PretrainedCell, Results
from .run_cell import SCORES, Workplace, read_record, test_images


def collect(protocol: Protocol, matrix: Matrix, place: Workplace) -> Results:
    """The results of all entries of the matrix whose cells are finished.

    Args:
        protocol, matrix: of the comparison.
        place: of its runs.
    """
    output = place.output
    order = {method.name: place for place, method in enumerate(protocol.methods)}
    pretrained = [
        _pretrained(method, cell, record, output)
        for (method, _), cell in sorted(matrix.pretraining.items(), key=lambda item: order[item[0][0]])
        if (record := read_record(output / cell.folder)) is not None
    ]
    evaluated = [
        _evaluated(method, cell, record, output)
        for (method, *_), cell in sorted(matrix.finetuning.items(), key=lambda item: order[item[0][0]])
        if (record := read_record(output / cell.folder)) is not None
    ]
    return Results(
        methods=tuple(order),
        datasets=tuple(dataset.name for dataset in protocol.datasets),
        evaluated=tuple(evaluated),
        pretrained=tuple(pretrained),
        planned=len(matrix.pretraining) + len(matrix.finetuning),
        seen=_seen(matrix, evaluated, place),
    )


def _seen(matrix: Matrix, evaluated: Sequence[EvaluatedCell], place: Workplace) -> dict[str, int]:
    """Test cases of each data set whose images are among those of a finished pre-training, if there are any."""
    sources: set[Path] = set()
    for folder in {cell.folder for cell in matrix.pretraining.values()}:
        if read_record(place.output / folder) is not None:
            config = json.loads((place.output / folder / "config.json").read_text(encoding="utf-8"))
            store = Path(config["volumes"])
            if (store / INDEX).is_file():  # else it was removed since
                sources |= {Path(case.source).resolve() for case in VolumeStore(store).cases}
    cases = {cell.dataset: cell.cases for cell in evaluated}
    images = {cell.dataset.name: test_images(cell, place) for cell in matrix.finetuning.values()}
    found = {
        dataset: sum(
            any(file.resolve() in sources for file in images[dataset].glob(f"{case}_????.*")) for case in names
        )
        for dataset, names in cases.items()
    }
    return {dataset: number for dataset, number in found.items() if number}


def _pretrained(method: str, cell: PretrainingCell, record: dict[str, Any], output: Path) -> PretrainedCell:
    pictures = sorted((output / cell.folder).glob("reconstruction_*.png"))
    return PretrainedCell(
        method=method,
        seed=cell.seed,
        folder=cell.folder,
        **{name: record[name] for name in ("steps", "parameters", "seconds", "seconds_per_step", "memory_mib")},
        **{name: record[name] for name in ("step_flops", "trivial_loss", "loss_label")},
        losses=_curve(output / cell.folder / "log.csv", "validation_loss"),
        picture=pictures[-1].relative_to(output) if pictures else None,
    )


def _evaluated(method: str, cell: FinetuningCell, record: dict[str, Any], output: Path) -> EvaluatedCell:
    scores = read_scores(output / cell.folder / SCORES)
    return EvaluatedCell(
        method=method,
        dataset=cell.dataset.name,
        labels=cell.labels,
        seed=cell.seed,
        folder=cell.folder,
        classes=scores.classes,
        cases=scores.cases,
        dice=scores.dice[0],
        curve=_curve(output / cell.folder / "log.csv", "validation_dice"),
        seconds=record["seconds"],
    )


def _curve(log: Path, column: str) -> tuple[tuple[int, float], ...]:
    return tuple((int(row["step"]), row[column]) for row in read_log(log) if column in row)
