"""A transposed convolution and the convolution behind it as one up-convolution of the coarse volume."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import operators
from .backends import current_backend
from .background import Background
from .filled import FilledTensor
from .functional import autocast_dtype, check_vector
from .operators.custom_operator import somebody_looks_on


def fused_upconv3d(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    skip: FilledTensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Transposed convolution with kernel and stride 2, then a 3^3 convolution with padding 1, without what is between.

    The same as ``conv3d(conv_transpose3d(x, up_weight, up_bias, stride=2), weight, bias, padding=1)``, border included.
    Each voxel of the result sees 2^3 voxels of ``x``; see :func:`phase_weights`. What the transposed convolution's bias
    contributes depends only on the distance to the border and is added there; see :class:`Background`. With ``skip``,
    features that follow the upsampled ones along the channels, as in the decoder of a U-Net:
    ``conv3d(cat([conv_transpose3d(...), skip.to_dense()], 1), weight, bias, padding=1)``.

    Args:
        x: features [N, C_low, D, H, W]; float32, float64, bfloat16 or float16.
        up_weight: [C_low, C_mid, 2, 2, 2], of the transposed convolution.
        up_bias: [C_mid] or None.
        weight: [C, C_mid, 3, 3, 3], of the convolution; with ``skip`` [C, C_mid + C_skip, 3, 3, 3].
        bias: [C] or None.
        skip: [N, C_skip, 2 D, 2 H, 2 W] or None.
        backend: name of a backend; default is the current one, see ``use_backend``.
    Returns: [N, C, 2 D, 2 H, 2 W] in channels-last memory; dtype of x, or that of autocast where it is on.
    Raises:
        ValueError: shapes or dtypes do not fit; an unknown backend or one that cannot do this.
    """
    if x.dim() != 5:
        raise ValueError(f"x must be [N, C_low, D, H, W], got shape {tuple(x.shape)}")
    middle = up_weight.shape[1]
    of_up = weight if skip is None else weight[:, :middle]
    _check_weights(up_weight, of_up)
    if up_weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"up_weight must be [C_low, C_mid, 2, 2, 2] for C_low={x.shape[1]}, got {tuple(up_weight.shape)}"
        )
    check_vector("up_bias", up_bias, middle)
    check_vector("bias", bias, len(weight))
    shape = (2 * x.shape[2], 2 * x.shape[3], 2 * x.shape[4])
    if skip is not None and tuple(skip.shape) != (len(x), weight.shape[1] - middle, *shape):
        raise ValueError(
            f"skip must be [{len(x)}, {weight.shape[1] - middle}, {', '.join(map(str, shape))}] for x of shape "
            f"{tuple(x.shape)} and weight of shape {tuple(weight.shape)}, got {tuple(skip.shape)}"
        )
    dtype = autocast_dtype(x)
    if dtype is None:
        dtype = x.dtype
        for name, parameter in (("up_weight", up_weight), ("up_bias", up_bias), ("weight", weight), ("bias", bias)):
            if parameter is not None and parameter.dtype != dtype:
                raise ValueError(
                    f"x and {name} must have the same dtype outside autocast, got {dtype} and {parameter.dtype}"
                )
    # What is known beforehand of the convolution's input, and so of its result.
    known = None if up_bias is None else Background.constant(_wide(up_bias), shape)
    if skip is not None:
        upsampled = known or Background.constant(_wide(up_weight.new_zeros(middle)), shape)
        known = upsampled.cat(skip.background)
    if known is not None:
        known = known.conv3d(_wide(weight), None if bias is None else _wide(bias))
        bias = known.centre
    name = backend or current_backend()
    phases = phase_weights(up_weight, of_up).to(dtype)
    volume = x.to(dtype).permute(0, 2, 3, 4, 1)
    y: Tensor = operators.upconv3d(volume, phases, None if bias is None else bias.to(dtype), name)
    if known is not None and skip is not None:
        y = skip.conv3d_of(weight[:, middle:], known, name).add_beyond_centre(y)
    elif known is not None:
        y = known.add_border(y)
    return y.permute(0, 4, 1, 2, 3)


