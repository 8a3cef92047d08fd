"""s3d profile: where the time and the memory of a training step go, by stage and kind, and a trace to look at."""

from __future__ import annotations

import csv
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function, schedule
from torch.profiler import profile as torch_profile

from s3d_kernels import use_backend

from .distributed import Processes, choose_device
from .layer_ranges import Layer, layer_ranges
from .pretext.registry import METHODS
from .pretrain_config import PretrainConfig
from .report import memory_figure, save_figure
from .step_trace import Row, StepTrace
from .training_data import prepare_volumes, training_batches
from .training_step import TrainingStep, build_training

# The plugin torch-tb-profiler looks for names with this ending.
TRACE = "step.pt.trace.json"


@dataclass(frozen=True)
class ProfileConfig:
    """Record a few training steps: time and memory by stage and kind of operator, and a trace for a browser."""

    output_dir: Path = Path("s3d-profile")
    """Where trace, table and plot go."""
    images: tuple[str, ...] = ()
    """Real images as for s3d pretrain, read by the same loader; without any, one random batch that is there already."""
    preset: str = "small"
    """Size of the network: resenc-l, resenc-s, small or tiny."""
    patch_size: tuple[int, int, int] = (64, 64, 64)
    """Voxels of a training patch."""
    mask_block: int = 8
    """Side of a masked block in voxels; a multiple of the network's total stride."""
    mask_ratio: float | tuple[float, float] = 0.75
    """Masked share of the blocks, or a range from which it is drawn for every sample."""
    batch_size: int = 2
    """Patches per step."""
    steps: int = 3
    """Steps that are recorded; figures are means over them."""
    warmup: int = 3
    """Steps before that, which are not; all but the first tell the time of a step that is not recorded."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the network under autocast."""
    device: str = "auto"
    """cuda, cpu, ...; auto: cuda where there is one."""
    backend: str = "auto"
    """Backend of s3d_kernels."""
    workers: int = 2
    """Processes that read patches of the images; 0: none beside the main one."""

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise ValueError(f"warmup must be at least 1, got {self.warmup}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        self.training()

    def training(self) -> PretrainConfig:
        """The settings of a run that makes these steps.

        Raises:
            ValueError: as for a run.
        """
        return PretrainConfig(
            images=self.images,
            output_dir=self.output_dir,
            preset=self.preset,
            patch_size=self.patch_size,
            mask_block=self.mask_block,
            mask_ratio=self.mask_ratio,
            batch_size=self.batch_size,
            # One more, which torch's profiler takes to begin.
            steps=self.warmup + 1 + self.steps,
            precision=self.precision,
            device=self.device,
            backend=self.backend,
            workers=self.workers,
        )


@dataclass(frozen=True)
class Profile:
    """What the recorded steps took.

    Attributes:
        rows: time and bytes by stage and kind, per step; the times add up to ``step_ms``.
        step_ms: a step while it was recorded, mean.
        unrecorded_ms: a step without, median of the warm-up after its first; where the warm-up is one step, that one,
            which is slower than those that follow.
        device: that computed.
        folder: of the files.
    """

    rows: tuple[Row, ...]
    step_ms: float
    unrecorded_ms: float
    device: str
    folder: Path

    def table(self) -> str:
        """The rows as a Markdown table: milliseconds, share of the step, MiB.

        *allocated*: what the operators took from torch's allocator, whether they gave it back or not; *kept*: what of
        that was taken before backward and still there when backward began. Scratch memory that a kernel takes itself is
        not seen.
        """
        total = sum(row.total_ms for row in self.rows)
        lines = [
            "| stage | kind | forward ms | backward ms | share | allocated MiB | kept MiB |",
            "| ----: | :-------- | ---------: | ----------: | -----: | ------------: | -------: |",
        ]
        rows = [(f"{r.stage if r.stage is not None else '-'}", r.kind, r) for r in self.rows]
        summed = Row(None, "all")
        for row in self.rows:
            summed.forward_ms += row.forward_ms
            summed.backward_ms += row.backward_ms
            summed.allocated_bytes += row.allocated_bytes
            summed.kept_bytes += row.kept_bytes
        for stage, kind, row in [*rows, ("", "all", summed)]:
            lines.append(
                f"| {stage:>5} | {kind:<9} | {row.forward_ms:>10.1f} | {row.backward_ms:>11.1f} | "
                f"{row.total_ms / max(total, 1e-9):>6.1%} | {row.allocated_bytes / 2**20:>13.1f} | "
                f"{row.kept_bytes / 2**20:>8.1f} |"
            )
        return "\n".join(lines) + "\n"


def profile(config: ProfileConfig) -> Profile:
    """Record the steps that ``s3d pretrain`` would make with these settings; print the table and how to open the trace.

    Raises:
        ValueError: no such device.
        BadImageError: an image cannot be used.
    """
    run = config.training()
    alone = Processes(0, 1, choose_device(run.device))
    batches: Iterator[dict[str, Any]]
    if config.images:
        store, cases, _ = prepare_volumes(run, alone)
        batches = training_batches(run, store, cases, alone)
    else:
        generator = torch.Generator().manual_seed(run.seed)
        image = torch.randn(run.batch_size, 1, *run.patch_size, generator=generator)
        batches = itertools.repeat({"image": image})
    pretext = METHODS[run.method](run)
    training = build_training(run, pretext, alone.device)
    train = TrainingStep(run, pretext, training, alone, phase=record_function)
    numbers = itertools.count()

    def step() -> None:
        train(train.read(batches), next(numbers))

    with use_backend(run.backend):
        result = profile_steps(
            step,
            config.output_dir,
            training.model,
            warmup=config.warmup,
            steps=config.steps,
            device=alone.device,
        )
    print(
        f"{result.table()}\na step took {result.step_ms:.0f} ms on {result.device} while recorded, "
        f"{result.unrecorded_ms:.0f} ms before\n"
        f"trace: tensorboard --logdir {config.output_dir} (pip install torch-tb-profiler), tab PYTORCH_PROFILER;\n"
        f"       or open {config.output_dir / TRACE} at https://ui.perfetto.dev or chrome://tracing"
    )
    return result


def profile_steps(
    step: Callable[[], object],
    folder: Path,
    model: nn.Module | None = None,
    *,
    warmup: int = 3,
    steps: int = 3,
    device: torch.device | str | None = None,
) -> Profile:
    """Record calls of a function that computes forward and backward of a model.

    Ranges of ``torch.profiler.record_function`` in it that are named data, loss, clip and optimiser make rows of the
    table; loaders and optimisers of torch do so by themselves.

    Writes to ``folder``: ``step.pt.trace.json`` for TensorBoard's torch-tb-profiler, Perfetto and chrome://tracing, in
    which each operator of forward and backward lies in a range with the name of its layer; ``table.md``;
    ``profile.json``, the table and ``memory.csv``, the memory over the last step; ``memory.png``, that as a plot.

    Args:
        step: one step.
        folder: made if there is none.
        model: whose layers give the names; without one the table knows no stages.
        warmup: calls before recording; at least 1. All but the first give ``unrecorded_ms``. One more is made while the
            profiler starts.
        steps: calls recorded.
        device: that computes; by default that of the model's parameters, or the CPU where there are none.
    Raises:
        ValueError: ``warmup`` or ``steps`` is less than 1.
    """
    for name, value in (("warmup", warmup), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if device is None:
        parameter = next(model.parameters(), None) if model is not None else None
        device = parameter.device if parameter is not None else "cpu"
    device = torch.device(device)
    on_gpu = device.type == "cuda"

    def timed() -> float:
        begin = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - begin)

    unrecorded = [timed() for _ in range(warmup)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TRACE
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    naming: AbstractContextManager[dict[str, Layer]] = layer_ranges(model) if model is not None else nullcontext({})
    with (
        naming as layers,
        torch_profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=lambda recorder: recorder.export_chrome_trace(str(path)),
            record_shapes=True,
            profile_memory=True,
            acc_events=True,
        ) as recorder,
    ):
        for _ in range(1 + steps):
            timed()
            recorder.step()
    trace = StepTrace(json.loads(path.read_text(encoding="utf-8")), layers, "cuda" if on_gpu else "cpu")
    path.write_text(json.dumps(trace.with_backward_ranges()), encoding="utf-8")
    where = torch.cuda.get_device_name(device) if on_gpu else f"cpu, threads: {torch.get_num_threads()}"
    result = Profile(
        rows=tuple(trace.rows()),
        step_ms=trace.step_ms,
        unrecorded_ms=statistics.median(unrecorded[1:] or unrecorded),
        device=where,
        folder=folder,
    )
    _write(result, trace)
    return result


def _write(result: Profile, trace: StepTrace) -> None:
    folder = result.folder
    (folder / "table.md").write_text(result.table(), encoding="utf-8")
    record = {
        "device": result.device,
        "torch": torch.__version__,
        "steps": len(trace.steps),
        "step_ms": result.step_ms,
        "unrecorded_ms": result.unrecorded_ms,
        "rows": [asdict(row) for row in result.rows],
    }
    (folder / "profile.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    milliseconds, present, phases = trace.memory()
    with open(folder / "memory.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ms", *(f"{kind}_bytes" for kind in present)])
        writer.writerows(zip(milliseconds, *present.values(), strict=True))
    save_figure(memory_figure(milliseconds, present, phases), folder / "memory.png")
