"""Counting floating-point operations: what an exact direct algorithm has to do, whoever does it.

A multiplication and its addition are two. Of convolutions only pairs of an input and an output voxel that both exist
are counted, in the volume and visible: zero padding is not, and what Winograd's algorithm saves is not taken off.
Norms, activations and sums are left out: they are bound by memory.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from .backends import REGISTRY, WindowGeometry
from .backends.interface import Triple

if TYPE_CHECKING:
    from typing_extensions import Self

Shares = dict[str, float]  # of each part; they sum to 1
ALL = "all"


def pairs_of(geometry: WindowGeometry) -> int:
    """Pairs of an input and an output voxel, both visible, of a window operator."""
    if geometry.source_voxels is not None or geometry.target_voxels is not None:
        ones = torch.ones(len(geometry.source_index), *geometry.source_block, 1, device=geometry.table.device)
        taps = ones.new_ones(1, 1, *geometry.kernel_size)
        return int(REGISTRY["reference"].conv3d(ones, taps, None, geometry, 1).sum(dtype=torch.float64))
    sizes = (geometry.kernel_size, geometry.stride, geometry.padding)
    return pairs_of_blocks(geometry.table, geometry.radius, geometry.target_block, *sizes)


def pairs_of_blocks(
    table: Tensor,  # [Vo, T]
    radius: Triple,
    block: Triple,
    kernel_size: Triple,
    stride: Triple,
    padding: Triple,
) -> int:
    """The same of whole blocks; arguments as of `WindowGeometry`."""
    # Along each axis: pairs of a block's output voxels with input voxels of the block at each distance.
    along = []
    for r, b, k, s, p in zip(radius, block, kernel_size, stride, padding, strict=True):
        found = Counter((o * s - p + tap) // (b * s) for o in range(b) for tap in range(k))
        along.append([found[distance] for distance in range(-r, r + 1)])
    pairs = [math.prod(numbers) for numbers in itertools.product(*along)]
    return sum(int(n) * here for n, here in zip((table >= 0).sum(0), pairs, strict=True))


def _window(products: float, given: Sequence[Any]) -> float:
    """Of conv3d and its gradients.

    Args:
        products: of channels, for a pair of voxels.
        given: what stands behind the operands.
    """
    return 2.0 * products * pairs_of(WindowGeometry.from_operator(*given[:6]))


def _products(weight: Tensor) -> int:
    return weight.shape[0] * weight.shape[1]


def _upconv3d(coarse: Tensor, channels: int) -> float:
    """Of the two taps of the two phases along an axis of n voxels, two meet all n and two all but one."""
    batch, *sizes, channels_low = coarse.shape
    return 2.0 * batch * math.prod(4 * n - 2 for n in sizes) * channels * channels_low


def _convolution(
    x: Tensor, weight: Tensor, y: Tensor, stride: Any, padding: Any, dilation: Any, reverse: bool
) -> float:
    """torch's own. The transposed one is the reverse of one from the larger volume to the smaller."""
    fine, coarse = (y, x) if reverse else (x, y)
    pairs = len(x)
    for n, m, k, s, p, d in zip(fine.shape[2:], coarse.shape[2:], weight.shape[2:], stride, padding, dilation):
        pairs *= sum(0 <= o * s - p + tap * d < n for o in range(m) for tap in range(k))
    return 2.0 * pairs * _products(weight)


def _convolution_backward(args: Sequence[Any]) -> float:
    grad, x, weight, _, stride, padding, dilation, transposed, _, _, wanted = args
    number: int = sum(wanted[:2])
    return _convolution(x, weight, grad, stride, padding, dilation, transposed) * number


def _masked_head(weight: Tensor, index: Tensor, block: Sequence[int]) -> float:
    return 2.0 * len(index) * math.prod(block) * weight.numel()


