"""What a training step is bound by: time of the GPU, time of the host, peak memory, and the kernels that take longest.

python bench/gpu_step_profile.py FOLDER [CONTENDER ...] prints a line for each contender and writes its tables of
kernels and of calls of the host to FOLDER. A step whose time is that of the host gets no faster by faster kernels.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import Case
from contenders import Run
from machine import synchronise
from torch.profiler import ProfilerActivity, profile
from turns import prepare, word

CASE = Case("step", "", "resenc-l", 160, 1, 32, "blocks", 0.75, "bfloat16")
CONTENDERS = ("native", "native plain decoder", "dense masked", "dense", "dense channels-last", "torch")
WARM_UP, ROUNDS, PROFILED = 3, 8, 3
ROWS = 45  # of a table


@dataclass(frozen=True)
class StepProfile:
    """Forward and backward of a step, medians.

    Attributes:
        wall_ms: until the GPU is done, too.
        host_ms: until the last kernel is launched.
        kernels_ms: of kernels, copies and fills on the GPU, in another three steps, which the profiler watched.
        peak_bytes: of torch's allocator, with weights and gradients.
        tables: of kernels and of calls of the host.
    """

    wall_ms: float
    host_ms: float
    kernels_ms: float
    peak_bytes: int
    tables: str

    def __str__(self) -> str:
        return (
            f"wall {self.wall_ms:.1f} ms, host {self.host_ms:.1f} ms, kernels {self.kernels_ms:.1f} ms, "
            f"peak {self.peak_bytes / 2**30:.2f} GiB"
        )


def profile_step(run: Run) -> StepProfile:
    """Profile a contender that is ready."""

    def step() -> None:
        run.drop_gradients()
        run.forward().float().sum().backward()

    for _ in range(WARM_UP):
        step()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    wall, host = [], []
    for _ in range(ROUNDS):
        synchronise()
        begin = time.perf_counter()
        step()
        host.append(time.perf_counter() - begin)
        synchronise()
        wall.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(PROFILED):
            step()
        synchronise()
    events: Any = profiler.key_averages()
    kernels_us = sum(event.self_device_time_total for event in events if event.device_type.name == "CUDA")
    orders = ("self_device_time_total", "self_cpu_time_total") if on_gpu else ("self_cpu_time_total",)
    tables = "\n".join(events.table(sort_by=order, row_limit=ROWS, max_name_column_width=110) for order in orders)
    times_ms = (1e3 * statistics.median(wall), 1e3 * statistics.median(host), kernels_us / PROFILED / 1e3)
    return StepProfile(*times_ms, peak, tables)


def main(arguments: list[str]) -> int:
    """Profile contenders one after the other. Returns: the exit status."""
    folder, *names = arguments
    Path(folder).mkdir(parents=True, exist_ok=True)
    failed = 0
    print(CASE.id, flush=True)
    for name in names or CONTENDERS:
        try:
            result = profile_step(prepare(CASE, name))
        except Exception as error:  # the others go on
            print(f"{name}: {error!r}", flush=True)
            failed = 1
        else:
            print(f"{name}: {result}", flush=True)
            Path(folder, f"{word(name)}.txt").write_text(f"{CASE.id} {name}: {result}\n{result.tables}\n")
        gc.collect()
        torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
