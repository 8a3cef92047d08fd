"""Who is measured: ways to compute a layer, an encoder or a training step under a mask.

`dense masked` is what public implementations do, with features stored densely throughout: convolution, then
multiplication by the mask; norms of the visible voxels, taken out and put back. `dense` is the plain network without
any mask, in both memory formats: the least that dense hardware can do. Every backend of s3d_kernels runs the converted
network on a BlockSparseTensor (`reference`, too, stores visible blocks only and is dense just inside an operator).
Other packages are in peers.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from cases import Case, Gather, Scatter
from peers import PEERS
from torch import Tensor, nn

from s3d.loss import masked_mse
from s3d.model import S3D
from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, explain, to_sparse, use_backend
from s3d_kernels.backends import BlocksProblem


@dataclass
class Run:
    """A contender that is ready.

    Attributes:
        forward: computes a tensor that has a gradient function.
        network: whose gradients backward makes.
        leaf: the input whose gradient it makes; None for whole networks.
        visible: takes what contenders must agree on out of the result of `forward`; None: they need not.
    """

    forward: Callable[[], Tensor]
    network: nn.Module
    leaf: Tensor | None
    visible: Callable[[Tensor], Tensor] | None

    def drop_gradients(self) -> None:
        self.network.zero_grad(set_to_none=True)
        if self.leaf is not None:
            self.leaf.grad = None


class Contender(Protocol):
    """A way to compute."""

    name: str

    def why_not(self, case: Case, device: str) -> str | None:
        """None if it can compute a case here, otherwise the reason in a short sentence."""
        ...

    def prepare(self, case: Case, network: nn.Module, x: Tensor, mask: BlockMask) -> Run:
        """Copies the network, so that no contender finds weights in the cache because of another."""
        ...


def _autocast(case: Case, device: torch.device) -> AbstractContextManager[object]:
    """Of whole networks; layers have the case's dtype themselves."""
    if case.layer or case.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, case.torch_dtype)


def _loss(features: Sequence[Tensor]) -> Tensor:
    """A number in which every feature has a part."""
    return torch.stack([f.float().sum() if f.dtype.itemsize < 4 else f.sum() for f in features]).sum()


# ---- dense


class Dense:
    """The network without any mask."""

    def __init__(self, name: str, memory_format: torch.memory_format) -> None:
        self.name = name
        self.memory_format = memory_format

    def why_not(self, case: Case, device: str) -> str | None:
        if case.layer.endswith(("gather", "scatter")):
            return "a dense tensor has no blocks"
        return None

    def prepare(self, case: Case, network: nn.Module, x: Tensor, mask: BlockMask) -> Run:
        copied = copy.deepcopy(network).to(memory_format=self.memory_format)
        x = x.clone(memory_format=self.memory_format)
        if case.layer:
            x.requires_grad_()
            return Run(lambda: copied(x), copied, x, None)

        def forward() -> Tensor:
            with _autocast(case, x.device):
                if case.question == "encoder":
                    return _loss(copied(x))
                return masked_mse(copied(x), x, mask)

        if case.question != "encoder":
            assert isinstance(copied, S3D)
            copied = copied.unet
        return Run(forward, copied, None, None)


