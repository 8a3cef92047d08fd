"""S3D: a U-Net masked autoencoder whose encoder computes only visible voxels.

Source: Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation" (CVPR 2025), section 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s3d_kernels import (
    Background,
    BlockMask,
    BlockSparseTensor,
    FilledTensor,
    SparseConv3d,
    computes_natively,
    sparse_instance_norm,
    to_sparse,
)

from .decoder import decode, dense_features, whole_blocks, whole_mask
from .networks.convnext import convnext
from .networks.encoder_decoder import NNUNET_LAYERS, EncoderDecoder

# What grows beyond visible voxels grows by whole cells of this side. On CPUs small ones cost no more a voxel than large
# ones; on GPUs they do, and there the stages of small blocks are too small to be worth it (docs/performance.md).
TILE_ON_CPU, TILE_ELSEWHERE = 2, 8


Architecture = Literal["resenc", "convnext", "mednext", "swin-unetr"]


@dataclass(frozen=True)
class Preset:
    """Size of a network.

    Attributes:
        features: channels of each stage, from full resolution down.
        blocks: residual blocks of each encoder stage.
        strides: stride of each stage; their product is the smallest mask block.
        kernel_size: of all convolutions.
        architecture: of which these are sizes.
    """

    features: tuple[int, ...]
    blocks: tuple[int, ...]
    strides: tuple[int, ...]
    kernel_size: int = 3
    architecture: Architecture = "resenc"

    @property
    def total_stride(self) -> int:
        """Voxels of the input that one voxel of the lowest resolution stands for, along each axis."""
        return math.prod(self.strides)


# All have the halves that `EncoderDecoder` describes.
Network: TypeAlias = "ResidualEncoderUNet | EncoderDecoder"

PRESETS: dict[str, Preset] = {
    # The published network: 102,348,965 parameters before densification.
    "resenc-l": Preset((32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6), (1, 2, 2, 2, 2, 2)),
    # The same shape for one small GPU or a patient CPU.
    "resenc-s": Preset((16, 32, 64, 128, 160, 160), (1, 2, 2, 3, 3, 3), (1, 2, 2, 2, 2, 2)),
    # Minutes on a laptop CPU.
    "small": Preset((8, 16, 32, 64), (1, 2, 2, 2), (1, 2, 2, 2)),
    # Tests.
    "tiny": Preset((4, 8, 12), (1, 1, 1), (1, 2, 2)),
    # The published size B with kernels of 5^3: 11.0 million parameters.
    "mednext-b": Preset((32, 64, 128, 256, 512), (2, 2, 2, 2, 2), (1, 2, 2, 2, 2), 5, "mednext"),
    "mednext-small": Preset((8, 16, 32, 64), (1, 2, 2, 2), (1, 2, 2, 2), 5, "mednext"),
    # The published size T, with two finer stages in place of its stem of stride 4.
    "convnext-t": Preset((24, 48, 96, 192, 384, 768), (1, 1, 3, 3, 9, 3), (1, 2, 2, 2, 2, 2), 7, "convnext"),
    "convnext-small": Preset((8, 16, 32, 64), (1, 1, 2, 1), (1, 2, 2, 2), 7, "convnext"),
    # The published network.
    "swin-unetr": Preset(
        (48, 48, 96, 192, 384, 768), (0, 2, 2, 2, 2, 0), (1, 2, 2, 2, 2, 2), architecture="swin-unetr"
    ),
    # Half as deep, for CPUs.
    "swin-unetr-small": Preset((16, 16, 32, 64), (0, 2, 2, 0), (1, 2, 2, 2), architecture="swin-unetr"),
}


# Those that nnU-Net and nnssl know.
RESENC_PRESETS = tuple(name for name, size in PRESETS.items() if size.architecture == "resenc")


@dataclass(frozen=True)
class NetworkShape:
    """Shape of a network whose axes may differ.

    Attributes:
        features: channels of each stage, from full resolution down.
        blocks: residual blocks of each encoder stage.
        strides: of each stage, (depth, height, width).
        kernel_sizes: of all convolutions of each stage, (depth, height, width).
        architecture: see `s3d.networks`.
    """

    features: tuple[int, ...]
    blocks: tuple[int, ...]
    strides: tuple[tuple[int, int, int], ...]
    kernel_sizes: tuple[tuple[int, int, int], ...]
    architecture: Architecture = "resenc"


def preset_shape(preset: str) -> NetworkShape:
    """The shape of a preset.

    Raises:
        ValueError: no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    size = PRESETS[preset]
    return NetworkShape(
        features=size.features,
        blocks=size.blocks,
        strides=tuple((stride, stride, stride) for stride in size.strides),
        kernel_sizes=((size.kernel_size,) * 3,) * len(size.features),
        architecture=size.architecture,
    )


