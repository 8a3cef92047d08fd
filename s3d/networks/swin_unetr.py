"""Swin UNETR: a Swin transformer as encoder of a U-Net of residual blocks.

Put together from MONAI's blocks, as its own network has five resolutions below the image, no more and no fewer. Of that
depth, both compute the same.

On CPUs with several threads the gradient of the position tables is not the same to the last bit from call to call:
torch adds it up in the order that threads come.

Source: Hatamizadeh et al., "Swin UNETR" (BrainLes 2021); MONAI's ``SwinUNETR``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from monai.networks.blocks import PatchEmbed, UnetOutBlock, UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets.swin_unetr import BasicLayer, PatchMerging
from torch import Tensor, nn

from .encoder_decoder import EncoderDecoder

WINDOW = 7  # side of the cubes that attention is confined to, in voxels of their resolution; as published
HEAD_CHANNELS = 16  # of each attention head: 3 heads at 48 channels, as published


def build_swin_unetr(
    in_channels: int,
    out_channels: int,
    *,
    features: Sequence[int],
    blocks: Sequence[int],
    strides: Sequence[Sequence[int]],
    deep_supervision: bool = False,
) -> EncoderDecoder:
    """A Swin UNETR.

    Args:
        in_channels: of its input.
        out_channels: of its output.
        features: channels of each resolution, from that of the image down: C, C, 2 C, 4 C, ...
        blocks: transformer blocks of each resolution: none at the first and the last, where only convolutions stand.
        strides: of each resolution: 1, 2, 2, ... along all axes.
        deep_supervision: whether it returns the outputs of all decoder stages, the finest first.
    Raises:
        ValueError: a Swin UNETR cannot have this shape.
    """
    depth = len(features)
    if depth < 3 or not len(blocks) == len(strides) == depth:
        raise ValueError(
            "features, blocks and strides of a Swin UNETR must be of one length, at least 3, "
            f"got {depth}, {len(blocks)} and {len(strides)}"
        )
    expected = (features[0], *(features[0] << stage for stage in range(depth - 1)))
    if tuple(features) != expected or features[0] % HEAD_CHANNELS:
        raise ValueError(
            f"features of a Swin UNETR must be C, C, 2 C, 4 C, ... with C a multiple of {HEAD_CHANNELS}, "
            f"got {tuple(features)}"
        )
    if blocks[0] or blocks[-1] or min(blocks[1:-1]) < 1:
        raise ValueError(f"blocks of a Swin UNETR must be 0 at both ends and positive between, got {tuple(blocks)}")
    if [tuple(stride) for stride in strides] != [(1, 1, 1), *[(2, 2, 2)] * (depth - 1)]:
        raise ValueError(f"strides of a Swin UNETR must be 1, then 2, along all axes, got {tuple(strides)}")
    encoder = SwinEncoder(in_channels, features[0], blocks[1:-1])
    decoder = SwinDecoder(encoder.output_channels, out_channels, deep_supervision=deep_supervision)
    return EncoderDecoder(encoder, decoder)


class SwinEncoder(nn.Module):
    """The Swin transformer alone. Its first "features" are the image itself, as the decoder wants it.

    All other features are normalised over the channels of each voxel (layer norm without weights). Convolutions of skip
    connections belong to the decoder: so all parameters of the encoder take part in its deepest features, and what
    methods hand over that train a Swin transformer is what they have trained.

    Args:
        in_channels: of the image.
        feature_size: channels at half the resolution of the image, doubled at each lower one.
        depths: transformer blocks of each stage; behind them the stage halves the resolution.
    Attributes:
        output_channels: of the features.
        total_stride: voxels of the image that one of the deepest features stands for, along each axis.
    """

    def __init__(self, in_channels: int, feature_size: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.output_channels = (in_channels, *(feature_size << stage for stage in range(len(depths) + 1)))
        self.total_stride = 2 << len(depths)
        self.stem = PatchEmbed(
            patch_size=2,
            in_chans=in_channels,
            embed_dim=feature_size,
            norm_layer=None,  # type: ignore[arg-type]
        )
        self.stages = nn.ModuleList(
            BasicLayer(
                dim=feature_size << stage,
                depth=depth,
                num_heads=(feature_size << stage) // HEAD_CHANNELS,
                window_size=(WINDOW,) * 3,
                drop_path=[0.0] * depth,
                qkv_bias=True,
                downsample=PatchMerging,  # type: ignore[arg-type]
            )
            for stage, depth in enumerate(depths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:  # [N, C, D, H, W]
        """The image and the features of each lower resolution, [N, C_i, D / 2^i, H / 2^i, W / 2^i].

        Raises:
            ValueError: a side is no multiple of the total stride; the blocks would pad it with zeros.
        """
        if any(side % self.total_stride for side in x.shape[2:]):
            raise ValueError(
                f"sides of the input must be multiples of {self.total_stride}, the total stride of this Swin UNETR, "
                f"got {tuple(x.shape[2:])}"
            )
        features = [x]
        x = self.stem(x)
        features.append(_normalized(x))
        for stage in self.stages:
            x = stage(x.contiguous())
            features.append(_normalized(x))
        return features


def _normalized(x: Tensor) -> Tensor:  # [N, C, D, H, W]
    """Layer norm without weights over the channels of each voxel."""
    return nn.functional.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


class SwinDecoder(nn.Module):
    """Convolutions of the skip connections, up-sampling stages and their heads.

    Args:
        channels: of the encoder's features.
        out_channels: of the output.
        deep_supervision: whether it returns the outputs of all stages, the finest first.
    Attributes:
        skips: what the features of each resolution go through, full resolution first; nothing at the last but one.
        stages: of up-sampling, the lowest resolution first.
        seg_layers: heads of the stages, in their order.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, *, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        widths = (channels[1], *channels[1:])  # behind the skip connections
        self.skips = nn.ModuleList(
            nn.Identity()
            if stage == len(widths) - 2
            else UnetrBasicBlock(3, inner, outer, kernel_size=3, stride=1, norm_name="instance", res_block=True)
            for stage, (inner, outer) in enumerate(zip(channels, widths, strict=True))
        )
        descending = widths[::-1]
        self.stages = nn.ModuleList(
            UnetrUpBlock(3, low, high, kernel_size=3, upsample_kernel_size=2, norm_name="instance", res_block=True)
            for low, high in pairwise(descending)
        )
        self.seg_layers = nn.ModuleList(UnetOutBlock(3, width, out_channels) for width in descending[1:])

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Output [N, C_out, D, H, W] of the encoder's features, or a list of those of all stages."""
        skips = [block(feature) for block, feature in zip(self.skips, features, strict=True)]
        x = skips.pop()
        outputs = []
        for stage, head in zip(self.stages, self.seg_layers, strict=True):
            x = stage(x, skips.pop())
            if self.deep_supervision or not skips:
                outputs.append(head(x))
        return outputs[::-1] if self.deep_supervision else outputs[0]
