"""to_sparse: give the layers of a network their sparse forms."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .modules import (
    SparseAvgPool3d,
    SparseBatchNorm3d,
    SparseConv3d,
    SparseConvTranspose3d,
    SparseGroupNorm,
    SparseInstanceNorm3d,
    SparseMaxPool3d,
)

SPARSE_FORM: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv3d: SparseConv3d,
    nn.ConvTranspose3d: SparseConvTranspose3d,
    nn.InstanceNorm3d: SparseInstanceNorm3d,
    nn.BatchNorm3d: SparseBatchNorm3d,
    nn.GroupNorm: SparseGroupNorm,
    nn.AvgPool3d: SparseAvgPool3d,
    nn.MaxPool3d: SparseMaxPool3d,
}

# Layers of torch that treat every voxel alike, so that they work on a BlockSparseTensor as they are.
ELEMENTWISE: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
        nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink,
        nn.Threshold, nn.LogSigmoid, nn.Tanh, nn.Sigmoid, nn.Dropout, nn.Dropout3d, nn.AlphaDropout,
    }
)  # fmt: skip

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

Network = TypeVar("Network", bound=nn.Module)


def to_sparse(network: Network) -> Network:
    """Convert a network in place, so that it computes sparsely on a BlockSparseTensor.

    Modules stay the same objects and only change their class: parameters, tied modules, hooks, buffers, dtype, device,
    training mode and the state dict stay as they are. On a dense tensor the network gives what it gave before.
    Nothing is changed if anything is refused.

    Args:
        network: convolutions, norms and pooling of ``torch.nn`` in any arrangement, with elementwise layers between.
            Layers of other libraries are left as they are; the tensor refuses functions that would mix voxels.
    Returns: the same network.
    Raises:
        ValueError: lists every layer that has no sparse form, and why.
    """
    modules = dict(network.named_modules())
    reasons = {name: reason for name, module in modules.items() if (reason := _why_not(module)) is not None}
    if reasons:
        lines = "".join(f"\n  {name or '(the network itself)'}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"network has layers without a sparse form:{lines}")
    for module in modules.values():
        if type(module) in SPARSE_FORM:
            module.__class__ = SPARSE_FORM[type(module)]
    return network


def _why_not(module: nn.Module) -> str | None:
    kind = type(module)
    if kind in SPARSE_FORM:
        reason: str | None = SPARSE_FORM[kind].why_not(module)  # type: ignore[attr-defined]
        return None if reason is None else f"{kind.__name__}: {reason}"
    if kind in SPARSE_FORM.values() or kind in ELEMENTWISE or kind in _CONTAINERS:
        return None
    if isinstance(module, nn.SyncBatchNorm):
        return (
            "SyncBatchNorm would not synchronise on dense tensors any more; use BatchNorm3d, whose sparse form "
            "synchronises on sparse ones"
        )
    for base, sparse in SPARSE_FORM.items():
        if isinstance(module, base):
            name = base.__name__
            return f"{kind.__name__} is a subclass of {name}; only {name} itself becomes {sparse.__name__}"
    if kind.__module__.startswith("torch.nn."):
        return f"{kind.__name__} has no sparse form"
    return None
