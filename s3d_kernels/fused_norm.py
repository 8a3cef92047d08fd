"""Normalisation that waits for what follows it, so that norm, residual and LeakyReLU make one trip through memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import operators
from .backends import BlockGeometry
from .operators.norm import affine_tables


@dataclass(frozen=True)
class Recipe:
    """How activated features follow from the input of their normalisation: leaky_relu((x - mean) * scale + shift).

    A layer that needs its input in backward keeps this and not the features: x is kept for the normalisation anyway.
    """

    x: Tensor  # [V, bd, bh, bw, C]
    mean: Tensor  # [N, C]
    scale: Tensor  # [N, C]
    shift: Tensor  # [N, C]
    slope: float


@dataclass(frozen=True)
class PendingNorm:
    """A normalisation whose statistics are known and whose result is not computed yet.

    Attributes:
        x: features [V, bd, bh, bw, C].
        weight: [C] or None.
        bias: [C] or None.
        mean: [N, C].
        rstd: [N, C].
        count: values that each statistic was taken over, [N, C] or [1, C].
        geometry: where the rows lie.
        shared: over, groups, synchronise and backend, as ``operators.normalize`` takes them.
        residual: features [V, bd, bh, bw, C] that are added to the result, or None.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    count: Tensor
    geometry: BlockGeometry
    shared: tuple[str, int, bool, str]
    residual: Tensor | None = None

    def plus(self, residual: Tensor) -> PendingNorm:
        """The same with features to add. There must be none yet."""
        return replace(self, residual=residual)

    def can_add(self, other: Any) -> bool:
        """Whether :meth:`plus` gives what an addition afterwards would: same shape and dtype, nothing added yet."""
        return (
            self.residual is None
            and isinstance(other, Tensor)
            and other.shape == self.x.shape
            and other.dtype == self.x.dtype
        )

    def compute(self, slope: float) -> tuple[Tensor, Recipe | None]:
        """The features after LeakyReLU (slope 1: none), and their recipe where x suffices to compute them again."""
        g = self.geometry
        y = operators.normalize(
            self.x,
            self.weight,
            self.bias,
            self.residual,
            self.mean,
            self.rstd,
            self.count,
            g.index,
            g.voxels,
            g.sample_offsets,
            g.sizes(),
            slope,
            *self.shared,
        )
        # A compiled graph cannot see whether the features are modified in place later, and keeps them.
        differentiable = torch.is_grad_enabled() and self.x.requires_grad
        if self.residual is not None or not differentiable or torch.compiler.is_compiling():
            return y, None
        with torch.no_grad():
            scale, shift = affine_tables(self.weight, self.bias, self.mean, self.rstd)
        return y, Recipe(self.x, self.mean, scale, shift, slope)
