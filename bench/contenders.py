"""Who is measured: ways to compute a layer, an encoder or a training step under a mask.

`dense masked` is what public implementations do, with features stored densely throughout: convolution, then
multiplication by the mask; norms of the visible voxels, taken out and put back. `dense` is the plain network without
any mask, in both memory formats: the least that dense hardware can do. Every backend of s3d_kernels runs the converted
network on a BlockSparseTensor (`reference`, too, stores visible blocks only and is dense just inside an operator).
Other packages are in peers.py.
"""

from __future__ import annotations

import copy
import functools
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
        visible: takes the visible voxels out of the result of `forward`, in the order of a dense volume; None for a
            result that says little.
        visible_leaf: the same for the gradient of `leaf`.
        masked: whether it computes what `reference` does; False: no mask at all.
    """

    forward: Callable[[], Tensor]
    network: nn.Module
    leaf: Tensor | None = None
    visible: Callable[[Tensor], Tensor] | None = None
    visible_leaf: Callable[[Tensor], Tensor] | None = None
    masked: bool = True

    def drop_gradients(self) -> None:
        self.network.zero_grad(set_to_none=True)
        if self.leaf is not None:
            self.leaf.grad = None

    def found(self, result: Tensor) -> dict[str, Tensor]:
        """What contenders must agree on after backward, in float64 by name."""
        if not self.masked:
            return {}
        found = {}
        if self.visible is not None:
            found["the result"] = self.visible(result).double()
        gradients = [p.grad.double().norm() for p in self.network.parameters() if p.grad is not None]
        if gradients:
            found["the norm of the weights' gradients"] = torch.stack(gradients).norm()
        if self.leaf is not None and self.leaf.grad is not None and self.visible_leaf is not None:
            found["the gradient of the input"] = self.visible_leaf(self.leaf.grad).double()
        return found


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


def _renewal(mask: BlockMask) -> Callable[[], BlockMask]:
    """Makes the mask anew, with all of its tables: part of every step, for training draws a mask in each."""
    if mask.voxels is None:
        return lambda: BlockMask.from_grid(mask.tables.grid, mask.block)
    visible = mask.to_dense()[:, 0]
    return lambda: BlockMask.from_voxels(visible, mask.block)


# ---- dense


def _no_blocks(case: Case) -> str | None:
    return "a dense tensor has no blocks" if case.layer.endswith(("gather", "scatter")) else None


class Dense:
    """The network without any mask."""

    def __init__(self, name: str, memory_format: torch.memory_format) -> None:
        self.name = name
        self.memory_format = memory_format

    def why_not(self, case: Case, device: str) -> str | None:
        return _no_blocks(case)

    def prepare(self, case: Case, network: nn.Module, x: Tensor, mask: BlockMask) -> Run:
        copied = copy.deepcopy(network).to(memory_format=self.memory_format)
        x = x.clone(memory_format=self.memory_format)
        if case.layer:
            x.requires_grad_()
            return Run(lambda: copied(x), copied, x, masked=False)
        if case.question == "encoder":

            def encode() -> Tensor:
                with _autocast(case, x.device):
                    return _loss(copied(x))

            return Run(encode, copied, masked=False)
        assert isinstance(copied, S3D)
        unet, renew = copied.unet, _renewal(mask)

        def step() -> Tensor:
            with _autocast(case, x.device):
                return masked_mse(unet(x), x, renew())

        return Run(step, unet, masked=False)


class _Level:
    """The mask of one resolution, as dense layers want it."""

    def __init__(self, mask: BlockMask, dtype: torch.dtype) -> None:
        self.shown = mask.to_dense()  # [N, 1, D, H, W] bool
        self.factor = self.shown.to(dtype)

    @functools.cached_property
    def places(self) -> tuple[Tensor, ...]:
        """Indices of the visible voxels in [N, D, H, W], sample by sample."""
        return self.shown[:, 0].nonzero(as_tuple=True)

    @functools.cached_property
    def counts(self) -> list[int]:
        """Visible voxels of each sample."""
        counts: list[int] = self.shown.flatten(1).sum(1).tolist()
        return counts


_Levels = dict[int, _Level]  # by the depth of the volume


def _fill_levels(levels: _Levels, mask: BlockMask, dtype: torch.dtype) -> None:
    levels.clear()
    while mask.shape[0] not in levels:
        levels[mask.shape[0]] = _Level(mask, dtype)
        mask = mask.downsample(2)


class _MaskedLayer(nn.Module):
    """A dense layer, then multiplication by the mask of the output's resolution."""

    def __init__(self, layer: nn.Module, levels: _Levels) -> None:
        super().__init__()
        self.layer = layer
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y * self.levels[y.shape[2]].factor.to(y.dtype)


