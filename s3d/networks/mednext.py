"""MedNeXt: a U-Net of depthwise convolutions, in two halves.

Source: Roy et al., "MedNeXt: transformer-driven scaling of ConvNets for medical image segmentation" (MICCAI 2023). Its
blocks are those of MONAI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks.mednext_block import MedNeXtBlock, MedNeXtDownBlock, MedNeXtUpBlock
from torch import Tensor, nn

from s3d_kernels import BlockSparseTensor

from .encoder_decoder import EncoderDecoder

# Channels inside a block / channels of its stage, from full resolution down; deeper stages have the last. Those of the
# published sizes B and M (table 1 of the paper).
EXPANSION = (2, 3, 4)


def mednext(
    in_channels: int,
    out_channels: int,
    features: Sequence[int],
    blocks: Sequence[int],
    kernel_size: int,
    *,
    deep_supervision: bool = False,
) -> EncoderDecoder:
    """A MedNeXt; each stage after the first halves the resolution of the one before.

    Args:
        in_channels: of its input.
        out_channels: of its output.
        features: channels of each stage, from full resolution down.
        blocks: of each stage, without those that change the resolution; as many in the decoder as in the encoder.
        kernel_size: of the depthwise convolutions, odd.
        deep_supervision: whether it returns the outputs of all decoder stages, the finest first.
    """
    expansions = [EXPANSION[min(stage, len(EXPANSION) - 1)] for stage in range(len(features))]
    encoder = MedNeXtEncoder(in_channels, features, blocks, expansions, kernel_size)
    decoder = MedNeXtDecoder(out_channels, features, blocks, expansions, kernel_size, deep_supervision)
    return EncoderDecoder(encoder, decoder)


class MedNeXtEncoder(nn.Module):
    """The features of each stage. Converted with ``to_sparse`` it takes and gives BlockSparseTensors.

    Args:
        in_channels: of its input.
        features, blocks, kernel_size: see :func:`mednext`.
        expansions: channels inside the blocks of each stage / features.
    """

    def __init__(
        self,
        in_channels: int,
        features: Sequence[int],
        blocks: Sequence[int],
        expansions: Sequence[int],
        kernel_size: int,
    ) -> None:
        super().__init__()
        self.output_channels = list(features)
        self.stem = nn.Conv3d(in_channels, features[0], 1)
        stages = []
        for stage, (channels, number, expansion) in enumerate(zip(features, blocks, expansions, strict=True)):
            layers = [_block(channels, expansion, kernel_size) for _ in range(number)]
            if stage > 0:
                down = MedNeXtDownBlock(
                    features[stage - 1], channels, expansion, kernel_size, use_residual_connection=True
                )
                layers.insert(0, down)
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:  # [N, C, D, H, W]
        """[N, features, D / 2**stage, ...] of each stage."""
        x = self.stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(_fast_memory(x))
            outputs.append(x)
        return outputs


class MedNeXtDecoder(nn.Module):
    """The output of an encoder's features, which it adds to those that it has upsampled.

    Args:
        out_channels: of its output.
        features, blocks, kernel_size, deep_supervision: see :func:`mednext`.
        expansions: channels inside the blocks of each stage / features.
    """

    def __init__(
        self,
        out_channels: int,
        features: Sequence[int],
        blocks: Sequence[int],
        expansions: Sequence[int],
        kernel_size: int,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        upsampling, stages, heads = [], [], []
        for stage in range(len(features) - 2, -1, -1):
            channels, expansion = features[stage], expansions[stage]
            upsampling.append(
                MedNeXtUpBlock(features[stage + 1], channels, expansion, kernel_size, use_residual_connection=True)
            )
            stages.append(nn.Sequential(*[_block(channels, expansion, kernel_size) for _ in range(blocks[stage])]))
            heads.append(nn.Conv3d(channels, out_channels, 1))
        self.transpconvs = nn.ModuleList(upsampling)
        self.stages = nn.ModuleList(stages)
        self.seg_layers = nn.ModuleList(heads)

    def forward(
        self,
        skips: Sequence[Tensor],  # from full resolution down
    ) -> Tensor | list[Tensor]:
        """[N, out_channels, D, H, W], or with deep supervision a list of those of all stages, the finest first."""
        *finer, x = skips
        outputs = []
        for up, stage, head, skip in zip(self.transpconvs, self.stages, self.seg_layers, finer[::-1], strict=True):
            x = stage(_fast_memory(up(_fast_memory(x)) + skip))
            if self.deep_supervision or head is self.seg_layers[-1]:
                outputs.append(head(x))
        return outputs[::-1] if self.deep_supervision else outputs[-1]


def _fast_memory(x: Any) -> Any:
    """The same features; dense ones on a CPU in channels-last memory.

    In other memory torch takes there twice as long for the gradients of depthwise convolutions.
    """
    if isinstance(x, BlockSparseTensor) or x.device.type != "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last_3d)


def _block(channels: int, expansion: int, kernel_size: int) -> MedNeXtBlock:
    return MedNeXtBlock(channels, channels, expansion, kernel_size, use_residual_connection=True)
