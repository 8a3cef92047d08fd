"""What operators hand to a backend: the problem (is it supported?), the geometry (which voxels?), the raw kernels.

A backend computes; it knows nothing of autograd, modules or tensors with masks. All features are block-compact,
[V, bd, bh, bw, C], channels last. Rows belong to blocks as `index` says; `voxels`, where present, marks the visible
voxels inside the blocks. Whatever lies at a masked voxel of an input (NaN included) must not reach a result, and
results are zero at masked voxels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Triple = tuple[int, int, int]
PoolKind = Literal["avg", "max"]


# Problems are named tuples because every call of an operator makes one and looks it up.
class ConvProblem(NamedTuple):
    """A convolution as far as the choice of a backend depends on it."""

    device: str
    dtype: torch.dtype
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: Triple
    stride: Triple
    padding: Triple
    block: Triple  # of the output
    partial: bool  # whether blocks are partly visible
    operator: str = "conv3d"


class NormProblem(NamedTuple):
    """Normalisation statistics, their application or its backward."""

    device: str
    dtype: torch.dtype
    channels: int
    block: Triple
    partial: bool
    operator: str = "norm"


class PoolProblem(NamedTuple):
    """Average or maximum pooling."""

    device: str
    dtype: torch.dtype
    channels: int
    kind: PoolKind
    kernel_size: Triple
    stride: Triple
    padding: Triple
    block: Triple  # of the output
    partial: bool
    operator: str = "pool3d"


class BlocksProblem(NamedTuple):
    """Gathering blocks from a dense volume, or scattering them to one."""

    device: str
    dtype: torch.dtype
    channels: int
    block: Triple
    partial: bool
    operator: str = "blocks"


class UpconvProblem(NamedTuple):
    """An up-convolution of dense volumes."""

    device: str
    dtype: torch.dtype
    in_channels: int
    out_channels: int
    operator: str = "upconv3d"


Problem = ConvProblem | NormProblem | PoolProblem | BlocksProblem | UpconvProblem


@dataclass(frozen=True)
class BlockGeometry:
    """Where the rows of a block-compact tensor lie in the volumes of the batch."""

    index: Tensor  # [V, 4] int32 (n, gd, gh, gw), sorted by n
    voxels: Tensor | None  # [V, bd, bh, bw] bool, None if every voxel of every block is visible
    sample_offsets: Tensor  # [N + 1] int32
    batch: int
    shape: Triple  # voxels of a volume
    block: Triple

    def sizes(self) -> list[int]:
        """All numbers as one list, the form in which they pass through an operator; see :meth:`from_operator`."""
        return [self.batch, *self.shape, *self.block]

    @classmethod
    def from_operator(
        cls, index: Tensor, voxels: Tensor | None, sample_offsets: Tensor, sizes: list[int]
    ) -> BlockGeometry:
        """The geometry from the tensors and numbers that an operator was called with."""
        shape, block = tuple(sizes[1:4]), tuple(sizes[4:7])
        return cls(index, voxels, sample_offsets, sizes[0], shape, block)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WindowGeometry:
    """Windows of a convolution or pooling: output voxel o reads the input voxels o * stride - padding + tap.

    The output block set may differ from the input block set; both lie on the same grid of blocks, and
    input block = output block * stride.
    """

    source_index: Tensor  # [Vi, 4] int32: input blocks
    source_voxels: Tensor | None  # [Vi, *source_block] bool
    target_index: Tensor  # [Vo, 4] int32: output blocks
    target_voxels: Tensor | None  # [Vo, *target_block] bool
    table: Tensor  # [Vo, T] int32: rows of the input blocks around each output block, -1 where masked or outside
    radius: Triple  # T = prod(2 * radius + 1)
    batch: int
    shape: Triple  # voxels of an input volume
    target_block: Triple
    kernel_size: Triple
    stride: Triple
    padding: Triple

    def sizes(self) -> list[int]:
        """All numbers as one list, the form in which they pass through an operator; see :meth:`from_operator`."""
        g = self
        return [g.batch, *g.radius, *g.shape, *g.target_block, *g.kernel_size, *g.stride, *g.padding]

    @classmethod
    def from_operator(
        cls,
        source_index: Tensor,
        source_voxels: Tensor | None,
        target_index: Tensor,
        target_voxels: Tensor | None,
        table: Tensor,
        sizes: list[int],
    ) -> WindowGeometry:
        """The geometry from the tensors and numbers that an operator was called with."""
        radius, shape, target_block, kernel_size, stride, padding = (
            (sizes[i], sizes[i + 1], sizes[i + 2]) for i in range(1, len(sizes), 3)
        )
        return cls(
            source_index=source_index,
            source_voxels=source_voxels,
            target_index=target_index,
            target_voxels=target_voxels,
            table=table,
            radius=radius,
            batch=sizes[0],
            shape=shape,
            target_block=target_block,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
        )

    @property
    def source_block(self) -> Triple:
        return tuple(b * s for b, s in zip(self.target_block, self.stride, strict=True))  # type: ignore[return-value]

    @property
    def target_shape(self) -> Triple:
        return tuple(-(-e // s) for e, s in zip(self.shape, self.stride, strict=True))  # type: ignore[return-value]

    @property
    def same_rows(self) -> bool:
        """Whether input and output have the same blocks in the same rows."""
        source, target = self.source_index, self.target_index
        return source.shape == target.shape and source.data_ptr() == target.data_ptr()

    def reverse_table(self) -> Tensor:
        """[Vi, T] int32: rows of the output blocks around each input block, -1 where there are none."""
        if self.same_rows:
            return self.table  # a is left of b as b is right of a
        rows = len(self.source_index)
        reverse = self.table.new_full((rows + 1, self.table.shape[1]), -1)  # the last row takes pairs that do not exist
        outputs = torch.arange(len(self.table), device=self.table.device, dtype=self.table.dtype)[:, None]
        inputs = torch.where(self.table >= 0, self.table, rows).long().flip(1)
        return reverse.scatter_(0, inputs, outputs.expand_as(self.table).flip(1))[:rows]


class Backend(Protocol):
    """The raw kernels. `why_not` never raises and never logs; the other methods assume that it returned None."""

    name: str

    def why_not(self, problem: Problem) -> str | None:
        """None if this backend can compute the problem here, otherwise the reason in a short sentence."""
        ...

    def conv3d(
        self,
        x: Tensor,  # [Vi, *source_block, C_in]
        weight: Tensor,  # [C_out, C_in / groups, kd, kh, kw]
        bias: Tensor | None,  # [C_out]
        geometry: WindowGeometry,
        groups: int,
    ) -> Tensor:  # [Vo, *target_block, C_out]
        ...

    def conv3d_grad_input(
        self,
        grad: Tensor,  # [Vo, *target_block, C_out]
        weight: Tensor,  # [C_out, C_in / groups, kd, kh, kw]
        geometry: WindowGeometry,
        groups: int,
    ) -> Tensor:  # [Vi, *source_block, C_in]
        ...

    def conv3d_grad_weight(
        self,
        grad: Tensor,  # [Vo, *target_block, C_out]
        x: Tensor,  # [Vi, *source_block, C_in]
        geometry: WindowGeometry,
        groups: int,
    ) -> tuple[Tensor, Tensor]:  # [C_out, C_in / groups, kd, kh, kw], [C_out] (of the bias)
        ...

    def upconv3d(
        self,
        x: Tensor,  # [N, d, h, w, C_low]
        weight: Tensor,  # [2, 2, 2, C, C_low, 2, 2, 2]: phase p, channels, tap t
        bias: Tensor | None,  # [C]
    ) -> Tensor:  # [N, 2d, 2h, 2w, C]
        """y[n, 2 q + p] = bias + sum over t of weight[p, :, :, t] @ x[n, q + t - 1 + p], zeros outside the volume.

        Volumes are dense and contiguous, here and in the gradients below.
        """
        ...

    def upconv3d_grad_input(
        self,
        grad: Tensor,  # [N, 2d, 2h, 2w, C]
        weight: Tensor,  # [2, 2, 2, C, C_low, 2, 2, 2]
    ) -> Tensor:  # [N, d, h, w, C_low]
        ...

    def upconv3d_grad_weight(
        self,
        grad: Tensor,  # [N, 2d, 2h, 2w, C]
        x: Tensor,  # [N, d, h, w, C_low]
    ) -> tuple[Tensor, Tensor]:  # [2, 2, 2, C, C_low, 2, 2, 2], [C] (of the bias)
        ...

    def pool3d(self, x: Tensor, geometry: WindowGeometry, kind: PoolKind, divisor: int) -> Tensor:
        """[Vi, *source_block, C] -> [Vo, *target_block, C]: window sum / divisor, or window maximum.

        The maximum sees zeros at masked voxels and, as in torch, nothing outside the volume. A divisor of 0 stands
        for the number of window voxels inside the volume.
        """
        ...

    def pool3d_grad(
        self, grad: Tensor, x: Tensor | None, geometry: WindowGeometry, kind: PoolKind, divisor: int
    ) -> Tensor:
        """[Vo, *target_block, C], [Vi, *source_block, C] (for "max" only) -> [Vi, *source_block, C]."""
        ...

    def norm_statistics(self, x: Tensor, geometry: BlockGeometry) -> tuple[Tensor, Tensor]:
        """[V, *block, C] -> mean [N, C] and sum of squared deviations from it [N, C], over the visible voxels.

        float32 (float64 for float64), by a method that is safe for a mean far from zero; 0 where a sample has none.
        """
        ...

    def norm_apply(
        self,
        x: Tensor,  # [V, *block, C]
        mean: Tensor,  # [N, C] float32 / float64
        scale: Tensor,  # [N, C]
        shift: Tensor,  # [N, C]
        residual: Tensor | None,  # [V, *block, C]
        slope: float,
        geometry: BlockGeometry,
    ) -> Tensor:
        """leaky_relu((x - mean) * scale + shift + residual, slope) with the row's sample.

        Computed in the dtype of mean, returned in the dtype of x. slope >= 0; 1 is no activation.
        """
        ...

    def norm_grad_sums(
        self,
        grad: Tensor,  # [V, *block, C]
        x: Tensor,  # [V, *block, C]
        mean: Tensor,  # [N, C]
        rstd: Tensor,  # [N, C]
        geometry: BlockGeometry,
    ) -> tuple[Tensor, Tensor]:
        """Sums over the visible voxels of each sample: of grad [N, C], and of grad * (x - mean) * rstd [N, C]."""
        ...

    def norm_grad_activation(
        self,
        grad: Tensor,  # [V, *block, C]
        x: Tensor,  # [V, *block, C]
        y: Tensor | None,  # [V, *block, C]
        mean: Tensor,  # [N, C]
        rstd: Tensor,  # [N, C]
        scale: Tensor,  # [N, C]
        shift: Tensor,  # [N, C]
        slope: float,
        geometry: BlockGeometry,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient before the activation [V, *block, C], and its sums as of norm_grad_sums.

        It is grad where y > 0, slope * grad elsewhere; without y, (x - mean) * scale + shift stands for it.
        """
        ...

    def norm_grad_input(
        self,
        grad: Tensor,  # [V, *block, C]
        x: Tensor,  # [V, *block, C]
        mean: Tensor,  # [N, C]
        rstd: Tensor,  # [N, C]
        scale: Tensor,  # [N, C]
        offset: Tensor,  # [N, C]
        slope: Tensor,  # [N, C]
        geometry: BlockGeometry,
    ) -> Tensor:
        """scale * grad - offset - slope * (x - mean) * rstd with the row's sample, in the dtype of x."""
        ...

    def gather_blocks(self, dense: Tensor, geometry: BlockGeometry) -> Tensor:
        """[N, C, D, H, W], any memory format -> [V, *block, C]."""
        ...

    def scatter_blocks(self, blocks: Tensor, fill: Tensor, geometry: BlockGeometry) -> Tensor:
        """[V, *block, C], fill [C] for masked voxels -> [N, C, D, H, W] in channels-last memory."""
        ...


@runtime_checkable
class FusingBackend(Backend, Protocol):
    """A backend with convolutions that do the work of the norms around them, sample by sample."""

    def fuses(self, problem: ConvProblem) -> bool:
        """Whether `conv3d_fused` can compute a convolution that `why_not` does not refuse."""
        ...

    def conv3d_fused(
        self,
        x: Tensor,  # [V, *block, C_in]
        weight: Tensor,  # [C_out, C_in / groups, kd, kh, kw]
        bias: Tensor | None,  # [C_out]
        affine: tuple[Tensor, Tensor, Tensor] | None,  # mean, scale, shift: [N, C_in] float32 each
        slope: float,
        geometry: WindowGeometry,
        sample_offsets: Tensor,  # [N + 1] int32: rows of each sample, the same of input and output
        groups: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolution of leaky_relu((x - mean) * scale + shift, slope), or of x as it is, and its statistics.

        Returns: y [V, *block, C_out], and its mean and squares as of norm_statistics, of y before it was rounded.
        """
        ...
