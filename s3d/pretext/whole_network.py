"""The model of a method that trains encoder and decoder and adds nothing to them."""

from __future__ import annotations

from torch import Tensor, nn

from s3d.model import Network


class WholeNetwork(nn.Module):
    """A network of which every parameter is trained but those of the heads of lower resolutions.

    These belong to the network and its checkpoint, but without deep supervision none is used.

    Args:
        unet: the network, without deep supervision.
    """

    def __init__(self, unet: Network) -> None:
        super().__init__()
        self.unet = unet
        unet.decoder.seg_layers[:-1].requires_grad_(False)

    def forward(
        self,
        x: Tensor,  # [N, C, D, H, W]
    ) -> Tensor:
        """The output of the network, [N, C_out, D, H, W]."""
        output: Tensor = self.unet(x)
        return output
