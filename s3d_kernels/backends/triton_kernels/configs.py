"""Tile shapes of the convolutions: a small space, a model of what each costs, and the choice.

Until somebody tunes, the configuration that the model likes best is used, so no step ever waits for a measurement
that nobody asked for. The model knows no voxel counts: one configuration serves all mask ratios.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from triton.runtime.errors import OutOfResources

from ..measurements import dropped_with_measurements, is_tuning, store, time_call
from . import FLAT_CHANNELS
from .window import WindowShape

_log = logging.getLogger(__name__)

# What the model takes a GPU to be: rough figures of an H100, of which only the ratios matter.
_PRODUCTS_PER_S = {torch.bfloat16: 6e14, torch.float16: 6e14, torch.float32: 2.5e14}
_EXACT_PRODUCTS_PER_S = 4e13
_L2_BYTES_PER_S = 5.5e12
_INTEGER_OPERATIONS_PER_S = 1.5e13
# Integer operations that find the source of a row under a tap; the four to eight threads that copy a row all do them.
_OPERATIONS_PER_ROW = 200
# So that every GPU since compute capability 8.0 can hold a program: 99 KiB on the smaller ones.
MAX_SHARED_BYTES = 96 * 1024
_CANDIDATES = 6


@dataclass(frozen=True)
class ConvConfig:
    """How the work of a convolution is cut.

    Attributes:
        tile_m: rows of a tile: voxels. For the gradient of a weight: input channels.
        tile_n: columns of a tile: channels.
        tile_k: what is added up in a step: channels. For the gradient of a weight: voxels.
        warps: of a program.
        buffers: steps whose operands are in shared memory at once.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    warps: int
    buffers: int

    def operand_bytes(self, dtype: torch.dtype) -> int:
        """Of a step."""
        return (self.tile_m + self.tile_n) * self.tile_k * dtype.itemsize


@dataclass(frozen=True)
class ConvClass:
    """Convolutions that have one configuration. A tile's rows are voxels, its columns written channels.

    Attributes:
        dtype: of the features.
        exact: whether float32 is multiplied as it is.
        k_channels: of a group, gathered.
        n_channels: of a group, written.
        groups: of channels.
        shape: of the window.
        fused: whether norms are computed on the way.
    """

    dtype: torch.dtype
    exact: bool
    k_channels: int
    n_channels: int
    groups: int
    shape: WindowShape
    fused: bool = False

    @property
    def flat(self) -> bool:
        """Whether (tap, channel) pairs are what is added up."""
        return self.k_channels < FLAT_CHANNELS

    def skips(self, config: ConvConfig) -> bool:
        """Whether there may be tiles with taps that have no pair, which are worth a branch."""
        whole = math.prod(self.shape.UNITS) % config.tile_m == 0
        return not (self.flat or whole) or self.shape.GATHERED_PARTIAL or self.shape.WRITTEN_PARTIAL

    def stages(self, config: ConvConfig) -> int:
        """Of Triton's pipeline. Where a step looks its rows up itself, every second one is for that."""
        looks_up = self.flat or not (self.fused or self.skips(config))
        return 2 * config.buffers - 1 if looks_up else config.buffers

    def space(self) -> list[ConvConfig]:
        """All configurations that are worth compiling."""
        units = math.prod(self.shape.UNITS)
        most_n = power_of_two(self.n_channels, 16, 64 if self.exact else 128)
        most_k = 16 if self.exact else power_of_two(self.k_channels, 32, 64)
        every = itertools.product((32, 64, 128), (16, 32, 64, 128), (16, 32, 64), (4, 8), (2, 3, 4))
        return [
            config
            for config in (ConvConfig(*numbers) for numbers in every)
            if config.tile_n <= most_n
            and min(most_k, 32) <= config.tile_k <= most_k
            and config.buffers <= _most_buffers(self.flat, self.fused)
            # Small blocks mean few voxels.
            and (units % config.tile_m == 0 or (config.tile_m <= 64 and not self.fused))
            and self._registers_suffice(config)
            and self.shared_bytes(config) <= MAX_SHARED_BYTES
        ]

    def _registers_suffice(self, config: ConvConfig) -> bool:
        sums = config.tile_m * config.tile_n // (32 * config.warps)
        rows = config.tile_m * config.tile_k * self.dtype.itemsize // (128 * config.warps)  # in registers, if fused
        if self.k_channels % 8 or self.n_channels % 8:  # each number is copied by itself, and has an address
            return 4 <= sums <= 16 and config.tile_m * config.tile_k <= 2048 and config.buffers == 2
        return 4 <= sums <= (32 if self.exact else 64) and rows <= (16 if self.fused else 64)

    def shared_bytes(self, config: ConvConfig) -> int:
        """At most, on any GPU."""
        activated = config.tile_m * config.tile_k * self.dtype.itemsize + 4096 if self.fused else 1024
        return config.buffers * config.operand_bytes(self.dtype) + activated

    def cost(self, config: ConvConfig) -> float:
        """Seconds for a written voxel under one tap, by the model."""
        steps = math.ceil(self.k_channels / config.tile_k) * math.ceil(self.n_channels / config.tile_n)
        products = 2 * config.tile_n * config.tile_k
        read = config.operand_bytes(self.dtype) / config.tile_m
        return steps * _seconds(self.dtype, self.exact, products, read, config)


