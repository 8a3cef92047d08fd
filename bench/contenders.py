"""Who is measured: ways to run the encoder of a ResEnc U-Net on a masked volume.

`dense masked` is what public implementations do, with features stored densely throughout; every backend of
s3d_kernels runs the converted encoder on a BlockSparseTensor (`reference`, too, stores visible blocks only and is dense
just inside an operator); `dense` is the plain encoder without any mask, the least that dense hardware can do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, explain, to_sparse, use_backend
from s3d_kernels.backends import BlocksProblem

Step = Callable[[], None]


def _loss(features: Sequence[Tensor]) -> Tensor:
    return torch.stack([f.sum() for f in features]).sum()


class _MaskedConv(nn.Module):
    """Dense convolution, then multiplication by the mask of the output's resolution."""

    def __init__(self, layer: nn.Module, masks: dict[int, Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y * self.masks[y.shape[2]]


class _MaskedNorm(nn.Module):
    """Instance norm of the visible voxels, taken out and put back."""

    def __init__(self, layer: nn.InstanceNorm3d, masks: dict[int, Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for sample, mask in zip(x, self.masks[x.shape[2]].bool().expand(x.shape[0], -1, -1, -1, -1), strict=True):
            visible = sample[:, mask[0]]  # [C, voxels]
            part = torch.zeros_like(sample)
            if visible.shape[1] > 1:
                part[:, mask[0]] = self.layer(visible[None, :, None, None])[0, :, 0, 0]
            parts.append(part)
        return torch.stack(parts)


def _replace(module: nn.Module, masks: dict[int, Tensor]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv3d | nn.AvgPool3d):
            setattr(module, name, _MaskedConv(child, masks))
        elif isinstance(child, nn.InstanceNorm3d):
            setattr(module, name, _MaskedNorm(child, masks))
        elif name != "all_modules":
            _replace(child, masks)
    # The blocks of dynamic-network-architectures keep their layers a second time, in a Sequential.
    if hasattr(module, "all_modules"):
        order = [getattr(module, n) for n in ("conv", "norm", "nonlin") if hasattr(module, n)]
        module.all_modules = nn.Sequential(*order)


def _dense_masked(encoder: nn.Module, x: Tensor, mask: BlockMask) -> tuple[nn.Module, Callable[[], Tensor]]:
    encoder = copy.deepcopy(encoder)
    masks, level = {}, mask
    while level.shape[0] >= 1 and level.shape[0] not in masks:
        masks[level.shape[0]] = level.to_dense().to(x.dtype)
        level = level.downsample(2)
    _replace(encoder, masks)
    visible = torch.where(mask.to_dense(), x, 0.0)
    return encoder, lambda: _loss(encoder(visible))


def _dense(encoder: nn.Module, x: Tensor, mask: BlockMask) -> tuple[nn.Module, Callable[[], Tensor]]:
    encoder = copy.deepcopy(encoder)
    return encoder, lambda: _loss(encoder(x))


def _sparse(backend: str) -> Callable[[nn.Module, Tensor, BlockMask], tuple[nn.Module, Callable[[], Tensor]]]:
    def prepare(encoder: nn.Module, x: Tensor, mask: BlockMask) -> tuple[nn.Module, Callable[[], Tensor]]:
        encoder = to_sparse(copy.deepcopy(encoder))

        def forward() -> Tensor:
            with use_backend(backend):
                return _loss([y.blocks for y in encoder(BlockSparseTensor.from_dense(x, mask))])

        return encoder, forward

    return prepare


# name -> (encoder, x [N, 1, D, H, W], mask) -> the network that runs, and its forward pass with a scalar at the end
CONTENDERS: dict[str, Callable[[nn.Module, Tensor, BlockMask], tuple[nn.Module, Callable[[], Tensor]]]] = {
    "dense masked": _dense_masked,
    "dense": _dense,
    **{name: _sparse(name) for name in REGISTRY},
}


def able(device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Those that can compute here."""
    reasons = explain(BlocksProblem(device, dtype, 1, (4, 4, 4), partial=False))
    return tuple(name for name in CONTENDERS if not isinstance(reasons.get(name), str))
