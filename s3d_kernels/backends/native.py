"""Backend "native" for CPU tensors: C++ kernels that compute pairs of visible voxels only, without a halo copy.

The library is built with the package (`csrc/cpu`) and found beside it. It picks the best instruction set of the
processor when it is loaded. float32 and float64 are computed as they are; bfloat16 and float16 are read and written by
the kernels themselves, computed in float32 and rounded once.
"""

from __future__ import annotations

import hashlib
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .interface import BlockGeometry, ConvProblem, PoolKind, Problem, WindowGeometry

LIBRARY = Path(__file__).parent.parent / "libs3d_cpu.so"


SOURCES = Path(__file__).parents[2] / "csrc"  # beside an editable installation only


@cache
def _load() -> tuple[Any, str | None]:
    """The library, or None and the reason why there is none."""
    if not LIBRARY.exists():
        return None, "the native CPU library was not built: no C++ compiler, or S3D_NATIVE=0, at installation"
    try:
        import tvm_ffi

        library = tvm_ffi.load_module(str(LIBRARY))
        sources, threads = str(library.sources()), bool(library.has_threads())
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = f"the native CPU library cannot be loaded: {str(error).splitlines()[0]}"
        warnings.warn(f"{reason}; the slower torch backend computes", stacklevel=2)
        return None, reason
    if SOURCES.is_dir() and sources != _hash_of_sources():
        reason = "the native CPU library was built from other sources than those in csrc: install again"
        warnings.warn(f"{reason}; the slower torch backend computes", stacklevel=2)
        return None, reason
    if not threads:
        warnings.warn("the native CPU kernels were built without OpenMP and use one thread", stacklevel=2)
    return library, None


