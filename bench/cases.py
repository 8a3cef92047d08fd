"""What is measured: cases, each one network or layer under one mask, and the layers of the networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s3d.model import PRESETS, S3D, build_unet
from s3d_kernels import BlockMask, BlockSparseTensor, to_sparse
from s3d_kernels.flops import ALL, FlopCount

MASK_KINDS = ("blocks", "voxels")


@dataclass(frozen=True)
class Case:
    """One thing to measure; contenders take turns on it.

    Attributes:
        question: "layer", "encoder", "step" or "curve".
        layer: name of the layer, see :func:`layers_of`; empty for whole networks.
        preset: of the network.
        patch_size: voxels of the patch along each axis, at full resolution.
        batch_size: patches.
        block: side of a masked block in voxels at full resolution.
        mask_kind: "blocks", or "voxels": each voxel is masked by itself.
        mask_ratio: share that is masked.
        dtype: name of torch's: of the layer, or of a network's autocast.
        threads: of the CPU; 0: as many as torch takes.
    """

    question: str
    layer: str
    preset: str
    patch_size: int
    batch_size: int
    block: int
    mask_kind: str
    mask_ratio: float
    dtype: str
    threads: int = 0

    @property
    def id(self) -> str:
        """A name that tells cases apart, without characters that pytest's -k would trip over."""
        words = [self.layer.replace(" ", "_")] if self.layer else []
        words += [self.preset, f"{self.patch_size}", f"batch{self.batch_size}", f"{self.mask_kind}{self.block}"]
        words += [f"{100 * self.mask_ratio:g}masked", self.dtype]
        return "-".join(words + ([f"{self.threads}threads"] if self.threads else []))

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def mask(self, device: str) -> BlockMask:
        """The mask at full resolution, the same everywhere and at each call.

        Raises:
            ValueError: the patch is no multiple of the block.
        """
        if self.patch_size % self.block:
            raise ValueError(f"patch_size must be a multiple of block={self.block}, got {self.patch_size}")
        generator = torch.Generator().manual_seed(0)
        if self.mask_kind == "voxels":
            visible = torch.rand(self.batch_size, *(self.patch_size,) * 3, generator=generator) >= self.mask_ratio
            return BlockMask.from_voxels(visible.to(device), self.block)
        grid = self.patch_size // self.block
        return BlockMask.random(self.batch_size, grid, self.block, self.mask_ratio, generator, device=device)

    def layer_mask(self, device: str) -> BlockMask:
        """The mask at the resolution of the layer's input."""
        mask = self.mask(device)
        for _ in range(layers_of(self.preset)[self.layer].stage):
            mask = mask.downsample(2)
        return mask

    def network(self) -> nn.Module:
        """The layer, encoder or autoencoder, with weights that do not depend on the contender."""
        torch.manual_seed(0)
        if self.question == "layer":
            return layers_of(self.preset)[self.layer].make().to(self.torch_dtype)
        if self.question == "encoder":
            encoder: nn.Module = build_unet(self.preset).encoder
            return encoder
        return S3D(build_unet(self.preset))

    def input(self, mask: BlockMask) -> Tensor:
        """[N, C, D, H, W] of the mask's size."""
        channels = layers_of(self.preset)[self.layer].channels if self.layer else 1
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(mask.batch, channels, *mask.shape, generator=generator)
        return x.to(mask.device, self.torch_dtype if self.layer else torch.float32)

    def smaller(self) -> Case:
        """A case of the same kind on the smallest volume, to initialise libraries with."""
        return dataclasses.replace(self, patch_size=2 * self.block, batch_size=1, mask_ratio=0.0)


# ---- layers


class Gather(nn.Module):
    """The visible blocks of a dense tensor."""


