"""Custom operators with their autograd formulas: the only place that defines derivatives.

Each raw operation is one operator of `torch.library` that takes the name of a backend as a string, so the choice
happens inside its body: `torch.compile` sees one node, and backward uses the backend that forward was given.
"""

from .blocks import gather_blocks, scatter_blocks
from .conv import conv3d, conv3d_fused, conv3d_grad_input
from .masked_head import masked_head
from .norm import compute_deferred, norm_apply, norm_statistics, normalize, normalize_deferred
from .pool import pool3d
from .upconv import upconv3d

__all__ = [
    "compute_deferred",
    "conv3d",
    "conv3d_fused",
    "conv3d_grad_input",
    "gather_blocks",
    "masked_head",
    "norm_apply",
    "norm_statistics",
    "normalize",
    "normalize_deferred",
    "pool3d",
    "scatter_blocks",
    "upconv3d",
]
