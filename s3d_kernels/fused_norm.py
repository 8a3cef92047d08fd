"""Normalisation that waits for what follows it, so that norm, residual and LeakyReLU make one trip through memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import operators
from .backends import BlockGeometry
from .operators.norm import SAVED_X, SAVED_Y, affine_tables
from .recompute import MAX_STEPS, Kept, NormRecipe, Recipe, compute_instead


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
        x_recipe: how to compute x again, or None.
        residual: features [V, bd, bh, bw, C] that are added to the result, or None.
        residual_recipe: how to compute residual again, or None.
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
    x_recipe: Recipe | None = None
    residual: Tensor | None = None
    residual_recipe: Recipe | None = None
    grad_mode: bool = field(default_factory=torch.is_grad_enabled)
    versions: tuple[int | None, ...] = ()

    @staticmethod
    def may_wait(x: Tensor) -> bool:
        """Not in a compiled graph or in inference mode, where nobody could tell if an operand was modified since."""
        return not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled() and not x.is_inference()

    def waiting(self) -> PendingNorm:
        """The same, knowing the present versions of its operands."""
        return replace(self, versions=self._versions())

    def plus(self, residual: Tensor, recipe: Recipe | None) -> PendingNorm | None:
        """The same with features to add, or None if an addition afterwards would give something else."""
        fits = residual.shape == self.x.shape and residual.dtype == self.x.dtype and not residual.is_inference()
        if self.residual is not None or not fits or self.grad_mode != torch.is_grad_enabled():
            return None
        self._check()
        return replace(self, residual=residual, residual_recipe=recipe).waiting()

    def compute(self, slope: float) -> tuple[Tensor, Recipe | None]:
        """The features after LeakyReLU (slope 1: none), and how backward gets them, if it can without keeping them.

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
        if not self.versions or not y.requires_grad:
            return y, None
        return y, self._relieve(y, slope)

    def _relieve(self, y: Tensor, slope: float) -> Recipe | None:
        """Take from the graph what backward can compute again. Returns: the recipe of y."""
        x: Recipe = Kept(self.x)
        if self.x_recipe is not None and self.x_recipe.holds and self.x_recipe.steps < MAX_STEPS:
            x = self.x_recipe
            if not isinstance(x, Kept):
                compute_instead(y, SAVED_X, x.features)
        # With a residual, backward needs the signs of y too.
        as_it_is = Kept(y) if self.residual is not None and slope != 1.0 else None
        residual = self.residual_recipe
        if self.residual is not None and (residual is None or not residual.holds):
            return as_it_is
        with torch.no_grad():
            scale, shift = affine_tables(self.weight, self.bias, self.mean, self.rstd)
        recipe = NormRecipe(x, residual, self.mean, scale, shift, slope, self.geometry, self.shared[-1])
        if recipe.steps > MAX_STEPS:
            return as_it_is
        if as_it_is is not None and not compute_instead(y, SAVED_Y, recipe.features):
            return as_it_is
        return recipe

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
