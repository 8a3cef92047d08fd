"""Normalisation that waits for what follows it, so that norm, residual and LeakyReLU make one trip through memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import operators
from .backends import BlockGeometry, ConvProblem, fusing
from .operators.norm import SAVED_X, SAVED_Y
from .recompute import MAX_STEPS, Kept, NormRecipe, Recipe, compute_instead


@dataclass(eq=False)
class PendingNorm:
    """A normalisation whose statistics are known and whose result is not computed yet.

    Attributes:
        x: features [V, bd, bh, bw, C].
        weight: [C] or None.
        bias: [C] or None.
        mean: [N, C].
        rstd: [N, C].
        count: values that each statistic was taken over, at least 1, [N, C], [N, 1] or [1, C].
        geometry: where the rows lie.
        shared: over, groups, synchronise and backend, as ``operators.normalize`` takes them.
        x_recipe: how to compute x again, or None.
        residual: features [V, bd, bh, bw, C] that are added to the result, or None.
        residual_recipe: how to compute residual again, or None.
        grad_mode: whether gradients were recorded when the norm was called.
        versions: of x, weight, bias and residual when it began to wait; () if it does not wait.
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
        """Itself, from now on knowing the present versions of its operands."""
        self.versions = self._versions()
        return self

    def plus(self, residual: Tensor, recipe: Recipe | None) -> PendingNorm | None:
        """The same with features to add, or None if an addition afterwards would give something else."""
        fits = residual.shape == self.x.shape and residual.dtype == self.x.dtype and not residual.is_inference()
        if self.residual is not None or not fits or self.grad_mode != torch.is_grad_enabled():
            return None
        self._check()
        return replace(self, residual=residual, residual_recipe=recipe).waiting()

    def may_defer(self, slope: float) -> bool:
        """Whether a convolution that follows could compute the result after LeakyReLU itself, see :meth:`defer`.

        Not with a residual, which it would have to read too; and not where hooks on saved tensors are set, of
        torch.utils.checkpoint or others, which are to see what they would see without all this.
        """
        if self.residual is not None or slope == 1.0 or not self.versions or hooks_are_set():
            return False
        sides = (3, 3, 3), (1, 1, 1), (1, 1, 1)
        channels, block, partial = self.x.shape[-1], self.geometry.block, self.geometry.voxels is not None
        problem = ConvProblem(self.x.device.type, self.x.dtype, channels, channels, 1, *sides, block, partial)
        return fusing(self.shared[-1], problem) is not None

    def defer(self, slope: float) -> DeferredNorm:
        """The place of the features after LeakyReLU in the graph, for readers who compute the values themselves.

        Raises:
            RuntimeError: an operand was modified in place since the norm was called.
        """
        self._check()
        with torch.set_grad_enabled(self.grad_mode):
            place, *tables = operators.normalize_deferred(*self._arguments(slope))
        recipe = self._recipe(self._relieve_input(place), None, tables, slope)
        return DeferredNorm(place, self.x.detach(), self.x._version, recipe)

    def compute(self, slope: float) -> tuple[Tensor, Recipe | None]:
        """The features after LeakyReLU (slope 1: none), and how backward gets them, if it can without keeping them.

        Raises:
            RuntimeError: an operand was modified in place since the norm was called.
        """
        if self.versions:
            self._check()
        with torch.set_grad_enabled(self.grad_mode):
            y, *tables = operators.normalize(*self._arguments(slope))
        if not self.versions or not y.requires_grad:
            return y, None
        return y, self._relieve(y, tables, slope)

    def _arguments(self, slope: float) -> tuple[Any, ...]:
        g = self.geometry
        return (
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

    def _relieve(self, y: Tensor, tables: list[Tensor], slope: float) -> Recipe | None:
        """Take from the graph what backward can compute again. Returns: the recipe of y.

        Args: tables: scale and shift of the features.
        """
        x = self._relieve_input(y)
        # With a residual, backward needs the signs of y too.
        as_it_is = Kept(y) if self.residual is not None and slope != 1.0 else None
        residual = self.residual_recipe
        if self.residual is not None and (residual is None or not residual.holds):
            return as_it_is
        recipe = self._recipe(x, residual, tables, slope)
        if recipe.steps > MAX_STEPS:
            return as_it_is
        if as_it_is is not None and not compute_instead(y, SAVED_Y, recipe.features):
            return as_it_is
        return recipe

    def _relieve_input(self, y: Tensor) -> Recipe:
        """Take the norm's input from the graph if it has a recipe. Returns: its recipe."""
        if self.x_recipe is None or not self.x_recipe.holds or self.x_recipe.steps >= MAX_STEPS:
            return Kept(self.x)
        if not isinstance(self.x_recipe, Kept):
            compute_instead(y, SAVED_X, self.x_recipe.features)
        return self.x_recipe

    def _recipe(self, x: Recipe, residual: Recipe | None, tables: list[Tensor], slope: float) -> NormRecipe:
        scale, shift = tables
        return NormRecipe(x, residual, self.mean, scale, shift, slope, self.geometry, self.shared[-1])

    def _versions(self) -> tuple[int | None, ...]:
        operands = (self.x, self.weight, self.bias, self.residual)
        return tuple([None if t is None or t.is_inference() else t._version for t in operands])

    def _check(self) -> None:
        versions = self._versions()
        if versions == self.versions:
            return
        for name, then, now in zip(("input", "weight", "bias", "residual"), self.versions, versions, strict=True):
            if then != now:
                raise _modified(name)


@dataclass(frozen=True, eq=False)
class DeferredNorm:
    """A normalisation and LeakyReLU that have their place in the graph, but no values.

    Attributes:
        place: [V, bd, bh, bw, C], without values.
        raw: what is normalised, [V, bd, bh, bw, C], without history.
        version: of raw, when the norm was called.
        recipe: how to compute the values.
    """

    place: Tensor
    raw: Tensor
    version: int
    recipe: NormRecipe

    def check(self) -> None:
        """Raise RuntimeError if what is normalised was modified in place since."""
        if self.raw._version != self.version:
            raise _modified("input")

    def compute(self) -> tuple[Tensor, Recipe]:
        """The values, with the history of their place, and the recipe.

        Raises:
            RuntimeError: what is normalised was modified in place since.
        """
        if not torch.compiler.is_compiling():  # which can ask for no versions
            self.check()
        r, g = self.recipe, self.recipe.geometry
        block = (g.index, g.voxels, g.sample_offsets, g.sizes())
        with torch.set_grad_enabled(self.place.requires_grad):
            y = operators.compute_deferred(self.place, self.raw, r.mean, r.scale, r.shift, *block, r.slope, r.backend)
        return y, r


def hooks_are_set() -> bool:
    """Whether tensors that are saved now go through torch.autograd.graph.saved_tensors_hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _modified(name: str) -> RuntimeError:
    return RuntimeError(
        f"the {name} of a normalisation was modified in place before its result was used; "
        "ask for the result first (y.blocks), or modify a copy"
    )
