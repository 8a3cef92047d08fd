"""Features that backward computes again instead of keeping them.

Layers keep their input for backward. Where that input follows in a few cheap steps from tensors that are kept anyway,
a :class:`Recipe` says how, and :func:`compute_instead` puts it in the place of the features. Recipes refer to one
another: the output of a residual block is the norm of a kept tensor plus the recipe of the block before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from . import operators
from .backends import BlockGeometry

# Operators that a recipe may call. The longer recipes are, the less is kept between forward and backward, and the more
# is there at once when backward begins to need it.
MAX_STEPS = 3
# Products per value of a convolution that is computed again: the stem, projections of few channels.
MAX_PRODUCTS = 64


class Recipe(Protocol):
    """How to get features [V, bd, bh, bw, C] in backward, with the bits that they had in forward."""

    @property
    def steps(self) -> int:
        """Operators that it calls."""
        ...

    @property
    def holds(self) -> bool:
        """Whether all tensors that it starts from are what they were."""
        ...

    def features(self) -> Tensor:
        """The features, without history.

        Raises:
            RuntimeError: a tensor that it starts from was modified in place.
        """
        ...


class Kept:
    """Features that backward has anyway, as they are now."""

    steps = 0

    def __init__(self, features: Tensor) -> None:
        self._features = features.detach()  # shares memory and version counter, but holds no graph
        self._version = features._version

    @property
    def holds(self) -> bool:
        return self._features._version == self._version

    def features(self) -> Tensor:
        if not self.holds:
            raise RuntimeError(
                f"features {tuple(self._features.shape)} that backward computes others from were modified in place: "
                f"they are at version {self._features._version}, version {self._version} is needed; modify a copy"
            )
        return self._features


@dataclass(eq=False)
class ConvRecipe:
    """Output of a convolution: computed once, then there until nobody holds the recipe.

    The last to need it is the norm behind the convolution, when the gradients of all that follows are there.
    """

    x: Recipe
    weight: Tensor  # [C_out, C_in, kd, kh, kw]
    bias: Tensor | None  # [C_out]
    arguments: tuple[Any, ...]  # of operators.conv3d behind the bias
    _computed: Tensor | None = field(default=None, init=False)

    @classmethod
    def of(cls, x: Recipe, weight: Tensor, bias: Tensor | None, arguments: tuple[Any, ...]) -> ConvRecipe | None:
        """The recipe; None if it were too long or too much work (groups: few products, but slow for their number)."""
        *_, groups, _ = arguments
        if x.steps >= MAX_STEPS or groups != 1 or weight.numel() > MAX_PRODUCTS * weight.shape[0]:
            return None
        # Small copies: the parameters may be changed, or sharded again, before backward.
        return cls(x, weight.detach().clone(), None if bias is None else bias.detach().clone(), arguments)

    @property
    def steps(self) -> int:
        return self.x.steps + 1

    @property
    def holds(self) -> bool:
        return self.x.holds

    def features(self) -> Tensor:
        if self._computed is None:
            with torch.no_grad():
                self._computed = operators.conv3d(self.x.features(), self.weight, self.bias, *self.arguments)
        return self._computed


@dataclass(frozen=True, eq=False)
class NormRecipe:
    """leaky_relu((x - mean) * scale + shift + residual, slope), computed whenever it is asked for."""

    x: Recipe
    residual: Recipe | None
    mean: Tensor  # [N, C]
    scale: Tensor  # [N, C]
    shift: Tensor  # [N, C]
    slope: float
    geometry: BlockGeometry
    backend: str

    @property
    def steps(self) -> int:
        return self.x.steps + 1 + (0 if self.residual is None else self.residual.steps)

    @property
    def holds(self) -> bool:
        return self.x.holds and (self.residual is None or self.residual.holds)

    def features(self) -> Tensor:
        residual = None if self.residual is None else self.residual.features()
        g = self.geometry
        tables = (self.mean, self.scale, self.shift)
        block = (g.index, g.voxels, g.sample_offsets, g.sizes())
        with torch.no_grad():
            y: Tensor = operators.norm_apply(self.x.features(), *tables, residual, *block, self.slope, self.backend)
        return y


def compute_instead(result: Tensor, position: int, compute: Callable[[], Tensor]) -> bool:
    """Let the backward of an operator compute one of its saved tensors instead of keeping it.

    Args:
        result: what the operator returned.
        position: of the tensor among those that the operator saved.
        compute: gives the same tensor; autograd attaches its history.
    Returns: whether it will. Not if there is no backward, or if the tensor is in the hands of other hooks already:
        those of torch.utils.checkpoint or torch.autograd.graph.save_on_cpu.
    """
    if result.grad_fn is None:
        return False
    saved = result.grad_fn._raw_saved_tensors[position]  # type: ignore[attr-defined]
    try:
        saved.register_hooks(lambda _: compute, lambda packed: packed())
    except RuntimeError as error:
        if "already been set" not in str(error):
            raise
        return False
    return True
