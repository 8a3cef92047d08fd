"""Convolutions of small volumes in bfloat16 on CPUs, whose gradients would be wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_EXACT = "_computes_in_float32"


def ensure_sound_gradients(model: nn.Module) -> None:
    """From now on convolutions whose kernel is longer than a side of their input compute in float32 on CPUs.

    In bfloat16, oneDNN (as of torch 2.14, seen with AVX-512) does not write all of the gradient of such a weight: what
    it returns is whatever lay there, finite or not, and without a word. Volumes as small as that cost next to nothing.
    Other convolutions, inputs of other precision and gradients of the input are right, and what is sparse is computed
    by s3d_kernels.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            module.register_forward_pre_hook(_begin)
            module.register_forward_hook(_end, always_call=True)


def _begin(module: nn.Conv3d | nn.ConvTranspose3d, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x, *others = args
    if not isinstance(x, Tensor) or x.device.type != "cpu":
        return None
    if all(side >= kernel for side, kernel in zip(x.shape[2:], module.kernel_size, strict=True)):
        return None
    exact = torch.autocast("cpu", enabled=False)
    exact.__enter__()
    module.__dict__[_EXACT] = exact
    return (x.float(), *others)


def _end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    exact = module.__dict__.pop(_EXACT, None)
    if exact is not None:
        exact.__exit__(None, None, None)