def _hash_of_sources() -> str:
    """As in setup.py."""
    digest = hashlib.sha256()
    for folder in ("cpu", "include"):
        for path in sorted(p for p in (SOURCES / folder).rglob("*") if p.suffix in (".h", ".inl", ".cc")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def instruction_sets() -> list[str]:
    """What the native kernels can use on this processor, best first; the first is used unless another is chosen.

    Raises:
        RuntimeError: the library is not there; says why.
    """
    return [str(name) for name in _library().instruction_sets()]


def instruction_set() -> str:
    """The one in use.

    Raises:
        RuntimeError: the library is not there; says why.
    """
    return str(_library().instruction_set())


def use_instruction_set(name: str) -> None:
    """Use one of :func:`instruction_sets`, for the whole process.

    Raises:
        RuntimeError: the library is not there; says why.
        ValueError: the processor has no such set.
    """
    _library().use_instruction_set(name)


METHODS = ("auto", "direct", "winograd")


def use_method(name: str) -> None:
    """How convolutions are computed, for the whole process: "auto", "direct", or "winograd" wherever it applies.

    Raises:
        RuntimeError: the library is not there; says why.
        ValueError: no such method.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {name!r}")
    _library().use_method(METHODS.index(name))


def _library() -> Any:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


class NativeBackend:
    """C++ with SIMD and threads, for CPU tensors."""

    name = "native"

    def why_not(self, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return f"its kernels are for CPU tensors, not {problem.device}"
        if problem.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"it computes float32, float64, bfloat16 and float16, not {problem.dtype}"
        if isinstance(problem, ConvProblem) and min(problem.in_channels, problem.out_channels) < 1:
            return "it needs at least one channel"
        return _load()[1]

    # ---- convolution

    def conv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: WindowGeometry, groups: int) -> Tensor:
        y = _empty(x, len(geometry.target_index), *geometry.target_block, len(weight))
        _library().conv3d(_in(x), _in(weight), _maybe(bias), *_window(geometry), groups, y, _threads())
        return y

    def conv3d_grad_input(self, grad: Tensor, weight: Tensor, geometry: WindowGeometry, groups: int) -> Tensor:
        rows = len(geometry.source_index)
        grad_x = _empty(grad, rows, *geometry.source_block, weight.shape[1] * groups)
        _library().conv3d_grad_input(_in(grad), _in(weight), *_window(geometry), groups, grad_x, _threads())
        return grad_x

    def conv3d_grad_weight(
        self, grad: Tensor, x: Tensor, geometry: WindowGeometry, groups: int
    ) -> tuple[Tensor, Tensor]:
        grad_weight = _empty(x, grad.shape[-1], x.shape[-1] // groups, *geometry.kernel_size)
        grad_bias = _empty(x, grad.shape[-1])
        _library().conv3d_grad_weight(_in(grad), _in(x), *_window(geometry), groups, grad_weight, grad_bias, _threads())
        return grad_weight, grad_bias

    # ---- pooling

    def pool3d(self, x: Tensor, geometry: WindowGeometry, kind: PoolKind, divisor: int) -> Tensor:
        y = _empty(x, len(geometry.target_index), *geometry.target_block, x.shape[-1])
        _library().pool3d(_in(x), *_placed_window(geometry), kind == "max", divisor, y, _threads())
        return y

    def pool3d_grad(
        self, grad: Tensor, x: Tensor | None, geometry: WindowGeometry, kind: PoolKind, divisor: int
    ) -> Tensor:
        grad_x = _empty(grad, len(geometry.source_index), *geometry.source_block, grad.shape[-1])
        values = _maybe(x) if kind == "max" else None
        _library().pool3d_grad(_in(grad), values, *_placed_window(geometry), divisor, grad_x, _threads())
        return grad_x

    # ---- normalisation

    def norm_statistics(self, x: Tensor, geometry: BlockGeometry) -> tuple[Tensor, Tensor]:
        table = (geometry.batch, x.shape[-1])
        mean, squares = (torch.empty(table, dtype=_table_dtype(x)) for _ in range(2))
        _library().norm_statistics(_in(x), *_rows(geometry), mean, squares, _threads())
        return mean, squares

    def norm_apply(
        self,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        slope: float,
        geometry: BlockGeometry,
    ) -> Tensor:
        y = _empty(x, *x.shape)
        tables = (_in(mean), _in(scale), _in(shift))
        _library().norm_apply(_in(x), *tables, _maybe(residual), slope, *_rows(geometry), y, _threads())
        return y

    def norm_grad_sums(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, geometry: BlockGeometry
    ) -> tuple[Tensor, Tensor]:
        return self._grad_sums(grad, x, None, mean, rstd, mean, mean, 1.0, geometry)[1:]

    def norm_grad_activation(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        shift: Tensor,
        slope: float,
        geometry: BlockGeometry,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._grad_sums(grad, x, y, mean, rstd, scale, shift, slope, geometry)

    def _grad_sums(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        shift: Tensor,
        slope: float,
        geometry: BlockGeometry,
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_grad, of_product = torch.empty_like(mean), torch.empty_like(mean)
        before = None if slope == 1.0 else _empty(x, *x.shape)
        tables = [_in(table) for table in (mean, rstd, scale, shift)]
        _library().norm_grad_sums(
            _in(grad), _in(x), _maybe(y), *tables, slope, *_rows(geometry), before, of_grad, of_product, _threads()
        )
        return grad if before is None else before, of_grad, of_product

    def norm_grad_input(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor,
        offset: Tensor,
        slope: Tensor,
        geometry: BlockGeometry,
    ) -> Tensor:
        grad_x = _empty(x, *x.shape)
        tables = [_in(table) for table in (mean, rstd, scale, offset, slope)]
        _library().norm_grad_input(_in(grad), _in(x), *tables, *_rows(geometry), grad_x, _threads())
        return grad_x

    # ---- dense <-> blocks

    def gather_blocks(self, dense: Tensor, geometry: BlockGeometry) -> Tensor:
        blocks = _empty(dense, len(geometry.index), *geometry.block, dense.shape[1])
        index, voxels = geometry.index, _flags(geometry.voxels)
        _library().gather_blocks(dense.detach(), index, voxels, blocks, _threads())
        return blocks

    def scatter_blocks(self, blocks: Tensor, fill: Tensor, geometry: BlockGeometry) -> Tensor:
        dense = _empty(blocks, geometry.batch, *geometry.shape, blocks.shape[-1])
        index, voxels = geometry.index, _flags(geometry.voxels)
        _library().scatter_blocks(_in(blocks), _in(fill), index, voxels, dense, _threads())
        return dense.permute(0, 4, 1, 2, 3)


def _table_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _in(x: Tensor) -> Tensor:
    """An argument as the library takes it: contiguous, apart from autograd."""
    return x.detach().contiguous()


def _maybe(x: Tensor | None) -> Tensor | None:
    return None if x is None else _in(x)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype)


def _threads() -> int:
    return torch.get_num_threads()


def _flags(voxels: Tensor | None) -> Tensor | None:
    return None if voxels is None else voxels.contiguous().view(torch.uint8)


def _rows(geometry: BlockGeometry) -> tuple[Tensor | None, Tensor]:
    return _flags(geometry.voxels), geometry.sample_offsets


def _window(geometry: WindowGeometry) -> tuple[Tensor | None, Tensor | None, Tensor, list[int]]:
    tables = (_flags(geometry.source_voxels), _flags(geometry.target_voxels), geometry.table.contiguous())
    return *tables, geometry.sizes()


def _placed_window(geometry: WindowGeometry) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor, list[int]]:
    source, target, table, sizes = _window(geometry)
    return source, geometry.target_index, target, table, sizes
