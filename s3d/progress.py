"""What a user sees while a run goes on: bar, speed, memory, and whether the data are too slow."""

from __future__ import annotations

import logging
import resource
import sys
import time

import torch
from tqdm import tqdm

from .distributed import Processes
from .run_settings import RunSettings

log = logging.getLogger(__name__)

# The data are the bottleneck where so many steps, behind the first few, wait for so large a share of their time.
WATCHED_STEPS = 50
FIRST_STEPS = 10
TOO_LONG = 0.2


class Progress:
    """The progress bar of a run, and the figures of its log.

    Call ``begin``, ``data_ready`` and ``done`` in each step.

    Args:
        config: of the run.
        group: its processes; the first shows the bar.
        start_step: steps already done.
        name: of what is done.
    """

    def __init__(self, config: RunSettings, group: Processes, start_step: int, name: str) -> None:
        self.config = config
        self.group = group
        self._bar = tqdm(total=config.steps, initial=start_step, unit="step", desc=name, disable=not group.first)
        self._begin = self._ready = 0.0
        self._steps: list[tuple[float, float]] = []  # seconds waited and seconds in all, since the last figures
        self._watched: list[tuple[float, float]] = []
        self._warned = False

    def begin(self) -> None:
        """A step begins: it waits for its patches."""
        self._begin = time.perf_counter()

    def data_ready(self) -> None:
        """Its patches are there."""
        self._ready = time.perf_counter()

    def done(self) -> None:
        """The step is done, and the device has finished."""
        step = (self._ready - self._begin, time.perf_counter() - self._begin)
        self._steps.append(step)
        self._bar.update()
        if self._warned or not self.group.first:
            return
        self._watched.append(step)
        if len(self._watched) == FIRST_STEPS + WATCHED_STEPS:
            waited, seconds = (sum(times) for times in zip(*self._watched[FIRST_STEPS:], strict=True))
            if waited > TOO_LONG * seconds:
                log.warning(
                    "%.0f %% of the time is spent waiting for patches: the data are the bottleneck. More workers "
                    "(now %d) or a faster disk would speed this run up.",
                    100 * waited / seconds,
                    self.config.workers,
                )
                self._warned = True
            del self._watched[:-FIRST_STEPS]

    def figures(self, loss: float) -> dict[str, float]:
        """Figures of the steps since the last call, validations and checkpoints not counted; shown beside the bar.

        Args:
            loss: to be shown too.
        Returns: "samples_per_second" of all processes; "data_share" of the time that was spent waiting for patches;
            "memory_mib", the most that was taken so far.
        """
        waited, seconds = (sum(times) for times in zip(*self._steps, strict=True))
        figures = {
            "samples_per_second": len(self._steps) * self.config.batch_size / seconds,
            "data_share": waited / seconds,
            "memory_mib": peak_mebibytes(self.group.device),
        }
        self._steps.clear()
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, {figures['samples_per_second']:.2f} samples/s, data wait {figures['data_share']:.0%}, "
            f"{figures['memory_mib'] / 1024:.1f} GiB",
            refresh=False,
        )
        return figures

    def close(self) -> None:
        self._bar.close()


def peak_mebibytes(device: torch.device) -> float:
    """The most memory so far: of torch's allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilo = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**20