def build_unet(preset: str, in_channels: int = 1, out_channels: int = 1) -> Network:
    """The network of a preset, see :func:`build_network`.

    Raises:
        ValueError: no such preset.
    """
    return build_network(preset_shape(preset), in_channels, out_channels)


def build_network(
    shape: NetworkShape, in_channels: int, out_channels: int, *, deep_supervision: bool = False
) -> Network:
    """A network of an architecture and shape, with the two halves that `EncoderDecoder` describes.

    A ResEnc U-Net is initialised as nnU-Net does (He normal, last norm of a residual branch zero).

    Args:
        shape: of the network.
        in_channels: of its input.
        out_channels: of its output.
        deep_supervision: whether it returns the outputs of all decoder stages, the finest first.
    """
    if shape.architecture == "mednext":
        from .networks.mednext import mednext  # MONAI takes seconds to import

        # Each of its stages halves the resolution, and its kernels are cubes: those of its presets.
        kernel_size = shape.kernel_sizes[0][0]
        sizes = (shape.features, shape.blocks, kernel_size)
        return mednext(in_channels, out_channels, *sizes, deep_supervision=deep_supervision)
    if shape.architecture == "convnext":
        parts = (shape.features, shape.blocks, shape.strides, shape.kernel_sizes)
        return convnext(in_channels, out_channels, *parts, deep_supervision=deep_supervision)
    if shape.architecture == "swin-unetr":
        from .networks.swin_unetr import build_swin_unetr

        return build_swin_unetr(
            in_channels,
            out_channels,
            features=shape.features,
            blocks=shape.blocks,
            strides=shape.strides,
            deep_supervision=deep_supervision,
        )
    unet = ResidualEncoderUNet(
        input_channels=in_channels,
        n_stages=len(shape.features),
        features_per_stage=list(shape.features),
        conv_op=nn.Conv3d,
        kernel_sizes=[list(kernel) for kernel in shape.kernel_sizes],
        strides=[list(stride) for stride in shape.strides],
        n_blocks_per_stage=list(shape.blocks),
        num_classes=out_channels,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        deep_supervision=deep_supervision,
        **NNUNET_LAYERS,
    )
    unet.apply(ResidualEncoderUNet.initialize)
    return unet


