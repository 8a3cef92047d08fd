"""Other software on the same layers: dense torch, and the spconv package where it is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from s3d_kernels import BlockMask

Forward = Callable[[], Tensor]


def dense_convolution(channels: int, mask: BlockMask, memory_format: torch.memory_format) -> Forward:
    """A 3x3x3 convolution of the whole volume, without any mask."""
    layer = torch.nn.Conv3d(channels, channels, 3, padding=1).to(memory_format=memory_format)
    x = torch.randn(mask.batch, channels, *mask.shape).contiguous(memory_format=memory_format).requires_grad_()
    return lambda: layer(x)


def spconv_convolution(channels: int, mask: BlockMask) -> Forward | None:
    """A submanifold 3x3x3 convolution of spconv; its pairs are made once, before. None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import spconv.pytorch as spconv
            from spconv.core import ConvAlgo
    except ImportError:
        return None
    coordinates = mask.to_dense()[:, 0].nonzero().int().contiguous()
    layer = spconv.SubMConv3d(channels, channels, 3, indice_key="pairs", algo=ConvAlgo.Native)
    features = torch.randn(len(coordinates), channels, requires_grad=True)
    x = spconv.SparseConvTensor(features, coordinates, list(mask.shape), mask.batch)
    prepared = layer(x)  # finds the pairs

    def forward() -> Tensor:
        y: Tensor = layer(prepared.replace_feature(features)).features
        return y

    return forward
