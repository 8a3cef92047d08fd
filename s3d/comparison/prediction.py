"""What a comparison will cost: steps, operations, hours."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3d.model import preset_shape
from s3d.pretext.registry import METHODS
from s3d.segmentation.raw_dataset import read_raw_dataset
from s3d.segmentation.summary import Table

from .cells import Cell, FinetuningCell, Matrix, PretrainingCell
from .run_cell import BUDGET, Workplace, finetune_config, pretrain_config, read_record
from .step_cost import finetuning_step_flops, step_flops

PUBLISHED_PATCH = (160, 160, 160)


@dataclass(frozen=True)
class _Row:
    """Cells of one kind: a pre-training of a method, or its fine-tunings on a data set.

    Attributes:
        cells, finished: how many.
        steps: of a cell; None: decided by time and not measured yet.
        flops: of a step; NaN: not counted.
        seconds: of a step, as measured; NaN: no cell is finished.
        budget: seconds of a cell where time is the budget.
    """

    cells: int
    finished: int
    steps: int | None
    flops: float
    seconds: float
    budget: float | None

    def hours(self, tflops: float | None) -> float:
        """Of all steps that are left, on one device; NaN where nothing says how long they take."""
        left = self.cells - self.finished
        if self.budget is not None:
            return left * self.budget / 3600
        rate = math.nan if tflops is None else tflops * 1e12
        seconds = self.flops / rate if math.isnan(self.seconds) else self.seconds
        return left * (self.steps or 0) * seconds / 3600


def predicted_cost(matrix: Matrix, place: Workplace, tflops: float | None) -> str:
    """A table in Markdown: the cells of the matrix, what a step costs, and the hours of what is left.

    Args:
        matrix: of the comparison.
        place: of its runs.
        tflops: operations that a device is assumed to do where no cell of a kind is finished, in 1e12 / s.
    """
    kinds: dict[str, list[Cell]] = {}
    for cell in matrix.cells:
        on = "pre-training" if isinstance(cell, PretrainingCell) else cell.dataset.name
        kinds.setdefault(f"{cell.method}: {on}", []).append(cell)
    counted: dict[Any, float] = {}
    rows = {title: _row(cells, place, counted) for title, cells in kinds.items()}
    hours = {title: row.hours(tflops) for title, row in rows.items()}
    table = Table(
        "Predicted cost",
        ("runs", "cells", "finished", "steps of each", "TFLOP of a step", "PFLOP in all", "hours left"),
        [
            (
                title,
                str(row.cells),
                str(row.finished),
                "by time" if row.steps is None else f"{row.steps:,}",
                _number(row.flops / 1e12, ".3g"),
                _number(row.flops * (row.steps or math.nan) * row.cells / 1e15, ",.3g"),
                _number(hours[title], ",.2f"),
            )
            for title, row in rows.items()
        ],
    )
    number, finished = (sum(getattr(row, name) for row in rows.values()) for name in ("cells", "finished"))
    known = [value for value in hours.values() if not math.isnan(value)]
    unknown = len(hours) - len(known)
    petaflop = sum(row.flops * row.steps * row.cells / 1e15 for row in rows.values() if row.steps is not None)
    summary = (
        f"{number} cells, {finished} finished; {_number(petaflop, ',.4g')} PFLOP in all; {sum(known):,.1f} hours left "
        "on one device"
    )
    if unknown:
        summary += (
            f", without {unknown} kinds of runs of which no cell is finished and for which no --tflops is assumed"
        )
    notes = (
        "- Training steps only: validation, segmentation of the test cases and preprocessing come on top.\n"
        "- Operations are those of an exact direct algorithm (docs/performance.md). Of a patch that is planned from "
        "the data, they are those of the fixed patch.\n"
    )
    return f"{table.markdown()}\n\n{summary}.\n\n{notes}"


def relative_cost(cell: Cell, place: Workplace) -> float:
    """Voxels that a cell trains on: known at once, for the order of the work and the bar."""
    if isinstance(cell, PretrainingCell):
        if place.budget is not None:
            return place.budget.pretraining_seconds
        config = pretrain_config(cell, place, "auto")
        return float(config.steps * config.batch_size * math.prod(config.patch_size))
    if place.budget is not None:
        return place.budget.finetuning_seconds
    tuning = finetune_config(cell, place, "auto")
    return float(tuning.steps * tuning.batch_size * math.prod(_patch_of(cell, place)))


def _patch_of(cell: FinetuningCell, place: Workplace) -> tuple[int, int, int]:
    tuning = finetune_config(cell, place, "auto")
    if tuning.patch_size is not None:
        return tuning.patch_size
    if cell.pretraining is None:
        return PUBLISHED_PATCH
    return pretrain_config(cell.pretraining, place, "auto").patch_size


def _row(cells: list[Cell], place: Workplace, counted: dict[Any, float]) -> _Row:
    records = [record for cell in cells if (record := read_record(place.output / cell.folder)) is not None]
    measured = sorted(float(record["seconds_per_step"]) for record in records)
    first = cells[0]
    budget, steps = _length(first, place)
    return _Row(
        cells=len(cells),
        finished=len(records),
        steps=steps,
        flops=_flops(first, place, counted),
        seconds=measured[len(measured) // 2] if measured else math.nan,
        budget=budget,
    )


def _length(cell: Cell, place: Workplace) -> tuple[float | None, int | None]:
    """Seconds that a cell has, or None; steps of it, or None while only time is known."""
    if place.budget is None:
        if isinstance(cell, PretrainingCell):
            return None, pretrain_config(cell, place, "auto").steps
        return None, finetune_config(cell, place, "auto").steps
    budget = place.budget
    seconds = budget.pretraining_seconds if isinstance(cell, PretrainingCell) else budget.finetuning_seconds
    kept = place.output / cell.folder.parent / BUDGET
    steps = json.loads(kept.read_text(encoding="utf-8"))["steps"] if kept.is_file() else None
    return seconds, steps


def _flops(cell: Cell, place: Workplace, counted: dict[Any, float]) -> float:
    """Of a step; the same networks are counted once."""
    record = read_record(place.output / cell.folder)
    if record is not None and "step_flops" in record:
        return float(record["step_flops"])
    if isinstance(cell, PretrainingCell):
        config = pretrain_config(cell, place, "cpu")
        key = tuple(sorted((name, str(value)) for name, value in config.plain().items() if name in _COUNTED))
        if key not in counted:
            counted[key] = step_flops(METHODS[config.method](config), config)
        return counted[key]
    tuning = finetune_config(cell, place, "cpu")
    preset = tuning.preset
    if preset is None and cell.pretraining is not None:
        preset = pretrain_config(cell.pretraining, place, "cpu").preset
    channels, classes = _channels_and_classes(place.data / cell.dataset.folder)
    patch = _patch_of(cell, place)
    network = (preset, patch, channels, classes)
    if network not in counted:
        counted[network] = finetuning_step_flops(preset_shape(preset or "resenc-l"), patch, channels, classes)
    return counted[network] * tuning.batch_size


_COUNTED = "method preset sparse mask_tokens densify shortcuts patch_size mask_block mask_ratio batch_size".split()


def _channels_and_classes(folder: Path) -> tuple[int, int]:
    """Of a data set; the least where it is not there (yet), which changes next to nothing."""
    if not (folder / "dataset.json").is_file():
        return 1, 2
    raw = read_raw_dataset(folder)
    return len(raw.channel_names), len(raw.class_names)


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