class _MaskedNorm(nn.Module):
    """A norm of the visible voxels of each sample, taken out and put back; all samples at once if they have as many."""

    def __init__(self, layer: nn.Module, levels: _Levels) -> None:
        super().__init__()
        self.layer = layer
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        level = self.levels[x.shape[2]]
        volume = x.permute(0, 2, 3, 4, 1)
        rows = volume[level.places]  # [P, C]
        if len(set(level.counts)) == 1:
            normalised = self._of_samples(rows.view(len(x), -1, x.shape[1]))
        else:
            normalised = torch.cat([self._of_samples(part[None]) for part in rows.split(level.counts)])
        y = torch.zeros_like(volume)
        y[level.places] = normalised.to(y.dtype)
        return y.permute(0, 4, 1, 2, 3)

    def _of_samples(self, rows: Tensor) -> Tensor:
        """[N, voxels, C] -> [N * voxels, C]; zeros for single voxels, whose statistics torch refuses."""
        if rows.shape[1] < 2:
            return torch.zeros_like(rows).flatten(0, 1)
        y: Tensor = self.layer(rows.transpose(1, 2)[..., None, None])
        return y[..., 0, 0].transpose(1, 2).flatten(0, 1)


def _mask_layers(module: nn.Module, levels: _Levels) -> nn.Module:
    """The module with masked layers, changed in place."""
    if isinstance(module, nn.Conv3d | nn.AvgPool3d):
        return _MaskedLayer(module, levels)
    if isinstance(module, nn.InstanceNorm3d | nn.GroupNorm):
        return _MaskedNorm(module, levels)
    for name, child in module.named_children():
        if name != "all_modules":
            setattr(module, name, _mask_layers(child, levels))
    # The blocks of dynamic-network-architectures keep their layers a second time, in a Sequential.
    if hasattr(module, "all_modules"):
        names = [name for name in ("conv", "norm", "nonlin") if hasattr(module, name)]
        module.all_modules = nn.Sequential(*[getattr(module, name) for name in names])
    return module


class DenseMasked:
    """Dense computation and multiplication by the mask, as the public code of S3D and SparK does it."""

    name = "dense masked"

    def why_not(self, case: Case, device: str) -> str | None:
        return _no_blocks(case)

    def prepare(self, case: Case, network: nn.Module, x: Tensor, mask: BlockMask) -> Run:
        copied = copy.deepcopy(network)
        levels: _Levels = {}
        if case.layer:
            _fill_levels(levels, mask, x.dtype)
            x = torch.where(mask.to_dense(), x, 0).requires_grad_()
            layer = _mask_layers(copied, levels)

            def visible(y: Tensor) -> Tensor:
                return y.permute(0, 2, 3, 4, 1)[levels[y.shape[2]].places]

            return Run(lambda: layer(x), layer, x, visible, visible)
        renew = _renewal(mask)

        def masked_input() -> Tensor:
            _fill_levels(levels, renew(), x.dtype)
            return x * levels[x.shape[2]].factor

        if case.question == "encoder":
            encoder = _mask_layers(copied, levels)

            def encode() -> Tensor:
                with _autocast(case, x.device):
                    return _loss(encoder(masked_input()))

            return Run(encode, encoder)
        assert isinstance(copied, S3D)
        assert copied.mask_tokens is not None
        assert copied.densify is not None
        encoder = _mask_layers(_as_dense(copied.unet.encoder), levels)
        norms = [_MaskedNorm(nn.InstanceNorm3d(token.numel()), levels) for token in copied.mask_tokens]

        def step() -> Tensor:
            with _autocast(case, x.device):
                skips = []
                for features, norm, token, densify in zip(
                    encoder(masked_input()), norms, copied.mask_tokens, copied.densify, strict=True
                ):
                    shown, fill = levels[features.shape[2]].shown, token.view(1, -1, 1, 1, 1).to(features.dtype)
                    skips.append(densify(torch.where(shown, norm(features), fill)))
                masked = ~levels[x.shape[2]].shown
                error = torch.where(masked, copied.unet.decoder(skips).float() - x, 0.0)
                return error.square().sum() / masked.sum()

        return Run(step, copied, visible=lambda loss: loss[None])