class S3D(nn.Module):
    """Masked autoencoder: sparse encoder, mask tokens, densification, dense decoder.

    The switches give the rows of the published ablation: all False is a dense MAE (masked voxels are zeros and the
    encoder is dense); then ``sparse`` alone (masked positions of the encoder's features are zeros); with
    ``mask_tokens``; with ``densify``, the method itself.

    Args:
        unet: see :func:`build_unet`; becomes part of this module, converted in place.
        sparse: sparse convolution and normalisation in the encoder.
        mask_tokens: per stage, instance norm (no affine) of the visible features and a learned vector elsewhere.
        densify: a 3x3x3 convolution with bias on the filled features of every stage but the first.
        shortcuts: leave out of densification and decoder what is known beforehand. The result is the same up to
            rounding. It needs ``sparse``, without which it has no meaning, and is not for compiled graphs. Decoders
            other than a ``UNetDecoder`` compute all.
    Raises:
        ValueError: a switch without the one it builds on.
    """

    def __init__(
        self,
        unet: Network,
        *,
        sparse: bool = True,
        mask_tokens: bool = True,
        densify: bool = True,
        shortcuts: bool = True,
    ) -> None:
        super().__init__()
        if (mask_tokens and not sparse) or (densify and not mask_tokens):
            raise ValueError(
                "mask_tokens needs sparse, and densify needs mask_tokens, got "
                f"sparse={sparse}, mask_tokens={mask_tokens}, densify={densify}"
            )
        self.unet = unet
        self.sparse = sparse
        self.shortcuts = shortcuts
        self.checkpointed = False
        features: Sequence[int] = unet.encoder.output_channels
        if sparse:
            to_sparse(unet if isinstance(unet.decoder, UNetDecoder) else unet.encoder)
        self.mask_tokens: nn.ParameterList | None = None
        if mask_tokens:
            self.mask_tokens = nn.ParameterList(nn.Parameter(mask_token(channels)) for channels in features)
        self.densify: nn.ModuleList | None = None
        if densify:
            convolutions = [nn.Conv3d(channels, channels, 3, padding=1) for channels in features[1:]]
            for convolution in convolutions:
                ResidualEncoderUNet.initialize(convolution)
            self.densify = to_sparse(nn.ModuleList([nn.Identity(), *convolutions]))

    def forward(
        self,
        x: Tensor,  # [N, C, D, H, W], z-scored
        mask: BlockMask,  # of the same batch and volume
        *,
        masked_only: bool = False,
    ) -> Tensor:
        """Reconstruct the volume from its visible voxels; nothing of a masked voxel is read.

        Args:
            masked_only: the reconstruction is wanted at masked voxels; at others it may be zero.
        Returns: [N, C, D, H, W].
        """
        visible = BlockSparseTensor.from_dense(x, mask)
        if not self.sparse:
            reconstruction: Tensor = self.unet(visible.to_dense())
            return reconstruction
        features = self.unet.encoder(visible)
        kernels = _kernels_are_faster(x)
        skips = [self._fill(stage, skip) for stage, skip in enumerate(features)]
        skips = [self._densify(stage, skip, kernels) for stage, skip in enumerate(skips)]
        return self._decode(skips, kernels, mask if masked_only and mask.voxels is None else None)

    def checkpoint_activations(self) -> None:
        """From now on keep only what goes into each stage of encoder and decoder; backward computes the rest again."""
        self.checkpointed = True
        for stage in (*self.unet.encoder.stages, *self.unet.decoder.stages):
            stage.forward = functools.partial(checkpoint, stage.forward, use_reentrant=False)

    def _fill(self, stage: int, skip: BlockSparseTensor) -> FilledTensor | Tensor:
        """Features of a stage at all voxels, from the visible ones.

        As a background and a correction where this saves work: not for blocks that are hardly larger than their shell.
        """
        token = None if self.mask_tokens is None else self.mask_tokens[stage]
        tile = TILE_ON_CPU if skip.device.type == "cpu" else TILE_ELSEWHERE
        known = self.shortcuts and skip.mask.voxels is None and min(skip.mask.block) >= 2 * tile
        if known and not torch.compiler.is_compiling():
            vector = skip.blocks.new_zeros(skip.shape[1]) if token is None else token
            correction = skip if token is None else sparse_instance_norm(skip, bias=-token)
            return FilledTensor(correction.split(tile), Background.constant(vector, skip.mask.shape))
        return skip.to_dense() if token is None else sparse_instance_norm(skip).to_dense(fill=token)

    def _densify(self, stage: int, skip: FilledTensor | Tensor, kernels: bool) -> FilledTensor | Tensor:
        """Filled features of a stage after its convolution; `kernels`: of dense ones by our kernels, not torch's."""
        layer = nn.Identity() if self.densify is None else self.densify[stage]
        if not isinstance(layer, SparseConv3d):
            return skip
        if isinstance(skip, FilledTensor):
            return skip.conv3d(layer.weight, layer.bias)
        y: Tensor = dense_features(layer(whole_blocks(skip, whole_mask(skip)))) if kernels else layer(skip)
        return y

    def _decode(self, skips: list[FilledTensor | Tensor], kernels: bool, unwanted: BlockMask | None) -> Tensor:
        """The reconstruction [N, C, D, H, W]; where it is `unwanted` (default: nowhere) it may be zero."""
        if not isinstance(self.unet.decoder, UNetDecoder):  # of which `decode` knows what to leave out
            skips = [skip.to_dense() if isinstance(skip, FilledTensor) else skip for skip in skips]
            kernels = False
        if not kernels and not any(isinstance(skip, FilledTensor) for skip in skips):
            reconstruction: Tensor = self.unet.decoder(skips)
            return reconstruction
        # Not before: a new mask would break a compiled graph, which never comes here.
        wanted = None if unwanted is None else unwanted.complement()
        return decode(self.unet.decoder, skips, kernels=kernels, wanted=wanted, checkpointed=self.checkpointed)


def _kernels_are_faster(x: Tensor) -> bool:
    """Whether our kernels compute a dense convolution faster than torch: the native ones on a CPU do."""
    return x.device.type == "cpu" and computes_natively(x) and not torch.compiler.is_compiling()


def mask_token(channels: int) -> Tensor:
    """[C], what fills masked positions before it has learned anything: truncated normal, std 0.02, clipped at 0.02."""
    return nn.init.trunc_normal_(torch.empty(channels), std=0.02, a=-0.02, b=0.02)
