"""SparK: a masked autoencoder whose light decoder adds up the encoder's features.

Source: Tian et al., "Designing BERT for convolutional networks: sparse and hierarchical masked modeling" (ICLR 2023),
section 3, and the authors' code for the layers of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from s3d.model import Network, build_unet, mask_token
from s3d.networks.encoder_decoder import train_encoder_alone
from s3d_kernels import BlockMask, BlockSparseTensor, sparse_instance_norm, to_sparse

from .masked_autoencoder import MaskedAutoencoder
from .method import Trained

if TYPE_CHECKING:
    from s3d.pretrain_config import PretrainConfig


class SparK(MaskedAutoencoder):
    """Sparse encoder, light decoder of its own, squared error to targets that are z-scored within each masked block.

    The decoder of the network keeps its first weights; fine-tuning takes over the encoder alone.
    """

    trained: ClassVar[Trained] = "encoder"
    block_normalized: ClassVar[bool] = True

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """See `Pretext`."""
        super().check(config)
        first, *others = config.size.strides
        if first != 1 or any(stride != 2 for stride in others):
            raise ValueError(
                f"preset must have strides 1, 2, 2, ... for method spark, got {config.preset}, "
                f"which has {', '.join(map(str, config.size.strides))}"
            )

    def build_model(self) -> nn.Module:
        """See `Pretext`."""
        return SparKModel(build_unet(self.config.preset))


class SparKModel(nn.Module):
    """Sparse encoder; at each stage the features are normalised, filled with a mask token and brought to the width of
    the decoder by a 3x3x3 convolution.

    At the lowest resolution the decoder is as wide as the encoder and needs no convolution; it halves its width
    whenever it doubles the resolution.

    Where this differs from the published model: Batch norm is instance norm, here and in the decoder, as batches of
    volumes are tiny; before the mask tokens it has no affine part, which the convolution behind it can stand in for.
    And as the encoder has features of full resolution, they are added, too, before the last layer.

    Args:
        unet: with an encoder that can be made sparse, strides 1, 2, 2, ...; becomes part of this module, its encoder
            is converted in place and its decoder is frozen.
    Raises:
        ValueError: the encoder cannot be made sparse; says which layers.
    """

    def __init__(self, unet: Network) -> None:
        super().__init__()
        self.unet = unet
        to_sparse(unet.encoder)
        train_encoder_alone(unet)
        features: Sequence[int] = unet.encoder.output_channels  # from full resolution down
        widths = [max(1, features[-1] >> halvings) for halvings in reversed(range(len(features)))]
        self.mask_tokens = nn.ParameterList(nn.Parameter(mask_token(channels)) for channels in features)
        convolutions = [nn.Conv3d(channels, width, 3, padding=1) for channels, width in zip(features, widths)]
        self.densify = nn.ModuleList([*convolutions[:-1], nn.Identity()])
        self.decoder = LightDecoder(widths)

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
        dense = [
            densify(sparse_instance_norm(visible).to_dense(fill=token))
            for visible, token, densify in zip(features, self.mask_tokens, self.densify, strict=True)
        ]
        reconstruction: Tensor = self.decoder(dense)
        return reconstruction


class LightDecoder(nn.Module):
    """Adds the features of each stage to what it has made of those below.

    Args:
        widths: channels of the stages, from full resolution down, each at twice the resolution of the next.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        # The stage that each leads to, from full resolution down.
        self.blocks = nn.ModuleList(_up_block(low, high) for high, low in pairwise(widths))
        self.head = nn.Conv3d(widths[0], 1, 1)
        self.apply(_initialize)

    def forward(
        self,
        features: Sequence[Tensor],  # [N, width, D, H, W] of each stage, from full resolution down
    ) -> Tensor:
        """[N, 1, D, H, W]."""
        x = features[-1]
        for block, skip in zip(reversed(self.blocks), features[-2::-1], strict=True):
            x = block(x) + skip
        output: Tensor = self.head(x)
        return output


def _up_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Twice the resolution by a transposed convolution, then two convolutions."""
    return nn.Sequential(
        nn.ConvTranspose3d(in_channels, in_channels, 4, stride=2, padding=1),
        nn.Conv3d(in_channels, in_channels, 3, padding=1, bias=False),
        nn.InstanceNorm3d(in_channels, affine=True),
        nn.ReLU6(inplace=True),
        nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.InstanceNorm3d(out_channels, affine=True),
    )


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d) and module.bias is not None:
        nn.init.zeros_(module.bias)
