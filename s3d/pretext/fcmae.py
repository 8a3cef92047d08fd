"""FCMAE: the fully convolutional masked autoencoder of ConvNeXt V2.

Source: Woo et al., "ConvNeXt V2: co-designing and scaling ConvNets with masked autoencoders" (CVPR 2023), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from s3d.model import Network, build_unet, preset_shape
from s3d.networks.convnext import ConvNeXtBlock, initialize
from s3d.networks.encoder_decoder import train_encoder_alone
from s3d_kernels import BlockMask, BlockSparseTensor, to_sparse

from .masked_autoencoder import MaskedAutoencoder
from .method import Trained

if TYPE_CHECKING:
    from s3d.pretrain_config import PretrainConfig

# Width of the decoder (table 1 of the paper's appendix); encoders that are narrower than that get one of their width.
DECODER_CHANNELS = 512
# Standard deviation of the mask token's first values, as in the published code.
TOKEN_STD = 0.02


class FCMAE(MaskedAutoencoder):
    """Sparse ConvNeXt V2 encoder, decoder of one block at the lowest resolution, squared error to targets that are
    z-scored within each masked block.

    The decoder of the network keeps its first weights; fine-tuning takes over the encoder alone.
    """

    trained: ClassVar[Trained] = "encoder"
    block_normalized: ClassVar[bool] = True

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """See `Pretext`."""
        super().check(config)
        architecture = config.size.architecture
        if architecture != "convnext":
            raise ValueError(
                f"preset must be of architecture convnext for method fcmae, got {config.preset} of {architecture}"
            )

    def build_model(self) -> nn.Module:
        """See `Pretext`."""
        preset = self.config.preset
        return FCMAEModel(build_unet(preset), self.config.size.total_stride, preset_shape(preset).kernel_sizes[-1])


class FCMAEModel(nn.Module):
    """Sparse encoder; its features of the lowest resolution are brought to the width of the decoder, filled with a
    mask token, go through one block, and of each voxel a 1x1x1 convolution makes all voxels that it stands for.

    Args:
        unet: with a ConvNeXt encoder; becomes part of this module, its encoder is converted in place and its decoder
            is frozen.
        total_stride: voxels of the input that one voxel of the lowest resolution stands for, along each axis.
        kernel_size: of the decoder's depthwise convolution.
    """

    def __init__(self, unet: Network, total_stride: int, kernel_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.unet = unet
        train_encoder_alone(unet)
        self.total_stride = total_stride
        channels = unet.encoder.output_channels[-1]
        width = min(channels, DECODER_CHANNELS)
        self.project = nn.Conv3d(channels, width, 1)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.decoder = ConvNeXtBlock(width, kernel_size)
        self.predict = nn.Conv3d(width, total_stride**3, 1)
        for part in (self.project, self.decoder, self.predict):
            part.apply(initialize)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)
        to_sparse(nn.ModuleList([unet.encoder, self.project]))

    def forward(
        self,
        x: Tensor,  # [N, C, D, H, W], z-scored
        mask: BlockMask,  # of the same batch and volume
        *,
        masked_only: bool = False,
    ) -> Tensor:
        """Reconstruct the volume from its visible voxels; nothing of a masked voxel is read.

        Args:
            masked_only: as of `S3D`; saves nothing here.
        Returns: [N, 1, D, H, W].
        """
        features: Sequence[BlockSparseTensor] = self.unet.encoder(BlockSparseTensor.from_dense(x, mask))
        filled = self.project(features[-1]).to_dense(fill=self.mask_token)
        return unfold_channels(self.predict(self.decoder(filled)), self.total_stride)


def unfold_channels(x: Tensor, side: int) -> Tensor:
    """Each voxel's channels as a cube of voxels: [N, side**3, d, h, w] -> [N, 1, side * d, side * h, side * w].

    The channels are in the order of the voxels of a cube: depth, height, width.
    """
    n, _, d, h, w = x.shape
    cubes = x.view(n, side, side, side, d, h, w)
    return cubes.permute(0, 4, 1, 5, 2, 6, 3).reshape(n, 1, d * side, h * side, w * side)
