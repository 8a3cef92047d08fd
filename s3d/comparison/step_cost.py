"""What a training step costs: operations, seconds, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s3d.model import NetworkShape, build_network
from s3d.pretext.method import Draw, Pretext
from s3d.pretrain_config import PretrainConfig
from s3d.training_log import read_log
from s3d_kernels.flops import FlopCount

MOST_PATCHES = 2  # that operations are counted on: a patch costs what it costs


@dataclass(frozen=True)
class MeasuredSteps:
    """What the log of a run says.

    Attributes:
        steps: the last that was logged.
        seconds: of all steps, without validation and checkpoints.
        seconds_per_step: median.
        memory_mib: the most.
    """

    steps: int
    seconds: float
    seconds_per_step: float
    memory_mib: float


def measured_steps(log: Path, batch_size: int, first: int = 0) -> MeasuredSteps:
    """Of a log, from a step on.

    Args:
        log: log.csv of a run.
        batch_size: of the run.
        first: how many steps to leave out at the beginning.
    """
    rows = [row for row in read_log(log) if "samples_per_second" in row]
    before = [0, *(int(row["step"]) for row in rows[:-1])]
    # A row is about the steps since the row before it.
    steps = [int(row["step"]) - last for row, last in zip(rows, before, strict=True)]
    seconds = [batch_size / row["samples_per_second"] for row in rows]
    counted = [place for place, row in enumerate(rows) if row["step"] > first]
    times = sorted(seconds[place] for place in counted)
    return MeasuredSteps(
        steps=int(rows[-1]["step"]) if rows else 0,
        seconds=sum(steps[place] * seconds[place] for place in counted),
        seconds_per_step=times[len(times) // 2] if times else float("nan"),
        memory_mib=max((row.get("memory_mib", 0.0) for row in rows), default=0.0),
    )


def forget_peak_memory(device: str) -> None:
    """From now on the peak of memory is that of what comes, not of what this process has done before."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # Where a container forbids it, the figure is the peak of all that the process has done.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def trained_parameters(pretext: Pretext[Any]) -> int:
    """How many numbers a method trains."""
    return sum(weight.numel() for weight in pretext.build_model().parameters() if weight.requires_grad)


def step_flops(pretext: Pretext[Any], config: PretrainConfig) -> float:
    """Floating-point operations of forward and backward of a step of pre-training, see `s3d_kernels.flops`.

    Counted on two patches with random content. Where the masked share is drawn from a range, its middle is counted.
    """
    patches = min(config.batch_size, MOST_PATCHES)
    share = config.batch_size / patches
    # Operations are all but linear in the masked share, so the middle stands for the mean of all steps.
    ratio = sum(config.mask_ratio) / 2 if isinstance(config.mask_ratio, tuple) else config.mask_ratio
    config = dataclasses.replace(
        config, batch_size=patches, mask_ratio=ratio, checkpoint_activations=False, accumulate=None
    )
    pretext = type(pretext)(config)
    model = pretext.build_model()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(patches, 1, *config.patch_size, generator=generator)
    problem = pretext.pose(image, None, Draw(config.seed, (0, 0), patches, 0, patches))
    with FlopCount() as count:
        pretext.loss(pretext.answer(model, problem), problem, pretext.terms(problem)).backward()
    return sum(count.flops.values()) * share


def finetuning_step_flops(network: NetworkShape, patch_size: Sequence[int], channels: int, classes: int) -> float:
    """Of a step of fine-tuning on one patch, forward and backward, with deep supervision."""
    with torch.device("meta"):  # shapes say it all: nothing is computed
        model = build_network(network, channels, classes, deep_supervision=True)
        patch = torch.empty(1, channels, *patch_size)
    with FlopCount() as count:
        outputs = model(patch)
        torch.stack([output.sum() for output in outputs]).sum().backward()
    return sum(count.flops.values())