class Scatter(nn.Module):
    """The dense tensor of visible blocks, with a vector at masked voxels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fill = nn.Parameter(torch.randn(channels))


class MedNeXtBlock(nn.Module):
    """A block as in MedNeXt (Roy et al., MICCAI 2023): depthwise convolution, norm, expansion, GELU, compression."""

    def __init__(self, channels: int, expansion: int = 4, kernel_size: int = 3) -> None:
        super().__init__()
        self.depthwise = nn.Conv3d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.GroupNorm(channels, channels)
        self.expand = nn.Conv3d(channels, expansion * channels, 1)
        self.activation = nn.GELU()
        self.compress = nn.Conv3d(expansion * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> the same shape; a BlockSparseTensor works too, once converted."""
        y: Tensor = x + self.compress(self.activation(self.expand(self.norm(self.depthwise(x)))))
        return y


@dataclass(frozen=True)
class Layer:
    """A layer of an encoder.

    Attributes:
        stage: of its input, 0 is full resolution.
        channels: of its input.
        make: constructs it.
    """

    stage: int
    channels: int
    make: Callable[[], nn.Module]


def layers_of(preset: str) -> dict[str, Layer]:
    """Every distinct convolution, norm and pooling of an encoder by name, its gathers, and a depthwise block."""
    features = PRESETS[preset].features
    layers = {"stem conv 3": Layer(0, 1, lambda: nn.Conv3d(1, features[0], 3, padding=1))}
    for stage, channels in enumerate(features):
        name = f"stage {stage}"
        layers[f"{name} conv 3"] = Layer(stage, channels, lambda c=channels: nn.Conv3d(c, c, 3, padding=1))  # type: ignore[misc]
        layers[f"{name} norm"] = Layer(stage, channels, lambda c=channels: nn.InstanceNorm3d(c, affine=True))  # type: ignore[misc]
        layers[f"{name} scatter"] = Layer(stage, channels, lambda c=channels: Scatter(c))  # type: ignore[misc]
        if stage == 0:
            layers[f"{name} gather"] = Layer(0, channels, Gather)
            layers[f"{name} MedNeXt block"] = Layer(0, channels, lambda c=channels: MedNeXtBlock(c))  # type: ignore[misc]
            continue
        before = features[stage - 1]
        layers[f"{name} conv 3 stride 2"] = Layer(
            stage - 1,
            before,
            lambda b=before, c=channels: nn.Conv3d(b, c, 3, 2, 1),  # type: ignore[misc]
        )
        layers[f"{name} pool"] = Layer(stage - 1, before, lambda: nn.AvgPool3d(2))
        if before != channels:
            layers[f"{name} conv 1"] = Layer(stage, before, lambda b=before, c=channels: nn.Conv3d(b, c, 1))  # type: ignore[misc]
    return layers


def work_of(layer: nn.Module, x: BlockSparseTensor, voxels_out: int, channels_out: int) -> tuple[float, float]:
    """What a layer has to do in forward, whoever does it, counted from the mask.

    Args:
        layer: its convolutions, if it has more than one, keep the resolution.
        x: its input.
        voxels_out, channels_out: of what it writes.
    Returns: multiplications and additions of visible pairs; bytes of visible inputs and of outputs, each moved once.
        Weights are not counted.
    """
    read, written = int(x.mask.visible_voxels().sum()) * x.shape[1], voxels_out * channels_out
    convolutions = [module for module in layer.modules() if isinstance(module, nn.Conv3d)]
    flop = sum(_flop(c, x.mask) for c in convolutions)
    return flop, float((read + written) * x.dtype.itemsize)


def _flop(layer: nn.Conv3d, mask: BlockMask) -> float:
    """Of a convolution under a mask, forward."""
    sparse = to_sparse(nn.Sequential(layer))
    x = torch.empty(mask.num_blocks, *mask.block, layer.in_channels, dtype=layer.weight.dtype, device=mask.device)
    with torch.no_grad(), FlopCount() as count:
        sparse(BlockSparseTensor(x, mask))
    return count.flops[ALL]


def voxels_of(case: Case) -> tuple[int, int]:
    """Visible voxels and all voxels of a case at full resolution."""
    return int(case.mask("cpu").visible_voxels().sum()), case.batch_size * math.prod((case.patch_size,) * 3)