class _MaskedLayer(nn.Module):
    """A dense layer, then multiplication by the mask of the output's resolution."""

    def __init__(self, layer: nn.Module, masks: dict[int, Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y * self.masks[y.shape[2]].to(y.dtype)


class _MaskedNorm(nn.Module):
    """A norm of the visible voxels of each sample, taken out and put back."""

    def __init__(self, layer: nn.Module, masks: dict[int, Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for sample, mask in zip(x, self.masks[x.shape[2]].bool().expand(x.shape[0], -1, -1, -1, -1), strict=True):
            visible = sample[:, mask[0]]  # [C, voxels]
            part = torch.zeros_like(sample)
            if visible.shape[1] > 1:
                part[:, mask[0]] = self.layer(visible[None, :, None, None])[0, :, 0, 0].to(part.dtype)
            parts.append(part)
        return torch.stack(parts)


def _mask_layers(module: nn.Module, masks: dict[int, Tensor]) -> nn.Module:
    """The module with masked layers, changed in place."""
    if isinstance(module, nn.Conv3d | nn.AvgPool3d):
        return _MaskedLayer(module, masks)
    if isinstance(module, nn.InstanceNorm3d | nn.GroupNorm):
        return _MaskedNorm(module, masks)
    for name, child in module.named_children():
        if name != "all_modules":
            setattr(module, name, _mask_layers(child, masks))
    # The blocks of dynamic-network-architectures keep their layers a second time, in a Sequential.
    if hasattr(module, "all_modules"):
        module.all_modules = nn.Sequential(
            *[getattr(module, n) for n in ("conv", "norm", "nonlin") if hasattr(module, n)]
        )
    return module


class DenseMasked:
    """Dense computation and multiplication by the mask, as the public code of S3D and SparK does it."""

    name = "dense masked"

    def why_not(self, case: Case, device: str) -> str | None:
        if case.layer.endswith(("gather", "scatter")):
            return "a dense tensor has no blocks"
        return None

    def prepare(self, case: Case, network: nn.Module, x: Tensor, mask: BlockMask) -> Run:
        copied = copy.deepcopy(network)
        masks: dict[int, Tensor] = {}
        level = mask
        while level.shape[0] not in masks:
            masks[level.shape[0]] = level.to_dense().to(x.dtype)
            level = level.downsample(2)
        target, x = x, torch.where(mask.to_dense(), x, 0)
        if case.layer:
            x.requires_grad_()
            layer = _mask_layers(copied, masks)

            def visible(y: Tensor) -> Tensor:
                return y.permute(0, 2, 3, 4, 1)[masks[y.shape[2]][:, 0].bool()]

            return Run(lambda: layer(x), layer, x, visible)
        if case.question == "encoder":
            encoder = _mask_layers(copied, masks)

            def forward() -> Tensor:
                with _autocast(case, x.device):
                    return _loss(encoder(x))

            return Run(forward, encoder, None, lambda loss: loss[None])
        assert isinstance(copied, S3D)
        assert copied.mask_tokens is not None
        assert copied.densify is not None
        encoder = _mask_layers(_as_dense(copied.unet.encoder), masks)
        norms = [_MaskedNorm(nn.InstanceNorm3d(token.numel()), masks) for token in copied.mask_tokens]

        def step() -> Tensor:
            with _autocast(case, x.device):
                skips = []
                for features, norm, token, densify in zip(
                    encoder(x), norms, copied.mask_tokens, copied.densify, strict=True
                ):
                    shown = masks[features.shape[2]].bool()
                    skips.append(
                        densify(torch.where(shown, norm(features), token.view(1, -1, 1, 1, 1).to(features.dtype)))
                    )
                return masked_mse(copied.unet.decoder(skips), target, mask)

        return Run(step, copied, None, lambda loss: loss[None])


def _as_dense(network: nn.Module) -> nn.Module:
    """A converted network with its torch layers: their sparse forms are subclasses of them."""
    for module in network.modules():
        if type(module).__module__.startswith("s3d_kernels"):
            module.__class__ = type(module).__mro__[1]
    return network


# ---- s3d_kernels


class Sparse:
    """The converted network on visible blocks, with one backend."""

    def __init__(self, backend: str) -> None:
        self.name = backend

    def why_not(self, case: Case, device: str) -> str | None:
        if self.name == "auto":
            return None
        reason = explain(BlocksProblem(device, case.torch_dtype, 1, (4, 4, 4), partial=False))[self.name]
        return reason if isinstance(reason, str) else None

    def prepare(self, case: Case, network: nn.Module, x: Tensor, mask: BlockMask) -> Run:
        copied = to_sparse(copy.deepcopy(network))
        if case.layer:
            return self._layer(copied, x, mask)

        def forward() -> Tensor:
            with use_backend(self.name), _autocast(case, x.device):
                if case.question == "encoder":
                    return _loss([y.blocks for y in copied(BlockSparseTensor.from_dense(x, mask))])
                return masked_mse(copied(x, mask), x, mask)

        return Run(forward, copied, None, lambda loss: loss[None])

    def _layer(self, layer: nn.Module, x: Tensor, mask: BlockMask) -> Run:
        if isinstance(layer, Gather):
            dense = x.clone(memory_format=torch.channels_last_3d).requires_grad_()

            def gather() -> Tensor:
                with use_backend(self.name):
                    return BlockSparseTensor.from_dense(dense, mask).blocks

            return Run(gather, layer, dense, _visible_rows(mask))
        blocks = BlockSparseTensor.from_dense(x, mask).blocks.requires_grad_()
        features = BlockSparseTensor(blocks, mask)
        if isinstance(layer, Scatter):

            def scatter() -> Tensor:
                with use_backend(self.name):
                    return features.to_dense(fill=layer.fill)

            return Run(scatter, layer, blocks, lambda y: y)

        masks: list[BlockMask] = []  # of the result

        def forward() -> Tensor:
            with use_backend(self.name):
                y: BlockSparseTensor = layer(features)
                masks[:] = [y.mask]
                return y.blocks

        return Run(forward, layer, blocks, lambda y: _visible_rows(masks[0])(y))


def _visible_rows(mask: BlockMask) -> Callable[[Tensor], Tensor]:
    """From blocks [V, bd, bh, bw, C] to visible voxels [P, C] in the order of a dense volume."""

    def rows(blocks: Tensor) -> Tensor:
        with torch.no_grad():
            dense = BlockSparseTensor(blocks.detach(), mask).to_dense(backend="reference")
            return dense.permute(0, 2, 3, 4, 1)[mask.to_dense()[:, 0]]

    return rows


# ---- other packages


class Peer:
    """Another package's submanifold convolution; its tables are made once, before."""

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, case: Case, device: str) -> str | None:
        only_convolution = None if case.layer.endswith("conv 3") else "only its 3x3x3 convolution is compared"
        return PEERS[self.name].why_not(device) or only_convolution

    def prepare(self, case: Case, network: nn.Module, x: Tensor, mask: BlockMask) -> Run:
        assert isinstance(network, nn.Conv3d)
        shown = mask.to_dense()[:, 0]
        coordinates = shown.nonzero().int()  # [P, 4]: sample, d, h, w
        features = x.permute(0, 2, 3, 4, 1)[shown].contiguous().requires_grad_()
        weight = nn.Parameter(network.weight.detach().clone())
        bias = nn.Parameter(weight.new_zeros(len(weight)) if network.bias is None else network.bias.detach().clone())
        convolve, packed = PEERS[self.name].prepare(coordinates, mask.shape, mask.batch, weight)
        return Run(lambda: convolve(features) + bias, nn.ParameterList([packed, bias]), features, lambda y: y)


_ALL: list[Contender] = [
    DenseMasked(),
    Dense("dense", torch.contiguous_format),
    Dense("dense, channels last", torch.channels_last_3d),
    *[Sparse(name) for name in REGISTRY],
    *[Peer(name) for name in PEERS],
]
CONTENDERS: dict[str, Contender] = {contender.name: contender for contender in _ALL}
AUTO: Contender = Sparse("auto")  # for questions in which there is nobody to compare with


def able(case: Case, device: str) -> tuple[str, ...]:
    """Those that can compute a case here; not `reference`, which shows what operators mean, not how fast they are."""
    return tuple(
        name
        for name, contender in CONTENDERS.items()
        if name != "reference" and contender.why_not(case, device) is None
    )
