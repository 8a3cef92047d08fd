"""The record of a run: one CSV row per logged step, and the same numbers for TensorBoard."""

from __future__ import annotations

import csv
import os
from pathlib import Path

COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm", "samples_per_second")


class TrainingLog:
    """Appends rows to ``log.csv``; on resume, rows after the checkpoint are dropped, so that no step stands twice.

    Args:
        folder: of the run.
        start_step: steps already done.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self.path = folder / "log.csv"
        # A run that starts anew, because there was no checkpoint yet, keeps nothing.
        resumed = start_step > 0 and self.path.exists()
        kept = [row for row in read_log(self.path) if row["step"] <= start_step] if resumed else []
        partial = self.path.with_name("log.csv.partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(partial, self.path)
        self._file = open(self.path, "a", newline="")  # noqa: SIM115 (open as long as the run)
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if resumed else 0)

    def write(self, step: int, **values: float) -> None:
        """One row; columns that are not given stay empty."""
        self._writer.writerow({"step": step, **values})
        self._file.flush()
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self.tensorboard.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log; empty columns are absent."""
    with open(path, newline="") as file:
        return [
            {name: int(value) if name == "step" else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]
