"""The record of a run: one CSV row per logged step, and the same numbers for TensorBoard."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

COLUMNS = (
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "samples_per_second",
    "data_share",  # of the time since the last row that the step waited for patches
    "memory_mib",  # highest so far: of the process, or of torch's allocator on a GPU
)
SKIPPED_COLUMNS = ("step", "loss", "gradient_norm", "images")


class CsvLog:
    """Appends rows to a CSV file; on resume, rows behind the checkpoint are dropped, so that no step stands twice.

    Args:
        path: of the file.
        columns: the first is "step".
        start_step: steps already done; 0 keeps nothing.
    """

    def __init__(self, path: Path, columns: Sequence[str], start_step: int) -> None:
        self.path = path
        kept = []
        if start_step > 0 and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                # A power cut may leave half a row, or zeros.
                lines = csv.DictReader(line for line in file if "\0" not in line)
                whole = [row for row in lines if row["step"].isdigit() and None not in row.values()]
            kept = [row for row in whole if int(row["step"]) <= start_step]
        partial = path.with_name(path.name + ".partial")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(partial, path)
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._writer = csv.DictWriter(self._file, columns)

    def write(self, **values: object) -> None:
        """One row; columns that are not given stay empty."""
        self._writer.writerow(values)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TrainingLog:
    """``log.csv``, ``skipped_steps.csv`` and TensorBoard's files of a run.

    Args:
        folder: of the run.
        start_step: steps already done.
        columns: beside ``COLUMNS``, those of what is trained.
    """

    def __init__(self, folder: Path, start_step: int, columns: Sequence[str]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self.path = folder / "log.csv"
        resumed = start_step > 0 and self.path.exists()
        self._rows = CsvLog(self.path, (*COLUMNS, *columns), start_step)
        self._skipped = CsvLog(folder / "skipped_steps.csv", SKIPPED_COLUMNS, start_step)
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if resumed else 0)

    def write(self, step: int, **values: float) -> None:
        """One row, and a scalar for each value."""
        self._rows.write(step=step, **values)
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def write_skipped(self, step: int, loss: float, gradient_norm: float, images: Sequence[str]) -> None:
        """A step that was skipped, and what it was trained on."""
        self._skipped.write(step=step, loss=loss, gradient_norm=gradient_norm, images="; ".join(images))

    def close(self) -> None:
        self._rows.close()
        self._skipped.close()
        self.tensorboard.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log; empty columns are absent."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: int(value) if name == "step" else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]
