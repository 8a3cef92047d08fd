"""BlockSparseTensor: features of the visible blocks of a batch of volumes, together with their mask."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import BlockGeometry, current_backend
from .block_mask import BlockMask
from .fused_norm import DeferredNorm, PendingNorm, hooks_are_set
from .operators import gather_blocks, scatter_blocks
from .recompute import Kept, Recipe


class BlockSparseTensor:
    """Features [N, C, D, H, W] that exist at visible voxels only.

    It carries its mask, so unmodified layers and residual blocks of other libraries work on it: elementwise functions
    of torch, arithmetic, dropout and concatenation along channels apply to the visible voxels. Functions that would
    mix voxels raise; for those there are the modules of this package.

    Attributes:
        blocks: [V, bd, bh, bw, C], channels last; what lies at masked voxels of partly visible blocks is arbitrary.
            Of a normalisation it is computed when it is first asked for, see :meth:`of_norm`.
        mask: which voxels of which volumes the blocks are.
    """

    def __init__(self, blocks: Tensor, mask: BlockMask) -> None:
        shape = blocks.shape
        if len(shape) != 5 or tuple(shape[1:4]) != mask.block:
            raise ValueError(f"blocks must be [V, {', '.join(map(str, mask.block))}, C], got {tuple(shape)}")
        # Not in a compiled graph, where it would be one more guard on the number of blocks.
        if not torch.compiler.is_compiling() and (shape[0] != mask.num_blocks or blocks.device != mask.device):
            raise ValueError(
                f"blocks must have the {mask.num_blocks} rows of mask and lie on {mask.device}, "
                f"got {shape[0]} rows on {blocks.device}"
            )
        self._blocks: Tensor | None = blocks
        self._pending: PendingNorm | None = None
        self._deferred: DeferredNorm | None = None
        self._recipe: Recipe | None = None
        self._recipe_version = 0
        self._statistics: tuple[Tensor, Tensor, int, str] | None = None
        self._waiting: list[weakref.ref[BlockSparseTensor]] = []  # results that still have to read these features
        self._operands: tuple[BlockSparseTensor, ...] = ()  # what this waits for
        self.mask = mask

    @classmethod
    def of_norm(cls, norm: PendingNorm, mask: BlockMask, *operands: BlockSparseTensor) -> BlockSparseTensor:
        """The result of a normalisation, computed when it is first asked for.

        A residual that is added before, and a LeakyReLU or ReLU, then join it in one operator; or a convolution that
        can reads its input and computes it on the way, see :meth:`deferred`. It is computed before one of
        ``operands`` is modified in place by a function on this class; other modifications raise.
        """
        x = cls(norm.x, mask)
        x._blocks, x._pending = None, norm
        x._wait_for(operands)
        return x

    def _wait_for(self, operands: tuple[BlockSparseTensor, ...]) -> None:
        self._operands += operands
        for operand in operands:
            operand._waiting = [ref for ref in operand._waiting if ref() is not None]
            operand._waiting.append(weakref.ref(self))

    @property
    def blocks(self) -> Tensor:
        """Features [V, bd, bh, bw, C]."""
        if self._blocks is None:
            self._finish(1.0)
        assert self._blocks is not None
        return self._blocks

    @property
    def recipe(self) -> Recipe | None:
        """How backward gets the features without keeping them for this, or None."""
        if self._recipe is None or torch.compiler.is_compiling():
            return None
        unchanged = self.blocks._version == self._recipe_version and self._recipe.holds
        return self._recipe if unchanged else None

    def remember(self, recipe: Recipe | None) -> None:
        """How backward gets the features as they are now."""
        self._recipe = recipe
        if recipe is not None:
            self._recipe_version = self.blocks._version

    def remember_statistics(self, mean: Tensor, squares: Tensor, backend: str) -> None:
        """Statistics [N, C] of the features as they are now, from a backend, see :meth:`statistics`."""
        self._statistics = (mean, squares, self.blocks._version, backend)

    def statistics(self, backend: str) -> tuple[Tensor, Tensor] | None:
        """Mean and squared deviations [N, C] that a backend found when it computed the features, if they still are so.

        Args:
            backend: name of the backend that is to find them; None of what another one found.
        """
        if self._statistics is None or torch.compiler.is_compiling():
            return None
        mean, squares, version, name = self._statistics
        return (mean, squares) if name == backend and self.blocks._version == version else None

    def may_fuse(self) -> bool:
        """Whether anything may wait for what is done with these features, see ``PendingNorm.may_wait``."""
        return PendingNorm.may_wait(self._like)

    def deferred(self) -> DeferredNorm | None:
        """The norm and LeakyReLU that these features wait for, for a reader who computes them on the way.

        None if the features are there already, or if backward could not get what the reader saves: it may not wait
        either where hooks on saved tensors are set.
        Raises:
            RuntimeError: what is normalised was modified in place since.
        """
        if self._deferred is None or hooks_are_set():
            return None
        self._deferred.check()
        return self._deferred

    @property
    def _like(self) -> Tensor:
        """A tensor of the shape, dtype and device of the features, without computing them."""
        if self._deferred is not None:
            return self._deferred.raw
        return self.blocks if self._pending is None else self._pending.x

    def _activate(self, slope: float) -> None:
        """Add LeakyReLU to the norm that is waited for; where a convolution could do both, they wait for one."""
        norm = self._pending
        assert norm is not None
        if norm.may_defer(slope):
            self._pending, self._deferred = None, norm.defer(slope)
        else:
            self._finish(slope)

    def _finish(self, slope: float) -> None:
        recipe: Recipe | None
        if self._deferred is not None:
            self._blocks, recipe = self._deferred.compute()
        else:
            assert self._pending is not None
            self._blocks, recipe = self._pending.compute(slope)
        self._pending, self._deferred, self._operands = None, None, ()
        self.remember(recipe)

    def _before_modification(self) -> None:
        """Let results that wait for these features read them, and leave what backward keeps alone."""
        for ref in self._waiting:
            result = ref()
            if result is not None and result._blocks is None:
                result._finish(1.0)
        self._waiting = []
        self._statistics = None
        if isinstance(self._recipe, Kept):
            self._blocks = self.blocks.clone()
        self._recipe = None

    @classmethod
    def from_dense(cls, x: Tensor, mask: BlockMask, backend: str | None = None) -> BlockSparseTensor:
        """Select the visible voxels of a dense tensor.

        Args:
            x: [N, C, D, H, W] in any memory format. Nothing of its masked voxels is read into the result.
            mask: same batch and volume.
            backend: name of a backend; default is the current one, see ``use_backend``.
        Raises:
            ValueError: ``x`` and ``mask`` do not fit, or lie on different devices.
        """
        if x.dim() != 5 or (x.shape[0], *x.shape[2:]) != (mask.batch, *mask.shape):
            raise ValueError(
                f"x must be [N, C, D, H, W] with N={mask.batch} and (D, H, W)={mask.shape} as in mask, "
                f"got shape {tuple(x.shape)}"
            )
        if x.device != mask.device:
            raise ValueError(f"x and mask must be on one device, got {x.device} and {mask.device}")
        return cls(gather_blocks(x, *block_arguments(mask), backend or current_backend()), mask)

    def to_dense(self, fill: float | Tensor = 0.0, backend: str | None = None) -> Tensor:
        """The dense tensor [N, C, D, H, W] in channels-last memory.

        Args:
            fill: value of masked voxels; a number, or a vector [C] such as a mask token (gradients reach it).
            backend: name of a backend; default is the current one.
        Raises:
            ValueError: ``fill`` is a tensor of another shape.
        """
        channels = self.blocks.shape[-1]
        if not isinstance(fill, Tensor):
            fill = self.blocks.new_full((channels,), fill)
        elif fill.shape != (channels,):
            raise ValueError(f"fill must be a number or a vector of {channels} channels, got shape {tuple(fill.shape)}")
        fill = fill.to(self.blocks.dtype)
        dense: Tensor = scatter_blocks(self.blocks, fill, *block_arguments(self.mask), backend or current_backend())
        return dense

    # ---- what other code asks of a tensor

    @property
    def shape(self) -> torch.Size:
        """Shape (N, C, D, H, W) of the dense tensor that this stands for."""
        return torch.Size((self.mask.batch, self._like.shape[-1], *self.mask.shape))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        return 5

    def dim(self) -> int:
        return 5

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def requires_grad(self) -> bool:
        return self.blocks.requires_grad

    def is_floating_point(self) -> bool:
        return self._like.is_floating_point()

    def to(self, *args: Any, **kwargs: Any) -> BlockSparseTensor:
        """As Tensor.to: another dtype or device, for features and mask."""
        blocks = self.blocks.to(*args, **kwargs)
        return BlockSparseTensor(blocks, self.mask.to(blocks.device))

    def detach(self) -> BlockSparseTensor:
        return self.with_blocks(self.blocks.detach())

    def clone(self) -> BlockSparseTensor:
        return self.with_blocks(self.blocks.clone())

    def contiguous(self) -> BlockSparseTensor:
        return self.with_blocks(self.blocks.contiguous())

    def with_blocks(self, blocks: Tensor) -> BlockSparseTensor:
        """Other features [V, bd, bh, bw, C'] under the same mask."""
        return BlockSparseTensor(blocks, self.mask)

    def merge(self, factors: tuple[int, int, int]) -> BlockSparseTensor:
        """The same features in blocks that are ``factors`` times larger along each axis, see ``BlockMask.merge``."""
        if factors == (1, 1, 1):
            return self
        merged, parts = self.mask.merge(factors)
        channels = self.blocks.shape[-1]
        if merged.num_blocks == 0:
            return BlockSparseTensor(self.blocks.new_zeros(0, *merged.block, channels), merged)
        bricks = self.blocks.index_select(0, parts.flatten().clamp(min=0))
        bricks = torch.where((parts.flatten() >= 0)[:, None, None, None, None], bricks, 0)
        bricks = bricks.view(*parts.shape, *self.mask.block, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return BlockSparseTensor(bricks.reshape(merged.num_blocks, *merged.block, channels), merged)

    def split(self, block: int | Sequence[int]) -> BlockSparseTensor:
        """The same features in smaller blocks, see ``BlockMask.split``."""
        fine = self.mask.split(block)
        if fine is self.mask:
            return self
        factors = [b // s for b, s in zip(self.mask.block, fine.block, strict=True)]
        sample, *cell = fine.index.long().unbind(1)
        coarse, inside = zip(*(((at // f), at % f) for at, f in zip(cell, factors, strict=True)), strict=True)
        place = (sample, *coarse)
        rows = self.mask.tables.rows[place].long()
        return BlockSparseTensor(_Split.apply(self.blocks, fine.block, rows, *inside), fine)

    def __repr__(self) -> str:
        return f"BlockSparseTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {self.mask})"

    # ---- arithmetic and elementwise functions

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ACTIVATIONS and (fused := _ACTIVATIONS[func](*args, **kwargs)) is not None:
            return fused
        if func in _ELEMENTWISE:
            return _elementwise(func, args, kwargs)
        if func in _CONCATENATE:
            return _concatenate(*args, **kwargs)
        if func in _CHANNEL_DROPOUT:
            return _channel_dropout(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        raise TypeError(
            f"{name} is not defined for a BlockSparseTensor: it may mix voxels, and masked voxels do not exist. "
            "Elementwise functions, dropout and concatenation along channels (dim=1) work; convolution, normalisation "
            "and pooling are modules of s3d_kernels (to_sparse converts a network); to_dense() gives a dense tensor."
        )

    def __getattr__(self, name: str) -> Any:
        if name in _METHODS:
            function = _METHODS[name]
            return lambda *args, **kwargs: function(self, *args, **kwargs)
        hint = (
            f"; Tensor.{name} may mix voxels or needs a dense tensor: see to_dense()" if hasattr(Tensor, name) else ""
        )
        raise AttributeError(f"BlockSparseTensor has no attribute {name!r}{hint}")

    def __add__(self, other: Any) -> BlockSparseTensor:
        return (
            _fused_addition(self, other)
            or _fused_addition(other, self)
            or _elementwise(operator.add, (self, other), {})
        )

    def __radd__(self, other: Any) -> BlockSparseTensor:
        return _elementwise(operator.add, (other, self), {})

    def __sub__(self, other: Any) -> BlockSparseTensor:
        return _elementwise(operator.sub, (self, other), {})

    def __rsub__(self, other: Any) -> BlockSparseTensor:
        return _elementwise(operator.sub, (other, self), {})

    def __mul__(self, other: Any) -> BlockSparseTensor:
        return _elementwise(operator.mul, (self, other), {})

    def __rmul__(self, other: Any) -> BlockSparseTensor:
        return _elementwise(operator.mul, (other, self), {})

    def __truediv__(self, other: Any) -> BlockSparseTensor:
        return _elementwise(operator.truediv, (self, other), {})

    def __rtruediv__(self, other: Any) -> BlockSparseTensor:
        return _elementwise(operator.truediv, (other, self), {})

    def __pow__(self, other: Any) -> BlockSparseTensor:
        return _elementwise(operator.pow, (self, other), {})

    def __neg__(self) -> BlockSparseTensor:
        return self.with_blocks(-self.blocks)

    # In-place forms return a new wrapper around the same, modified blocks.
    def __iadd__(self, other: Any) -> BlockSparseTensor:  # noqa: PYI034
        fused = _fused_addition(self, other)
        if fused is not None:
            # Other names of this tensor see the sum, as with a dense one.
            self._pending = fused._pending
            self._wait_for((other,))
            return self
        return _elementwise(operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> BlockSparseTensor:  # noqa: PYI034
        return _elementwise(operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> BlockSparseTensor:  # noqa: PYI034
        return _elementwise(operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> BlockSparseTensor:  # noqa: PYI034
        return _elementwise(operator.itruediv, (self, other), {})


_FUNCTION_NAMES = (
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_", "celu", "celu_", "gelu",
    "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "hardtanh_", "softplus", "softsign", "softshrink",
    "hardshrink", "tanhshrink", "threshold", "threshold_", "logsigmoid",
    "tanh", "sigmoid", "dropout", "dropout_", "alpha_dropout",
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "neg", "negative", "abs", "absolute",
    "exp", "expm1", "log", "log1p", "log2", "sqrt", "rsqrt", "square", "pow", "reciprocal", "sign", "sin", "cos", "erf",
    "clamp", "clamp_", "clip", "minimum", "maximum", "lerp", "addcmul", "addcdiv", "where", "isnan", "isfinite",
    "nan_to_num", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
)  # fmt: skip
_ELEMENTWISE: frozenset[Callable[..., Any]] = frozenset(
    function
    for module in (torch, F, torch.Tensor)
    for name in _FUNCTION_NAMES
    if (function := getattr(module, name, None)) is not None
)
_IN_PLACE: frozenset[Callable[..., Any]] = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv}
    | {function for function in _ELEMENTWISE if function.__name__.endswith("_")}
)
_CONCATENATE = frozenset({torch.cat, torch.concat, torch.concatenate})
_CHANNEL_DROPOUT = frozenset({F.dropout3d, torch.feature_dropout})
# x.relu(), x.add(y) ...: only those that torch has as methods too.
_METHODS: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name)
    for name in _FUNCTION_NAMES
    if hasattr(torch, name) and hasattr(Tensor, name) and not name.endswith("_like")
}


class _Split(torch.autograd.Function):
    """Parts of blocks [V, bd, bh, bw, C] as rows of their own [V', sd, sh, sw, C]."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, part: tuple[int, int, int], *places: Tensor) -> Tensor:
        ctx.shape, ctx.part = blocks.shape, part
        ctx.save_for_backward(*places)
        return parts_of(blocks, part)[places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Parts without a visible voxel have no row.
        complete = grad.shape[:-1].numel() == ctx.shape[:-1].numel()
        grad_blocks = grad.new_empty(ctx.shape) if complete else grad.new_zeros(ctx.shape)
        parts_of(grad_blocks, ctx.part)[ctx.saved_tensors] = grad
        return grad_blocks, *(None,) * (1 + len(ctx.saved_tensors))


def parts_of(volumes: Tensor, part: tuple[int, int, int]) -> Tensor:
    """A view of volumes [N, D, H, W, C] as [N, Gd, Gh, Gw, *part, C]."""
    n, d, h, w, channels = volumes.shape
    pd, ph, pw = part
    cut = volumes.view(n, d // pd, pd, h // ph, ph, w // pw, pw, channels)
    return cut.permute(0, 1, 3, 5, 2, 4, 6, 7)


def block_arguments(mask: BlockMask) -> tuple[Tensor, Tensor | None, Tensor, list[int]]:
    """What ``gather_blocks`` and ``scatter_blocks`` take between their operands and the backend."""
    geometry = block_geometry(mask)
    return geometry.index, geometry.voxels, geometry.sample_offsets, geometry.sizes()


def block_geometry(mask: BlockMask) -> BlockGeometry:
    """What operators need to know of a mask."""
    return BlockGeometry(mask.index, mask.voxels, mask.sample_offsets, mask.batch, mask.shape, mask.block)


def _fused_addition(x: Any, other: Any) -> BlockSparseTensor | None:
    """x + other as one more part of the normalisation that x waits for, or None if it does not."""
    if not isinstance(x, BlockSparseTensor) or not isinstance(other, BlockSparseTensor) or x._pending is None:
        return None
    if not x.mask.same_layout(other.mask):
        return None
    residual = other.blocks  # which finishes x, if both are the same
    norm = None if x._pending is None else x._pending.plus(residual, other.recipe)
    return None if norm is None else BlockSparseTensor.of_norm(norm, x.mask, other, *x._operands)


def _fused_leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> BlockSparseTensor | None:
    """LeakyReLU as one more part of the normalisation that the input waits for, or None if it does not."""
    x = input
    if not isinstance(x, BlockSparseTensor) or x._pending is None or negative_slope < 0:
        return None
    if x._pending.grad_mode != torch.is_grad_enabled():
        return None
    result = x if inplace else BlockSparseTensor.of_norm(x._pending, x.mask, *x._operands)
    result._activate(negative_slope)
    return result


def _fused_relu(input: Any, inplace: bool = False) -> BlockSparseTensor | None:
    return _fused_leaky_relu(input, 0.0, inplace)


_ACTIVATIONS: dict[Callable[..., Any], Callable[..., BlockSparseTensor | None]] = {
    F.leaky_relu: _fused_leaky_relu,
    F.relu: _fused_relu,
    torch.relu: _fused_relu,
}


def _elementwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockSparseTensor:
    """Apply to the blocks; other tensors must be numbers or per-channel."""
    masks = [a.mask for a in (*args, *kwargs.values()) if isinstance(a, BlockSparseTensor)]
    mask = masks[0]
    for other in masks[1:]:
        if not mask.same_layout(other):
            raise ValueError(
                f"operands must have the same mask (the same object, or derived from it by the same layers), "
                f"got {mask} and {other}"
            )
    operands = [*args, *kwargs.values()]
    if _modifies(func, kwargs) and isinstance(operands[0], BlockSparseTensor):
        operands[0]._before_modification()
    # Per-channel operands meet every stored voxel: their gradients would sum over masked ones too.
    broadcast = any(isinstance(o, Tensor) and o.dim() > 0 for o in operands)
    cut = mask.voxels[..., None] if broadcast and mask.voxels is not None else None
    channels = next(o.blocks.shape[-1] for o in operands if isinstance(o, BlockSparseTensor))
    result = func(
        *(_as_blocks(a, mask, channels, cut) for a in args),
        **{name: _as_blocks(a, mask, channels, cut) for name, a in kwargs.items()},
    )
    return BlockSparseTensor(result, mask)


def _modifies(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function writes to its first operand. Nothing waits or is kept in a compiled graph."""
    return not torch.compiler.is_compiling() and (func in _IN_PLACE or bool(kwargs.get("inplace")))


def _as_blocks(value: Any, mask: BlockMask, channels: int, cut: Tensor | None) -> Any:
    """An operand in the layout of blocks: [N or 1, C or 1, 1, 1, 1] and [C, 1, 1, 1] become channels-last.

    With `cut`, the visible voxels [V, bd, bh, bw, 1] of partly visible blocks, nothing of a masked voxel passes to the
    gradient of a dense operand: sparse operands are zero there, and dense ones have no gradient there.
    """
    if isinstance(value, BlockSparseTensor):
        return value.blocks if cut is None else torch.where(cut, value.blocks, 0)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.dim() in (4, 5) and value.shape[-3:] == (1, 1, 1):
        rows = value[..., 0, 0, 0].reshape(-1, value.shape[-4])  # [1 or N, C or 1]
        if rows.shape[1] in (1, channels) and rows.shape[0] in (1, mask.batch):
            dense = rows[0] if rows.shape[0] == 1 else rows[mask.index[:, 0].long()][:, None, None, None]
            return dense if cut is None else torch.where(cut, dense, dense.detach())
    raise ValueError(
        "a dense operand beside a BlockSparseTensor must be a number or have shape [C, 1, 1, 1], [1, C, 1, 1, 1] or "
        f"[N, C, 1, 1, 1] with N={mask.batch} and C={channels} (or 1), got {tuple(value.shape)}; "
        "use BlockSparseTensor.from_dense for features"
    )


def _concatenate(tensors: Sequence[Any], dim: int = 0) -> BlockSparseTensor:
    first = tensors[0]
    for other in tensors:
        if not isinstance(other, BlockSparseTensor) or not first.mask.same_layout(other.mask):
            raise ValueError(f"torch.cat needs BlockSparseTensors with the same mask, got {list(tensors)}")
    if dim not in (1, -4):
        raise ValueError(f"a BlockSparseTensor can be concatenated along channels (dim=1) only, got dim={dim}")
    return BlockSparseTensor(torch.cat([t.blocks for t in tensors], dim=-1), first.mask)


def _channel_dropout(
    x: BlockSparseTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> BlockSparseTensor:
    """Zero whole channels of a sample with probability p, as torch.nn.functional.dropout3d."""
    if not training or p == 0:
        return x
    keep = F.dropout3d(x.blocks.new_ones(x.mask.batch, x.blocks.shape[-1], 1, 1, 1), p)
    return _elementwise(operator.mul, (x, keep), {})
