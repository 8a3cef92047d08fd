"""3D convolution, normalisation and pooling over visible voxels only, as drop-in torch modules."""

from ._version import __version__
from .backends import REGISTRY, computes_natively, explain, load_measurements, tuning, use_backend
from .background import Background
from .block_mask import BlockMask
from .block_sparse import BlockSparseTensor
from .convert import to_sparse
from .filled import FilledTensor
from .functional import (
    sparse_batch_norm,
    sparse_conv3d,
    sparse_conv_transpose3d,
    sparse_group_norm,
    sparse_instance_norm,
    sparse_pool3d,
)
from .fused_upconv import fused_upconv3d, phase_weights
from .masked_head import masked_head
from .modules import (
    SparseAvgPool3d,
    SparseBatchNorm3d,
    SparseConv3d,
    SparseConvTranspose3d,
    SparseGroupNorm,
    SparseInstanceNorm3d,
    SparseMaxPool3d,
)

__all__ = [
    "REGISTRY",
    "Background",
    "BlockMask",
    "BlockSparseTensor",
    "FilledTensor",
    "SparseAvgPool3d",
    "SparseBatchNorm3d",
    "SparseConv3d",
    "SparseConvTranspose3d",
    "SparseGroupNorm",
    "SparseInstanceNorm3d",
    "SparseMaxPool3d",
    "__version__",
    "computes_natively",
    "explain",
    "fused_upconv3d",
    "load_measurements",
    "masked_head",
    "phase_weights",
    "sparse_batch_norm",
    "sparse_conv3d",
    "sparse_conv_transpose3d",
    "sparse_group_norm",
    "sparse_instance_norm",
    "sparse_pool3d",
    "to_sparse",
    "tuning",
    "use_backend",
]
