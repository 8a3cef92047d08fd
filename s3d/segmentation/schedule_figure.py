"""The plot of docs/finetuning.md: all schedules, drawn from the code that trains.

python -m s3d.segmentation.schedule_figure docs/images/schedules.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from s3d.figure_file import digest, write_figure

from .schedule import SCHEDULES, make_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED_STEPS = 250_000
DRAWN_STEPS = 500  # apart; the published run has many more steps than the plot has dots


def schedule_figure(steps: int = PUBLISHED_STEPS, warmup_steps: int | None = None) -> Figure:
    """Learning rate against step, one panel a schedule; the background is grey while the encoder is frozen.

    Args:
        steps: of the run.
        warmup_steps: see `make_schedule`.
    """
    # Not at the head of the file: who trains needs no matplotlib for it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 2.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(SCHEDULES)), SCHEDULES):
        has_warmup = len(SCHEDULES[name][1]) > 1
        schedule = make_schedule(name, steps, warmup_steps=warmup_steps if has_warmup else None)
        for phase in schedule.phases:
            shown = [*range(phase.first, phase.last, max(1, steps // DRAWN_STEPS)), phase.last]
            axes.plot(
                [step / 1000 for step in shown],
                [schedule.learning_rate(step) for step in shown],
                color="C0" if phase.kind.rises else "C1",
                label=phase.kind.name,
            )
            if phase.kind.encoder_frozen:
                axes.axvspan(phase.first / 1000, (phase.last + 1) / 1000, color="0.88", linewidth=0)
        axes.set_title(name)
        axes.set_ylim(0, 1.08 * schedule.peak)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.set_xlabel("thousand steps")
    figure.axes[0].set_ylabel("learning rate")
    return figure


def drawn_data() -> str:
    """SHA-256 of what the plot shows, which its file carries: a test compares it with the code of today."""
    lines = {
        axes.get_title(): [
            [f"{step:.6g}", f"{rate:.6g}"] for line in axes.get_lines() for step, rate in np.asarray(line.get_xydata())
        ]
        for axes in schedule_figure().axes
    }
    return digest(lines)


def write_schedule_figure(path: Path) -> None:
    """Write the plot as PNG.

    Raises:
        OSError: it could not be written.
    """
    write_figure(path, schedule_figure(), drawn_data())


if __name__ == "__main__":
    write_schedule_figure(Path(sys.argv[1]))
