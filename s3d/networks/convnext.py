"""ConvNeXt V2 in 3D as the encoder of a U-Net.

Source: Woo et al., "ConvNeXt V2: co-designing and scaling ConvNets with masked autoencoders" (CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn

from s3d_kernels import BlockMask, BlockSparseTensor

from .encoder_decoder import NNUNET_LAYERS, EncoderDecoder

Features = TypeVar("Features", Tensor, BlockSparseTensor)
Triple = tuple[int, int, int]

# Channels inside a block / channels of its stage.
EXPANSION = 4
# Of the stem, which keeps full resolution where the published one cuts patches of 4 x 4, and of the decoder.
KERNEL_SIZE = 3
# Of the norms and of the divisor of the response.
EPS = 1e-6


def convnext(
    in_channels: int,
    out_channels: int,
    features: Sequence[int],
    blocks: Sequence[int],
    strides: Sequence[Triple],
    kernel_sizes: Sequence[Triple],
    *,
    deep_supervision: bool = False,
) -> EncoderDecoder:
    """A U-Net with an encoder of ConvNeXt V2 blocks and the decoder of nnU-Net's.

    Args:
        in_channels: of its input.
        out_channels: of its output.
        features: channels of each stage, from full resolution down.
        blocks: of each encoder stage.
        strides: of each stage, (depth, height, width); the first is (1, 1, 1).
        kernel_sizes: of the depthwise convolutions of each stage, (depth, height, width), odd.
        deep_supervision: whether it returns the outputs of all decoder stages, the finest first.
    """
    encoder = ConvNeXtEncoder(in_channels, features, blocks, strides, kernel_sizes)
    decoder = UNetDecoder(
        encoder,
        num_classes=out_channels,
        n_conv_per_stage=1,
        deep_supervision=deep_supervision,
        **NNUNET_LAYERS,
    )
    for part in (decoder.stages, decoder.transpconvs, decoder.seg_layers):
        part.apply(ResidualEncoderUNet.initialize)
    return EncoderDecoder(encoder, decoder)


class ConvNeXtEncoder(nn.Module):
    """The features of each stage. Converted with ``to_sparse`` it takes and gives BlockSparseTensors.

    Args: see :func:`convnext`.
    """

    def __init__(
        self,
        in_channels: int,
        features: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[Triple],
        kernel_sizes: Sequence[Triple],
    ) -> None:
        super().__init__()
        self.output_channels = list(features)
        # What a UNetDecoder asks of its encoder.
        self.strides = [list(stride) for stride in strides]
        self.kernel_sizes: list[Triple] = [tuple(min(k, KERNEL_SIZE) for k in kernel) for kernel in kernel_sizes]  # type: ignore[misc]
        self.conv_op, self.conv_bias = nn.Conv3d, True
        self.dropout_op = self.dropout_op_kwargs = None
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, features[0], self.kernel_sizes[0], padding="same"), ChannelLayerNorm(features[0])
        )
        stages = []
        for stage, (channels, number) in enumerate(zip(features, blocks, strict=True)):
            layers: list[nn.Module] = [ConvNeXtBlock(channels, kernel_sizes[stage]) for _ in range(number)]
            if stage > 0:
                before, stride = features[stage - 1], strides[stage]
                down = nn.Sequential(ChannelLayerNorm(before), nn.Conv3d(before, channels, stride, stride))
                layers.insert(0, down)
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.apply(initialize)

    def forward(self, x: Tensor) -> list[Tensor]:  # [N, C, D, H, W]
        """[N, features, D', H', W'] of each stage."""
        x = self.stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


def initialize(module: nn.Module) -> None:
    """Weights of convolutions as published: truncated normal with std 0.02, biases zero."""
    if isinstance(module, nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, expansion, GELU, response normalisation, compression; beside it nothing.

    Args:
        channels: of input and output.
        kernel_size: of the depthwise convolution, odd.
    """

    def __init__(self, channels: int, kernel_size: Triple) -> None:
        super().__init__()
        self.depthwise = nn.Conv3d(channels, channels, kernel_size, padding="same", groups=channels)
        self.norm = ChannelLayerNorm(channels)
        self.expand = nn.Conv3d(channels, EXPANSION * channels, 1)
        self.activation = nn.GELU()
        self.response = GlobalResponseNorm(EXPANSION * channels)
        self.compress = nn.Conv3d(EXPANSION * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, D, H, W]
        """The same shape."""
        y: Tensor = self.response(self.activation(self.expand(self.norm(self.depthwise(x)))))
        return x + self.compress(y)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each voxel, of dense tensors [N, C, D, H, W] and BlockSparseTensors.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, x: Features) -> Features:
        """The same shape, under the same mask."""
        if not isinstance(x, BlockSparseTensor):
            return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        # The gradients of weight and bias are sums over all stored voxels.
        y = _where_visible(super().forward(_where_visible(x.blocks, x.mask)), x.mask)
        return x.with_blocks(y)


class GlobalResponseNorm(nn.Module):
    """Global response normalisation (GRN): channels that respond more than the others of a sample are strengthened.

    y = gamma * x * r + beta + x with r = g / (mean of g over the channels + eps), where g is the l2 norm of a channel
    over the voxels of a sample, in a BlockSparseTensor over its visible ones (Woo et al., section 3.3). Where the
    published code for sparse tensors takes that norm over all samples of a batch, this takes it over each sample, as
    the published code for dense ones does: what a sample becomes does not depend on those beside it.

    Args:
        channels: C of dense tensors [N, C, D, H, W] and BlockSparseTensors.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Features) -> Features:
        """The same shape, under the same mask."""
        norm = _root(_squares_of_blocks(x) if isinstance(x, BlockSparseTensor) else _squares(x.movedim(1, -1), x))
        response = norm / (norm.mean(dim=1, keepdim=True) + EPS)  # [N, C]
        factor = (1 + self.gamma * response)[..., None, None, None].to(x.dtype)
        # A BlockSparseTensor has the arithmetic of a tensor.
        return cast(Features, x * factor + self.beta.view(1, -1, 1, 1, 1).to(x.dtype))


def _squares(channels_last: Tensor, like: Tensor | BlockSparseTensor) -> Tensor:
    """[rows, ..., C] -> [rows, C]: sums of squares, in float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return channels_last.to(dtype).square().flatten(1, -2).sum(1)


def _squares_of_blocks(x: BlockSparseTensor) -> Tensor:
    """[N, C]: sums of squares over the visible voxels of each sample."""
    rows = _squares(_where_visible(x.blocks, x.mask), x)
    samples = torch.arange(x.mask.batch, device=x.device)
    # A product, whose order of summation is fixed; in the precision of its operands, whatever autocast says.
    with torch.autocast(x.device.type, enabled=False):
        return (samples[:, None] == x.mask.index[:, 0]).to(rows.dtype) @ rows


def _root(squares: Tensor) -> Tensor:
    """Square roots; the gradient of the root of zero is zero, for a sample may have no visible voxel."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def _where_visible(blocks: Tensor, mask: BlockMask) -> Tensor:
    """[V, bd, bh, bw, C] with zeros at the masked voxels of partly visible blocks; gradients do not pass there."""
    return blocks if mask.voxels is None else torch.where(mask.voxels[..., None], blocks, 0)
