"""Normalisation that waits for what follows it, so that norm, residual and LeakyReLU make one trip through memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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
    version: int  # of x when the features were computed

    @property
    def holds(self) -> bool:
        """Whether x is what it was."""
        return self.x._version == self.version


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
        grad_mode: whether gradients were recorded when the norm was called.
        versions: of x, weight, bias and residual at their calls.
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
    grad_mode: bool = field(default_factory=torch.is_grad_enabled)
    versions: tuple[int | None, ...] = ()

    @staticmethod
    def may_wait(x: Tensor) -> bool:
        """Not in a compiled graph or in inference mode, where nobody could tell if an operand was modified since."""
        return not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled() and not x.is_inference()

    def waiting(self) -> PendingNorm:
        """The same, knowing the present versions of its operands."""
        return replace(self, versions=self._versions())

    def plus(self, residual: Tensor) -> PendingNorm | None:
        """The same with features to add, or None if an addition afterwards would give something else."""
        fits = residual.shape == self.x.shape and residual.dtype == self.x.dtype and not residual.is_inference()
        if self.residual is not None or not fits or self.grad_mode != torch.is_grad_enabled():
            return None
        self._check()
        return replace(self, residual=residual).waiting()

    def compute(self, slope: float) -> tuple[Tensor, Recipe | None]:
        """The features after LeakyReLU (slope 1: none), and their recipe where x suffices to compute them again.

        Raises:
            RuntimeError: an operand was modified in place since the norm was called.
        """
        if self.versions:
            self._check()
        g = self.geometry
        with torch.set_grad_enabled(self.grad_mode):
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
        if self.residual is not None or not self.versions or not (self.grad_mode and self.x.requires_grad):
            return y, None
        with torch.no_grad():
            scale, shift = affine_tables(self.weight, self.bias, self.mean, self.rstd)
        return y, Recipe(self.x, self.mean, scale, shift, slope, self.x._version)

    def _operands(self) -> dict[str, Tensor | None]:
        return {"input": self.x, "weight": self.weight, "bias": self.bias, "residual": self.residual}

    def _versions(self) -> tuple[int | None, ...]:
        return tuple(None if t is None or t.is_inference() else t._version for t in self._operands().values())

    def _check(self) -> None:
        for (name, _), then, now in zip(self._operands().items(), self.versions, self._versions(), strict=True):
            if then != now:
                raise RuntimeError(
                    f"the {name} of a normalisation was modified in place before its result was used; "
                    "ask for the result first (y.blocks), or modify a copy"
                )
