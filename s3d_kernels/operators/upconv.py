"""Up-convolution, a transposed convolution (kernel = stride = 2) and the 3^3 convolution behind it at once, and its
derivatives.

The voxels between which a transposed convolution puts its results are eight phases p in {0, 1}^3; behind the second
convolution each is a convolution of the coarse volume with 2^3 taps t:

    y[n, 2 q + p] = bias + sum over t of weight[p, :, :, t] @ x[n, q + t - 1 + p]

with x zero outside of the volume. As conv3d it is bilinear: the gradients of each of upconv3d, upconv3d_grad_input and
upconv3d_grad_weight are the two others. Volumes are dense and channels last.
"""

from typing import Any, Optional

from torch import Tensor

from ..backends import Backend, UpconvProblem, call
from .custom_operator import custom_operator

# torch reads the schema of a custom operator from these annotations: it wants Optional and list, not unions, tuples.


def _problem(x: Tensor, in_channels: int, out_channels: int) -> UpconvProblem:
    return UpconvProblem(x.device.type, x.dtype, in_channels, out_channels)


@custom_operator("s3d_kernels::upconv3d")
def upconv3d(
    x: Tensor,  # [N, d, h, w, C_low]
    weight: Tensor,  # [2, 2, 2, C, C_low, 2, 2, 2]: phase, channels, tap
    bias: Optional[Tensor],  # [C]
    backend: str,
) -> Tensor:
    """Up-convolution. Returns: [N, 2d, 2h, 2w, C]."""
    problem = _problem(x, weight.shape[4], weight.shape[3])
    return call(backend, problem, Backend.upconv3d, x.contiguous(), weight, bias)


@upconv3d.register_fake
def _(x, weight, bias, backend):
    batch, d, h, w, _ = x.shape
    return x.new_empty(batch, 2 * d, 2 * h, 2 * w, weight.shape[3])


@custom_operator("s3d_kernels::upconv3d_grad_input")
def upconv3d_grad_input(
    grad: Tensor,  # [N, 2d, 2h, 2w, C]
    weight: Tensor,  # [2, 2, 2, C, C_low, 2, 2, 2]
    backend: str,
) -> Tensor:
    """Gradient of the up-convolution with respect to its input. Returns: [N, d, h, w, C_low]."""
    problem = _problem(grad, weight.shape[4], weight.shape[3])
    return call(backend, problem, Backend.upconv3d_grad_input, grad.contiguous(), weight)


@upconv3d_grad_input.register_fake
def _(grad, weight, backend):
    batch, d, h, w, _ = grad.shape
    return grad.new_empty(batch, d // 2, h // 2, w // 2, weight.shape[4])


@custom_operator("s3d_kernels::upconv3d_grad_weight")
def upconv3d_grad_weight(
    grad: Tensor,  # [N, 2d, 2h, 2w, C]
    x: Tensor,  # [N, d, h, w, C_low]
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to weight and bias. Returns: [2, 2, 2, C, C_low, 2, 2, 2], [C]."""
    problem = _problem(grad, x.shape[-1], grad.shape[-1])
    return call(backend, problem, Backend.upconv3d_grad_weight, grad.contiguous(), x.contiguous())


@upconv3d_grad_weight.register_fake
def _(grad, x, backend):
    channels = grad.shape[-1]
    return grad.new_empty(2, 2, 2, channels, x.shape[-1], 2, 2, 2), grad.new_empty(channels)


def _upconv3d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.backend = inputs
    of_parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if of_parameters else None, weight)
    ctx.has_bias = bias is not None


def _upconv3d_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if x is not None:
        grad_weight, grad_bias = upconv3d_grad_weight(grad, x, ctx.backend)
    if ctx.needs_input_grad[0]:
        grad_x = upconv3d_grad_input(grad, weight, ctx.backend)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


def _upconv3d_grad_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, ctx.backend = inputs
    ctx.save_for_backward(grad, weight)


def _upconv3d_grad_input_backward(ctx: Any, grad2: Tensor) -> tuple[Any, ...]:
    grad, weight = ctx.saved_tensors
    of_grad = of_weight = None
    if ctx.needs_input_grad[0]:
        of_grad = upconv3d(grad2, weight, None, ctx.backend)
    if ctx.needs_input_grad[1]:
        of_weight, _ = upconv3d_grad_weight(grad, grad2, ctx.backend)
    return of_grad, of_weight, None


def _upconv3d_grad_weight_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, x, ctx.backend = inputs
    ctx.save_for_backward(grad, x)


def _upconv3d_grad_weight_backward(ctx: Any, grad2_weight: Tensor, grad2_bias: Tensor) -> tuple[Any, ...]:
    grad, x = ctx.saved_tensors
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        of_grad = upconv3d(x, grad2_weight, grad2_bias, ctx.backend)
    if ctx.needs_input_grad[1]:
        of_x = upconv3d_grad_input(grad, grad2_weight, ctx.backend)
    return of_grad, of_x, None


upconv3d.register_autograd(_upconv3d_backward, setup_context=_upconv3d_setup)
upconv3d_grad_input.register_autograd(_upconv3d_grad_input_backward, setup_context=_upconv3d_grad_input_setup)
upconv3d_grad_weight.register_autograd(_upconv3d_grad_weight_backward, setup_context=_upconv3d_grad_weight_setup)