def phase_weights(up_weight: Tensor, weight: Tensor) -> Tensor:
    """The weight of the up-convolution that equals a transposed convolution and the convolution behind it.

    The transposed convolution writes fine voxel 2 m + r from coarse voxel m by its sub-voxel r in {0, 1}^3. So tap k of
    the convolution at fine voxel 2 q + p (its phase p) meets, along each axis,

        p = 0:   k = -1: m = q - 1, r = 1    k = 0: m = q, r = 0    k = +1: m = q,     r = 1
        p = 1:   k = -1: m = q,     r = 0    k = 0: m = q, r = 1    k = +1: m = q + 1, r = 0

    and what meets the same coarse voxel m = q + t - 1 + p is one tap t in {0, 1}^3 of the phase. All that meet under
    phase p and tap t have k + 1 + 1 - r = 2 t + p: with the sub-voxels the other way round, the four sums along an axis
    are the coefficients of a product of polynomials with three and with two. So it takes 64 products of matrices
    instead of 27 * 8: of the values at four points an axis (Toom and Cook).

    Args:
        up_weight: [C_low, C_mid, 2, 2, 2], of the transposed convolution with stride 2.
        weight: [C, C_mid, 3, 3, 3], of the convolution with padding 1.
    Returns: [2, 2, 2, C, C_low, 2, 2, 2]: phase, channels, tap. float64 for float64, else float32, under autocast too:
        the sums are over many channels, and are to be rounded once.
    Raises:
        ValueError: shapes do not fit.
    Source: Toom-Cook as in Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (CVPR 2016), section 4.
    """
    _check_weights(up_weight, weight)
    channels, middle, channels_low = len(weight), len(weight[0]), len(up_weight)
    with torch.autocast(weight.device.type, enabled=False):
        of_taps, of_sub_voxels, to_phases = _transforms(_wide(weight).dtype, weight.device)
        left = (of_taps @ _wide(weight).permute(2, 3, 4, 0, 1).reshape(27, -1)).view(64, channels, middle)
        right = (of_sub_voxels @ _wide(up_weight).permute(2, 3, 4, 1, 0).reshape(8, -1)).view(64, middle, channels_low)
        sums = (to_phases @ (left @ right).view(64, -1)).view(2, 2, 2, 2, 2, 2, channels, channels_low)
    return sums.permute(0, 1, 2, 6, 7, 3, 4, 5).contiguous()


def _transforms(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices [64, 27], [64, 8] and [64, 64]: taps and sub-voxels to values at points, these to phases and taps.

    A polynomial is known by its values at 0, 1, -1 and infinity, where the value is the coefficient of the highest
    power; those of a product are products.
    """
    if torch.compiler.is_compiling() or somebody_looks_on():  # who may be making tensors that are none
        return _make_transforms(dtype, device)
    return _kept_transforms(dtype, device)


@functools.lru_cache
def _kept_transforms(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # Whoever calls first may be in inference mode, and the others not.
    with torch.inference_mode(False):
        return _make_transforms(dtype, device)


def _make_transforms(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    of_three = [[1, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 1]]
    of_two = [[0, 1], [1, 1], [-1, 1], [1, 0]]  # the sub-voxels the other way round
    coefficients = [[1, 0, 0, 0], [0, 0.5, -0.5, -1], [-1, 0.5, 0.5, 0], [0, 0, 0, 1]]  # of power 2 t + p
    three, two, back = (torch.tensor(rows, dtype=dtype, device=device) for rows in (of_three, of_two, coefficients))
    # Along three axes, the rows of the last in the order of phases before taps.
    cube = torch.kron(torch.kron(back, back), back).view(2, 2, 2, 2, 2, 2, 64)
    to_phases = cube.permute(1, 3, 5, 0, 2, 4, 6).reshape(64, 64)
    return torch.kron(torch.kron(three, three), three), torch.kron(torch.kron(two, two), two), to_phases


def _wide(parameter: Tensor) -> Tensor:
    return parameter if parameter.dtype == torch.float64 else parameter.float()


def _check_weights(up_weight: Tensor, weight: Tensor) -> None:
    if up_weight.dim() != 5 or up_weight.shape[2:] != (2, 2, 2):
        raise ValueError(f"up_weight must be [C_low, C_mid, 2, 2, 2], got {tuple(up_weight.shape)}")
    if weight.dim() != 5 or weight.shape[1] != up_weight.shape[1] or weight.shape[2:] != (3, 3, 3):
        raise ValueError(
            f"weight must be [C, C_mid, 3, 3, 3] for C_mid={up_weight.shape[1]}, got {tuple(weight.shape)}"
        )
