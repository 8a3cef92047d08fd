"""How much memory a training step needs, before it is tried."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from s3d_kernels import computes_natively, use_backend

from .distributed import Processes
from .model import Architecture, NetworkShape, preset_shape
from .pretext.registry import METHODS
from .pretrain_config import PretrainConfig
from .run_settings import RunSettings

log = logging.getLogger(__name__)

# Values that a step holds at its peak for each feature of the network, a feature being one channel of one voxel of one
# stage: in the dense part (decoder, densification and their gradients) by our kernels and by others, and, where a voxel
# is visible, in the encoder. Fitted to measured steps (docs/performance.md, "Memory of a step").
DENSE_NATIVE, DENSE, VISIBLE = 5.7, 8.5, 3.7
# The same for our kernels with shortcuts, which let the part that is known go and, where a voxel is visible, hold the
# correction and its shell: bounds of what was measured.
SHORT_NATIVE, SHORT_VISIBLE = 3.1, 7.5
# The same for plain networks that are trained without masks (ResEnc measured: 13.5 to 17 in float32; blocks that expand
# their channels hold more), and the share of the bytes that they take in half precision (measured: 0.64 to 0.7).
DENSE_ALONE: dict[Architecture, float] = {"resenc": 17.0, "convnext": 28.0, "mednext": 39.0, "swin-unetr": 30.0}
HALF_PRECISION = 0.7
# What a step may take of the memory that is free.
SHARE = 0.9


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step.

    Attributes:
        weights: parameters, gradients, state of the optimiser, moving average.
        patch: what each patch adds that is computed at the same time.
    """

    weights: int
    patch: int

    def total(self, patches: int) -> int:
        """Of a step that computes so many patches at once."""
        return self.weights + patches * self.patch


def step_memory(config: PretrainConfig, device: torch.device) -> StepMemory:
    """Expected memory of the steps of a run; measured on CPUs in float32, elsewhere an extrapolation.

    Of other methods than S3D and other networks than ResEnc U-Nets that of a plain network on whole patches, which is
    an upper bound for sparse encoders.
    """
    with torch.device("meta"):
        model = METHODS[config.method](config).build_model()
    if config.method != "s3d" or config.size.architecture != "resenc":
        return dense_step_memory(config, model, preset_shape(config.preset), config.patch_size)
    low = config.mask_ratio[0] if isinstance(config.mask_ratio, tuple) else config.mask_ratio
    visible = 1 - low if config.sparse else 1.0
    with use_backend(config.backend):
        native = device.type == "cpu" and computes_natively(torch.empty(0, 1))
    everywhere, shown = (DENSE_NATIVE if native else DENSE), VISIBLE
    if native and config.shortcuts and config.sparse and not config.compile:
        everywhere, shown = SHORT_NATIVE, SHORT_VISIBLE
    values = _features(preset_shape(config.preset)) * (everywhere + shown * visible)
    size = 4 if config.precision == "float32" else 2
    return StepMemory(weights=_weights(config, model), patch=int(math.prod(config.patch_size) * values * size))


def dense_step_memory(
    config: RunSettings, network: nn.Module, shape: NetworkShape, patch_size: Sequence[int]
) -> StepMemory:
    """Expected memory of steps that train a plain network on whole patches; measured on CPUs."""
    bytes_a_value = 4.0 if config.precision == "float32" else 4.0 * HALF_PRECISION
    values = _features(shape) * DENSE_ALONE[shape.architecture] * math.prod(patch_size)
    return StepMemory(weights=_weights(config, network), patch=int(values * bytes_a_value))


def _features(shape: NetworkShape) -> float:
    """Channels of all stages for each voxel of the input."""
    features, scale = 0.0, 1.0
    for channels, stride in zip(shape.features, shape.strides, strict=True):
        scale *= math.prod(stride)
        features += channels / scale
    return features


def _weights(config: RunSettings, model: nn.Module) -> int:
    """Bytes of parameters, gradients, state of the optimiser and moving average."""
    copies = 2 + (2 if config.optimizer == "adamw" else 1) + (1 if config.ema_decay else 0)
    return 4 * copies * sum(parameter.numel() for parameter in model.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU; on a CPU the process's share of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container or job
    if limit.is_file() and limit.read_text().strip().isdigit():
        whole = min(whole, int(limit.read_text()))
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def fewest_parts(memory: StepMemory, patches: int, free: int) -> int:
    """Into how many equal parts to cut the patches of a process, so that a part fits; one patch each if none does."""
    fitting = [
        parts
        for parts in range(1, patches + 1)
        if patches % parts == 0 and memory.total(patches // parts) <= SHARE * free
    ]
    return fitting[0] if fitting else patches


def choose_parts(config: RunSettings, group: Processes, memory: StepMemory) -> int:
    """Into how many parts each process cuts its patches of a step; says how much memory that is expected to take.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """
    if config.batch_size % (group.world * (config.accumulate or 1)):
        raise ValueError(
            f"batch_size must be a multiple of processes ({group.world}) times accumulate "
            f"({config.accumulate or 1}), got {config.batch_size}"
        )
    patches = config.batch_size // group.world
    free = min(group.gather(free_memory(group.device)))  # all must do the same
    parts = config.accumulate or fewest_parts(memory, patches, free)
    expected = memory.total(patches // parts)
    if group.first:
        log.log(
            logging.WARNING if expected > free else logging.INFO,
            "expected memory: %.2f GiB for weights, gradients and optimiser, %.2f GiB for %d patch(es) at once "
            "(accumulate %d); %.1f GiB are there",
            memory.weights / 2**30,
            memory.patch * (patches // parts) / 2**30,
            patches // parts,
            parts,
            free / 2**30,
        )
    return parts
