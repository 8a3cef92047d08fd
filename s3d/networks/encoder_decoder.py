"""The two halves that every network here has, so that methods and fine-tuning can tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

# Norm and activation of nnU-Net's networks, as their classes take them.
NNUNET_LAYERS: dict[str, Any] = {
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"negative_slope": 0.01, "inplace": True},
}


class EncoderDecoder(nn.Module):
    """A network with the halves and the names of a ``ResidualEncoderUNet``.

    Args:
        encoder: gives the features of each stage, from full resolution down. Its ``output_channels`` are those of the
            stages.
        decoder: makes the output of these features. Its ``seg_layers`` are the heads of its stages in the order of
            computation, the lowest resolution first; with its ``deep_supervision`` it returns the outputs of all, the
            finest first, otherwise the finest alone.
    """

    # As of a ResidualEncoderUNet, which has no types: what torch says of attributes of modules is in the way.
    encoder: Any
    decoder: Any

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:  # [N, C, D, H, W]
        """Output [N, C_out, D, H, W], or a list of those of all stages."""
        features: Sequence[Tensor] = self.encoder(x)
        output: Tensor | list[Tensor] = self.decoder(features)
        return output


def train_encoder_alone(network: Any) -> None:
    """Freeze all of a network but its encoder, which a decoder may hold as well."""
    network.requires_grad_(False)
    network.encoder.requires_grad_(True)