def _as_dense(network: nn.Module) -> nn.Module:
    """A converted network with its torch layers: their sparse forms are subclasses of them."""
    for module in network.modules():
        if type(module).__module__.startswith("s3d_kernels"):
            module.__class__ = type(module).__mro__[1]
    return network


# ---- s3d_kernels


class Sparse:
    """The converted network on visible blocks, with one backend; the rest of a step with shortcuts or without."""

    def __init__(self, backend: str, *, shortcuts: bool = True) -> None:
        self.name = backend if shortcuts else f"{backend} plain decoder"
        self.backend = backend
        self.shortcuts = shortcuts

    def why_not(self, case: Case, device: str) -> str | None:
        if not self.shortcuts and case.question != "step":
            return "only a whole step has a decoder"
        if self.backend == "auto":
            return None
        reason = explain(BlocksProblem(device, case.torch_dtype, 1, (4, 4, 4), partial=False))[self.backend]
        return reason if isinstance(reason, str) else None

    def prepare(self, case: Case, network: nn.Module, x: Tensor, mask: BlockMask) -> Run:
        copied = copy.deepcopy(network)
        if not isinstance(copied, S3D):  # which has converted what it computes sparsely
            to_sparse(copied)
        if case.layer:
            return self._layer(copied, x, mask)
        renew = _renewal(mask)

        def encode() -> Tensor:
            with use_backend(self.backend), _autocast(case, x.device):
                return _loss([y.blocks for y in copied(BlockSparseTensor.from_dense(x, renew()))])

        def step() -> Tensor:
            with use_backend(self.backend), _autocast(case, x.device):
                new = renew()
                return masked_mse(copied(x, new, masked_only=True), x, new)

        if case.question == "encoder":
            return Run(encode, copied)
        assert isinstance(copied, S3D)
        copied.shortcuts = self.shortcuts
        return Run(step, copied, visible=lambda loss: loss[None])

    def _layer(self, layer: nn.Module, x: Tensor, mask: BlockMask) -> Run:
        if isinstance(layer, Gather):
            dense = x.clone(memory_format=torch.channels_last_3d).requires_grad_()

            def gather() -> Tensor:
                with use_backend(self.backend):
                    return BlockSparseTensor.from_dense(dense, mask).blocks

            return Run(gather, layer, dense, _visible_rows(mask), lambda y: _rows_of_dense(y, mask))
        blocks = BlockSparseTensor.from_dense(x, mask).blocks.requires_grad_()
        features = BlockSparseTensor(blocks, mask)
        if isinstance(layer, Scatter):

            def scatter() -> Tensor:
                with use_backend(self.backend):
                    return features.to_dense(fill=layer.fill)

            return Run(scatter, layer, blocks, _as_it_is, _visible_rows(mask))

        masks: list[BlockMask] = []  # of the result

        def forward() -> Tensor:
            with use_backend(self.backend):
                y: BlockSparseTensor = layer(features)
                masks[:] = [y.mask]
                return y.blocks

        return Run(forward, layer, blocks, lambda y: _visible_rows(masks[0])(y), _visible_rows(mask))


def _visible_rows(mask: BlockMask) -> Callable[[Tensor], Tensor]:
    """From blocks [V, bd, bh, bw, C] to visible voxels [P, C] in the order of a dense volume."""

    def rows(blocks: Tensor) -> Tensor:
        with torch.no_grad():
            return _rows_of_dense(BlockSparseTensor(blocks.detach(), mask).to_dense(backend="reference"), mask)

    return rows


def _rows_of_dense(dense: Tensor, mask: BlockMask) -> Tensor:
    """Visible voxels [P, C] of a dense tensor [N, C, D, H, W]."""
    return dense.permute(0, 2, 3, 4, 1)[mask.to_dense()[:, 0]]


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
        coordinates = mask.to_dense()[:, 0].nonzero().int()  # [P, 4]: sample, d, h, w
        features = _rows_of_dense(x, mask).contiguous().requires_grad_()
        weight = nn.Parameter(network.weight.detach().clone())
        bias = nn.Parameter(weight.new_zeros(len(weight)) if network.bias is None else network.bias.detach().clone())
        convolve, packed = PEERS[self.name].prepare(coordinates, mask.shape, mask.batch, weight)
        return Run(lambda: convolve(features) + bias, nn.ParameterList([packed, bias]), features, _as_it_is, _as_it_is)


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


_ALL: list[Contender] = [
    DenseMasked(),
    Dense("dense", torch.contiguous_format),
    Dense("dense channels-last", torch.channels_last_3d),
    *[Sparse(name) for name in REGISTRY],
    Sparse("native", shortcuts=False),
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
