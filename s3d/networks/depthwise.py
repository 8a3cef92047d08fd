"""Depthwise convolutions whose gradients can be relied upon."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def with_sound_gradients(network: Network) -> Network:
    """Let the depthwise convolutions of a network see volumes that are shorter than their kernels in plain memory.

    In bfloat16 on CPUs, oneDNN (as of torch 2.14) leaves the gradient of such a weight unwritten where the input is in
    channels-last memory: what it returns is whatever lay there, finite or not. Hooks, as the layers of other libraries
    stay what they are.

    Returns: the same network.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)) and module.groups > 1:
            module.register_forward_pre_hook(_in_plain_memory)
    return network


def _in_plain_memory(module: nn.Conv3d | nn.ConvTranspose3d, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x, *others = args
    if not isinstance(x, Tensor) or x.device.type != "cpu":  # kernels of s3d_kernels compute what is sparse
        return None
    short = any(side < kernel for side, kernel in zip(x.shape[2:], module.kernel_size, strict=True))
    return (x.contiguous(), *others) if short else None