@dataclass(frozen=True)
class GradWeightClass:
    """Gradients of weights that have one configuration. A tile's rows are input channels.

    Attributes:
        dtype: of the features.
        exact: whether float32 is multiplied as it is.
        k_channels: of a group, of the input; times the taps if `flat`.
        n_channels: of a group, of the output.
        groups: of channels.
        shape: of the window.
        flat: whether a tile's rows are (tap, channel) pairs.
    """

    dtype: torch.dtype
    exact: bool
    k_channels: int
    n_channels: int
    groups: int
    shape: WindowShape
    flat: bool

    def stages(self, config: ConvConfig) -> int:
        """Of Triton's pipeline, of which every second one looks rows up."""
        return 2 * config.buffers - 1

    def space(self) -> list[ConvConfig]:
        """All configurations that are worth compiling."""
        most_m, most_n = (power_of_two(c, 16, 64 if self.exact else 128) for c in (self.k_channels, self.n_channels))
        every = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (16, 32, 64), (4, 8), (2, 3, 4))
        return [
            config
            for config in (ConvConfig(*numbers) for numbers in every)
            if config.tile_m <= most_m
            and config.tile_n <= most_n
            and (config.tile_k == 16) == self.exact
            and config.buffers <= _most_buffers(self.flat)
            # The inputs of (tap, channel) pairs, and of odd numbers of channels, have an address each.
            and config.tile_k * config.tile_m <= (2048 if self.flat or self.k_channels % 8 else 8192)
            and min(4, most_m * most_n // 128)
            <= config.tile_m * config.tile_n // (32 * config.warps)
            <= (32 if self.exact else 64)
            and self.shared_bytes(config) <= MAX_SHARED_BYTES
        ]

    def shared_bytes(self, config: ConvConfig) -> int:
        """At most, on any GPU."""
        return config.buffers * config.operand_bytes(self.dtype) + 1024

    def cost(self, config: ConvConfig) -> float:
        """Seconds for an output voxel under one tap, by the model."""
        tiles = math.ceil(self.k_channels / config.tile_m) * math.ceil(self.n_channels / config.tile_n)
        products = 2 * config.tile_m * config.tile_n
        read = config.operand_bytes(self.dtype) / config.tile_k
        return tiles * _seconds(self.dtype, self.exact, products, read, config)


def _most_buffers(flat: bool, fused: bool = False) -> int:
    """With more of them the addresses that are under way do not fit in the registers."""
    return 2 if flat else 3 if fused else 4


def _seconds(dtype: torch.dtype, exact: bool, products: float, read_bytes: float, config: ConvConfig) -> float:
    """For a row of a step. Products, reading and index arithmetic share a multiprocessor, so they are added."""
    rate = _EXACT_PRODUCTS_PER_S if exact else _PRODUCTS_PER_S[dtype]
    index = _OPERATIONS_PER_ROW / _INTEGER_OPERATIONS_PER_S
    # A deeper pipeline waits less, a short step more.
    waiting = 1 + 0.2 / config.buffers + 4 / (config.tile_k * config.warps)
    return (products / rate + read_bytes / _L2_BYTES_PER_S + index) * waiting


Class = ConvClass | GradWeightClass


def candidates(kind: Class) -> list[ConvConfig]:
    """What tuning measures: the cheapest by the model, best first."""
    return sorted(kind.space(), key=lambda config: (kind.cost(config), repr(config)))[:_CANDIDATES]


_chosen: dict[Class, ConvConfig] = dropped_with_measurements({})


def choose(kind: Class, launch: Callable[[ConvConfig], object], device: torch.device) -> ConvConfig:
    """The configuration of a class: the fastest if it was tuned on this machine, or is now; else the model's best.

    Args:
        kind: the class.
        launch: computes with a configuration, for the measurement.
        device: of the computation.
    """
    if kind in _chosen:
        return _chosen[kind]
    stored = store().get(repr(kind), device.type)
    if stored is not None:
        config = ConvConfig(**stored)
    elif is_tuning() and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        config = _fastest(kind, launch, device)
        store().put(repr(kind), dataclasses.asdict(config), device.type)
    else:
        config = candidates(kind)[0]
    _chosen[kind] = config
    return config


def _fastest(kind: Class, launch: Callable[[ConvConfig], object], device: torch.device) -> ConvConfig:
    times: dict[ConvConfig, float] = {}
    for config in candidates(kind):
        try:
            times[config] = time_call(functools.partial(launch, config), device)
        except OutOfResources as error:
            _log.warning("triton: %s cannot be computed with %s here: %s", kind, config, error)
    if not times:
        raise RuntimeError(f"no configuration for {kind} can be computed on this GPU")
    fastest = min(times, key=lambda config: times[config])
    _log.info("triton: %s takes %.3f ms with %s", kind, times[fastest], fastest)
    return fastest


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two that is not smaller than `number`, between two bounds."""
    return min(most, max(least, 1 << (number - 1).bit_length()))
