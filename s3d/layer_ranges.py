"""Names in a profile: a range around whatever a layer computes, for as long as someone records.

A module's range is open while its forward runs. That would be wrong for a normalisation, which waits for what follows
it (see ``s3d_kernels.fused_norm``) and is computed inside the next activation, addition or convolution: its name
travels with it, and its range is opened when its operators run. A norm that a convolution computes on the way is that
convolution's work, in the profile as on the machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from s3d_kernels import BlockSparseTensor
from s3d_kernels.fused_norm import DeferredNorm, PendingNorm

from .model import S3D

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
# Methods of the model, and the range that each is to have.
_PARTS: dict[str, Callable[..., str]] = {
    "_fill": lambda stage, *_: f"mask_tokens.{stage}",
    "_densify": lambda stage, *_: f"densify.{stage}",
    "_decode": lambda *_: "decoder",
}
_STAGE = re.compile(r"(?:^|\.)(?:stages|densify|mask_tokens)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Layer:
    """What a range with a layer's name stands for.

    Attributes:
        stage: of the encoder; None outside of it.
        kind: conv, norm, pool, tokens (mask tokens and densification), decoder, or other.
    """

    stage: int | None
    kind: str


@contextmanager
def layer_ranges(model: nn.Module) -> Iterator[dict[str, Layer]]:
    """Open a range around each call of each module, named by its path, and around the parts of an S3D model.

    The model computes what it computes without, by the same operators. Afterwards no hook is left.
    Returns: the names that can occur (without "unet.", as in the checkpoint) and what they stand for.
    """
    layers: dict[str, Layer] = {}
    handles: list[RemovableHandle] = []
    try:
        for path, module in model.named_modules():
            if not path:
                continue
            name = path.removeprefix("unet.")
            layers[name] = _layer(name, module)
            handles += _open_range(module, name)
        if isinstance(model, S3D) and model.mask_tokens is not None:
            for stage in range(len(model.mask_tokens)):
                layers[f"mask_tokens.{stage}"] = Layer(stage, "tokens")
        if isinstance(model, S3D):
            _name_parts(model)
        yield layers
    finally:
        for handle in handles:
            handle.remove()
        for part in _PARTS:
            model.__dict__.pop(part, None)


def _layer(name: str, module: nn.Module) -> Layer:
    parts = name.split(".")
    if "decoder" in parts:
        return Layer(None, "decoder")
    match = _STAGE.search(name)
    stage = 0 if "stem" in parts else int(match.group(1)) if match else None
    if parts[0] == "densify":
        return Layer(stage, "tokens")
    if isinstance(module, _ConvNd):
        return Layer(stage, "conv")
    if isinstance(module, _NORMS):
        return Layer(stage, "norm")
    return Layer(stage, "pool" if isinstance(module, (_AvgPoolNd, _MaxPoolNd)) else "other")


def _open_range(module: nn.Module, name: str) -> list[RemovableHandle]:
    opened: list[Any] = []  # of calls in progress, one within another where a module calls itself

    def before(module: nn.Module, arguments: Any) -> None:
        recorded = record_function(name)
        recorded.__enter__()
        opened.append(recorded)

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        opened.pop().__exit__(None, None, None)
        if isinstance(module, _NORMS) and isinstance(output, BlockSparseTensor) and output._pending is not None:
            output._pending = _NamedNorm.of(output._pending, name)

    # Also after an exception, or every range after it would lie within this one.
    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


def _name_parts(model: S3D) -> None:
    """Also of what the model computes with parameters of its modules, but without calling them."""
    for part, name in _PARTS.items():
        model.__dict__[part] = _named(getattr(model, part), name)


def _named(method: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with record_function(name(*arguments)):
            return method(*arguments)

    return call


@dataclass(eq=False)
class _NamedNorm(PendingNorm):
    """A normalisation that waits, and the name of its layer."""

    name: str = ""

    @classmethod
    def of(cls, norm: PendingNorm, name: str) -> _NamedNorm:
        return cls(**{field.name: getattr(norm, field.name) for field in fields(norm)}, name=name)

    def compute(self, slope: float) -> tuple[Tensor, Any]:
        with record_function(self.name):
            return super().compute(slope)

    def defer(self, slope: float) -> DeferredNorm:
        with record_function(self.name):
            norm = super().defer(slope)
        return _NamedDeferred(norm.place, norm.raw, norm.version, norm.recipe, self.name)


@dataclass(frozen=True, eq=False)
class _NamedDeferred(DeferredNorm):
    name: str = ""

    def compute(self) -> tuple[Tensor, Any]:
        with record_function(self.name):
            return super().compute()
