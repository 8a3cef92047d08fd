"""Sparse layers: subclasses of the torch layers, with the same constructor, parameters and state dict.

Each has three call forms:

- ``module(BlockSparseTensor) -> BlockSparseTensor``: sparse.
- ``module(tensor, mask) -> tensor``: sparse, dense in and out, zeros at masked voxels.
- ``module(tensor) -> tensor``: what the torch layer gives.

The attribute ``backend`` names a backend for this one layer; None means the current one (see ``use_backend``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .block_mask import BlockMask, Triple, triple
from .block_sparse import BlockSparseTensor


def _call(
    sparse: Callable[[BlockSparseTensor], BlockSparseTensor],
    dense: Callable[..., Tensor],
    x: Tensor | BlockSparseTensor,
    mask: BlockMask | None,
) -> Any:
    """The three call forms."""
    if isinstance(x, BlockSparseTensor):
        if mask is not None:
            raise TypeError("mask must not be given with a BlockSparseTensor, which carries its own")
        return sparse(x)
    if mask is None:
        return dense(x)
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}; see BlockMask.from_voxels")
    return sparse(BlockSparseTensor.from_dense(x, mask)).to_dense()


def _refuse(module: nn.Module, reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"{type(module).__name__}: {reason}")


def _conv_why_not(module: nn.Conv3d | nn.ConvTranspose3d) -> str | None:
    if tuple(module.dilation) != (1, 1, 1):
        return f"dilation must be 1, got {module.dilation}"
    if module.padding_mode != "zeros":
        return f"padding_mode must be 'zeros', got {module.padding_mode!r}"
    return None


class SparseConv3d(nn.Conv3d):
    """nn.Conv3d over visible voxels: masked voxels count as zeros, output exists at visible voxels only.

    Any kernel size and stride with dilation 1, zero padding, and an output size of input size / stride (for odd
    kernels: padding (kernel_size - 1) / 2); groups and bias as in torch.

    Raises:
        ValueError: at construction, what is not supported, by name.
    """

    backend: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse(self, self.why_not(self))

    @staticmethod
    def why_not(module: nn.Conv3d) -> str | None:
        """The reason why a dense layer has no sparse form, or None."""
        reason = _conv_why_not(module)
        if reason is None:
            try:
                window: Triple = module.kernel_size  # type: ignore[assignment]
                functional.conv_padding(window, triple(module.stride, "stride"), module.padding)
            except ValueError as error:
                return str(error)
        return reason

    def forward(self, x: Any, mask: BlockMask | None = None) -> Any:
        return _call(self._sparse, super().forward, x, mask)

    def _sparse(self, x: BlockSparseTensor) -> BlockSparseTensor:
        return functional.sparse_conv3d(x, self.weight, self.bias, self.stride, self.padding, self.groups, self.backend)


class SparseConvTranspose3d(nn.ConvTranspose3d):
    """nn.ConvTranspose3d with stride = kernel size over visible voxels: each becomes a visible cuboid of voxels.

    With a mask, the call form for dense tensors takes the mask of the input and returns the upsampled volume.

    Raises:
        ValueError: at construction, what is not supported, by name.
    """

    backend: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse(self, self.why_not(self))

    @staticmethod
    def why_not(module: nn.ConvTranspose3d) -> str | None:
        """The reason why a dense layer has no sparse form, or None."""
        if tuple(module.stride) != tuple(module.kernel_size):
            return f"stride must equal kernel_size, got {module.stride} and {module.kernel_size}"
        if any(module.padding) or any(module.output_padding):
            return f"padding and output_padding must be 0, got {module.padding} and {module.output_padding}"
        return _conv_why_not(module)

    def forward(  # type: ignore[override]  # the mask comes second, as in all modules here
        self, x: Any, mask: BlockMask | None = None, output_size: list[int] | None = None
    ) -> Any:
        if output_size is not None and (mask is not None or isinstance(x, BlockSparseTensor)):
            raise ValueError(f"output_size is not supported for sparse input, got {output_size}")
        dense = super().forward
        return _call(self._sparse, lambda t: dense(t, output_size), x, mask)

    def _sparse(self, x: BlockSparseTensor) -> BlockSparseTensor:
        return functional.sparse_conv_transpose3d(x, self.weight, self.bias, self.groups, self.backend)


class SparseInstanceNorm3d(nn.InstanceNorm3d):
    """nn.InstanceNorm3d with statistics over the visible voxels of each sample and channel.

    Raises:
        ValueError: at construction, for ``track_running_stats=True``.
    """

    backend: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse(self, self.why_not(self))

    @staticmethod
    def why_not(module: nn.InstanceNorm3d) -> str | None:
        """The reason why a dense layer has no sparse form, or None."""
        return "track_running_stats must be False" if module.track_running_stats else None

    def forward(self, x: Any, mask: BlockMask | None = None) -> Any:
        return _call(self._sparse, super().forward, x, mask)

    def _sparse(self, x: BlockSparseTensor) -> BlockSparseTensor:
        _check_channels(x, self.num_features)
        return functional.sparse_instance_norm(x, self.weight, self.bias, self.eps, self.backend)


class SparseBatchNorm3d(nn.BatchNorm3d):
    """nn.BatchNorm3d with statistics over the visible voxels of the batch.

    In training the statistics are taken over all ranks when torch.distributed is initialised. Without a visible voxel
    the running statistics stay as they are.
    """

    backend: str | None = None

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """The reason why a dense layer has no sparse form: there is none."""
        return None

    def forward(self, x: Any, mask: BlockMask | None = None) -> Any:
        return _call(self._sparse, super().forward, x, mask)

    def _sparse(self, x: BlockSparseTensor) -> BlockSparseTensor:
        _check_channels(x, self.num_features)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        training = self.training or self.running_mean is None
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        tracked = not self.training or self.track_running_stats
        return functional.sparse_batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            training,
            momentum,
            self.eps,
            synchronise=self.training and ranks > 1,
            backend=self.backend,
        )


class SparseGroupNorm(nn.GroupNorm):
    """nn.GroupNorm with statistics over the visible voxels of each sample and group of channels."""

    backend: str | None = None

    @staticmethod
    def why_not(module: nn.GroupNorm) -> str | None:
        """The reason why a dense layer has no sparse form: there is none."""
        return None

    def forward(self, x: Any, mask: BlockMask | None = None) -> Any:
        return _call(self._sparse, super().forward, x, mask)

    def _sparse(self, x: BlockSparseTensor) -> BlockSparseTensor:
        _check_channels(x, self.num_channels)
        return functional.sparse_group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.backend)


def _pool_why_not(module: nn.AvgPool3d | nn.MaxPool3d) -> str | None:
    if module.ceil_mode:
        return "ceil_mode must be False"
    window = triple(module.kernel_size, "kernel_size")
    try:
        functional.conv_padding(window, triple(module.stride, "stride"), module.padding)
    except ValueError as error:
        return str(error)
    return None


class SparseAvgPool3d(nn.AvgPool3d):
    """nn.AvgPool3d over visible voxels; masked voxels count as zeros.

    Raises:
        ValueError: at construction, what is not supported, by name.
    """

    backend: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse(self, self.why_not(self))

    @staticmethod
    def why_not(module: nn.AvgPool3d) -> str | None:
        """The reason why a dense layer has no sparse form, or None."""
        return _pool_why_not(module)

    def forward(self, x: Any, mask: BlockMask | None = None) -> Any:
        return _call(self._sparse, super().forward, x, mask)

    def _sparse(self, x: BlockSparseTensor) -> BlockSparseTensor:
        return functional.sparse_pool3d(
            x,
            "avg",
            self.kernel_size,
            self.stride,
            self.padding,
            self.divisor_override,
            self.count_include_pad,
            self.backend,
        )


class SparseMaxPool3d(nn.MaxPool3d):
    """nn.MaxPool3d over visible voxels; masked voxels count as zeros, outside the volume there is nothing.

    Raises:
        ValueError: at construction, what is not supported, by name.
    """

    backend: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse(self, self.why_not(self))

    @staticmethod
    def why_not(module: nn.MaxPool3d) -> str | None:
        """The reason why a dense layer has no sparse form, or None."""
        if module.return_indices:
            return "return_indices must be False"
        if triple(module.dilation, "dilation") != (1, 1, 1):
            return f"dilation must be 1, got {module.dilation}"
        return _pool_why_not(module)

    def forward(self, x: Any, mask: BlockMask | None = None) -> Any:
        return _call(self._sparse, super().forward, x, mask)

    def _sparse(self, x: BlockSparseTensor) -> BlockSparseTensor:
        return functional.sparse_pool3d(x, "max", self.kernel_size, self.stride, self.padding, backend=self.backend)


def _check_channels(x: BlockSparseTensor, channels: int) -> None:
    if x.blocks.shape[-1] != channels:
        raise ValueError(f"x must have {channels} channels, got {x.blocks.shape[-1]}")