ours, aten = torch.ops.s3d_kernels, torch.ops.aten
# Operator: of its arguments and its result, as a mode gets them.
FORMULAS: dict[Any, Callable[[Sequence[Any], Any], float]] = {
    ours.conv3d: lambda args, _: _window(_products(args[1]), args[3:]),
    ours.conv3d_fused: lambda args, _: _window(_products(args[1]), args[3:]),
    ours.conv3d_grad_input: lambda args, _: _window(_products(args[1]), args[2:]),
    ours.conv3d_grad_weight: lambda args, out: _window(_products(out[0]), args[2:]),
    ours.upconv3d: lambda args, _: _upconv3d(args[0], args[1].shape[3]),
    ours.upconv3d_grad_input: lambda args, out: _upconv3d(out, args[1].shape[3]),
    ours.upconv3d_grad_weight: lambda args, _: _upconv3d(args[1], args[0].shape[-1]),
    ours.masked_head: lambda args, _: _masked_head(args[3], args[7], args[9]),
    # Features and weight. That backward activates the features again costs no product of channels.
    ours.masked_head_grad: lambda args, _: 2 * _masked_head(args[4], args[7], args[9]),
    aten.convolution: lambda args, out: _convolution(args[0], args[1], out, *args[3:7]),
    aten.convolution_backward: lambda args, _: _convolution_backward(args),
}


class FlopCount(TorchDispatchMode):
    """Counts operators, of forward and backward, and computes nothing but integers and booleans.

    Memory that nobody fills is no memory yet, so that steps can be counted that would not fit.

    What belongs to a part of a network is told by the weight; of a gradient that needs none, by the weight that forward
    saved beside what it does need. What layers compute again in backward to save memory is not counted, for they keep
    it where somebody watches what they save.

    Args:
        parts: what share of the work with a tensor, if that is a weight, each part has.
        of_operator: the part of an operator without such a tensor; default is ``ALL``.
    Attributes:
        flops: of each part.
    """

    def __init__(
        self,
        parts: Callable[[Tensor], Shares | None] = lambda tensor: None,
        of_operator: Mapping[Any, str] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.flops: defaultdict[str, float] = defaultdict(float)
        self._parts, self._of_operator = parts, of_operator
        self._saved: Shares = {ALL: 1.0}
        self._hooks = saved_tensors_hooks(lambda tensor: tensor, self._unpack)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *of_error: object) -> None:
        super().__exit__(*of_error)
        self._hooks.__exit__(*of_error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator, kwargs = func.overloadpacket, kwargs or {}
        formula, of_torch = FORMULAS.get(operator), flop_registry.get(operator)
        if formula is None and of_torch is None and func.namespace != "s3d_kernels":
            return _without_floats(func, args, kwargs)
        result = _unfilled(func, args, kwargs)
        flops = 0.0
        if formula is not None:
            flops = formula(args, result)
        elif of_torch is not None:
            flops = of_torch(*args, **kwargs, out_val=result)
        if flops:
            for part, share in self._shares(operator, args).items():
                self.flops[part] += share * flops
        return result

    def _unpack(self, tensor: Tensor) -> Tensor:
        self._saved = self._parts(tensor) or self._saved
        return tensor

    def _shares(self, operator: Any, args: Sequence[Any]) -> Shares:
        if operator is ours.conv3d_grad_weight:
            return self._saved
        known = (self._parts(a) for a in args if isinstance(a, Tensor))
        return next((shares for shares in known if shares is not None), {self._of_operator.get(operator, ALL): 1.0})


def _without_floats(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of a function that is not counted: floating-point numbers with any values, all others as they are."""
    if func._schema.is_mutable:
        changed = args[0] if args else None
        # What it would write is of no interest, as long as it writes to its first argument and nowhere else.
        if isinstance(changed, Tensor) and changed.is_floating_point() and func._schema.name.endswith("_"):
            return changed
        return func(*args, **kwargs)
    views = any(argument.alias_info is not None for argument in func._schema.arguments)
    floats = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves((args, kwargs)))
    if views or not floats:
        return func(*args, **kwargs)
    result = _unfilled(func, args, kwargs)
    if all(leaf.is_floating_point() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
        return result
    return func(*args, **kwargs)


def _unfilled(func: Any, args: Any, kwargs: Any) -> Any:
    """Tensors as an operator would return them, of which nothing is written."""
    plain = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    with FakeTensorMode() as mode:
        args, kwargs = tree_map_only(Tensor, mode.from_tensor, plain)
        result = func(*args, **kwargs)
    return tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device), result
    )
