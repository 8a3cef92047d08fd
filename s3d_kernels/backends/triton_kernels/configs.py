"""Tile shapes of the convolutions: a small space, a model of what each costs, and the choice.

Until somebody tunes, the configuration that the model likes best is used, so no step ever waits for a measurement
that nobody asked for. The model knows no voxel counts: one configuration serves all mask ratios.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from .window import WindowShape

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
        stages: steps whose operands are under way at once.
        programs: on a multiprocessor.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    warps: int
    stages: int
    programs: int = 2

    def shared_bytes(self, dtype: torch.dtype) -> int:
        return self.stages * (self.tile_m + self.tile_n) * self.tile_k * dtype.itemsize


@dataclass(frozen=True)
class ConvClass:
    """Convolutions that have one configuration. A tile's rows are voxels, its columns written channels."""

    dtype: torch.dtype
    precision: str
    k_channels: int  # of a group, gathered
    n_channels: int  # of a group, written
    groups: int
    shape: WindowShape
    fused: bool = False

    @property
    def units(self) -> int:
        """Of a block."""
        return math.prod(self.shape.UNITS)

    def skips(self, config: ConvConfig) -> bool:
        """Whether there may be tiles with taps that have no pair."""
        return self.units % config.tile_m != 0 or self.shape.GATHERED_PARTIAL or self.shape.WRITTEN_PARTIAL

    def space(self) -> list[ConvConfig]:
        """All configurations that are worth compiling."""
        exact = self.precision == "ieee" and self.dtype == torch.float32
        wide = power_of_two(self.n_channels, 16, 64 if exact else 128)
        configs = [
            ConvConfig(tile_m, tile_n, tile_k, warps, stages)
            for tile_m, tile_n, tile_k, warps, stages in itertools.product(
                (32, 64, 128), {16, 32, 64, 128}, (16, 32, 64), (4, 8), (2, 3, 4)
            )
            if tile_n <= wide
            and tile_k <= power_of_two(self.k_channels, 32, 64)
            and 16 <= tile_m * tile_n // (32 * warps) <= (32 if exact else 64)
            and not (self.fused and self.units % tile_m)
            and not (exact and tile_k > 16)
            and (exact or tile_k > 16)
        ]
        return [config for config in configs if config.shared_bytes(self.dtype) <= MAX_SHARED_BYTES]

    def cost(self, config: ConvConfig) -> float:
        """Seconds for a gathered row under one tap, by the model."""
        rate = _EXACT_PRODUCTS_PER_S if self.precision == "ieee" else _PRODUCTS_PER_S[self.dtype]
        steps = math.ceil(self.k_channels / config.tile_k) * math.ceil(self.n_channels / config.tile_n)
        products = 2 * config.tile_n * config.tile_k / rate
        rows_and_weights = (1 + config.tile_n / config.tile_m) * config.tile_k * self.dtype.itemsize
        # Deeper pipelines hide more, larger tiles leave fewer of them on a multiprocessor.
        waiting = 1 + 0.1 / (config.stages - 1) + 0.02 * config.shared_bytes(self.dtype) / MAX_SHARED_BYTES
        # A block that does not fill a tile has neighbours in it that need other taps.
        filled = min(1.0, self.units / config.tile_m) if self.units % config.tile_m else 1.0
        index = _OPERATIONS_PER_ROW / (config.warps / 4) ** 0.25 / _INTEGER_OPERATIONS_PER_S
        return steps * (products + rows_and_weights / _L2_BYTES_PER_S + index) * waiting / filled**0.1

    def key(self) -> str:
        """As which a tuned configuration is stored."""
        shape = " ".join(f"{name}={value}" for name, value in self.shape._asdict().items())
        return (
            f"triton conv3d {self.dtype} {self.precision} {self.k_channels} {self.n_channels} {self.groups} "
            f"fused={self.fused} {shape}"
        )


@dataclass(frozen=True)
class GradWeightClass:
    """Gradients of weights that have one configuration. A tile's rows are input channels (FLAT: and taps)."""

    dtype: torch.dtype
    precision: str
    k_channels: int  # of a group, of the input; with FLAT times the taps
    n_channels: int  # of a group, of the output
    groups: int
    shape: WindowShape

    def space(self) -> list[ConvConfig]:
        """All configurations that are worth compiling."""
        exact = self.precision == "ieee" and self.dtype == torch.float32
        most_m, most_n = (power_of_two(c, 16, 64 if exact else 128) for c in (self.k_channels, self.n_channels))
        configs = [
            ConvConfig(tile_m, tile_n, tile_k, warps, stages)
            for tile_m, tile_n, tile_k, warps, stages in itertools.product(
                (16, 32, 64, 128), (16, 32, 64, 128), (16, 32, 64), (4, 8), (2, 3, 4)
            )
            if tile_m <= most_m
            and tile_n <= most_n
            and (tile_m * tile_n // (32 * warps) <= (32 if exact else 64))
            and (tile_m * tile_n >= 512 * warps // 4 or (tile_m, tile_n, warps) == (most_m, most_n, 4))
            and (tile_k == 16) == exact
        ]
        return [config for config in configs if config.shared_bytes(self.dtype) <= MAX_SHARED_BYTES]

    def cost(self, config: ConvConfig) -> float:
        """Seconds for an output voxel under one tap, by the model."""
        rate = _EXACT_PRODUCTS_PER_S if self.precision == "ieee" else _PRODUCTS_PER_S[self.dtype]
        tiles = math.ceil(self.k_channels / config.tile_m) * math.ceil(self.n_channels / config.tile_n)
        products = 2 * config.tile_m * config.tile_n / rate
        read = (config.tile_m + config.tile_n) * self.dtype.itemsize / _L2_BYTES_PER_S
        waiting = 1 + 0.1 / (config.stages - 1) + 0.02 * config.shared_bytes(self.dtype) / MAX_SHARED_BYTES
        index = _OPERATIONS_PER_ROW / (config.warps / 4) ** 0.25 / _INTEGER_OPERATIONS_PER_S
        return tiles * (products + read + index) * waiting * (1 + 4 / config.tile_k)

    def key(self) -> str:
        """As which a tuned configuration is stored."""
        shape = " ".join(f"{name}={value}" for name, value in self.shape._asdict().items())
        return (
            f"triton conv3d_grad_weight {self.dtype} {self.precision} {self.k_channels} {self.n_channels} "
            f"{self.groups} {shape}"
        )


Class = ConvClass | GradWeightClass
Result = TypeVar("Result")


def candidates(kind: Class) -> list[ConvConfig]:
    """What tuning measures: the cheapest by the model, best first."""
    return sorted(kind.space(), key=lambda config: (kind.cost(config), repr(config)))[:_CANDIDATES]


_chosen: dict[Class, ConvConfig] = {}


def choose(kind: Class, launch: Callable[[ConvConfig], object]) -> ConvConfig:
    """The configuration of a class: tuned here before, or the best by the model."""
    if kind not in _chosen:
        _chosen[kind] = candidates(kind)[0]
    return _chosen[kind]


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two that is not smaller than `number`, between two bounds."""
    return min(most, max(least, 1 << (number - 1).bit_length()))
