"""Backend "native": compiled kernels that compute pairs of visible voxels only, without a halo copy.

For CPU tensors C++ (`csrc/cpu`), which picks the best instruction set of the processor when it is loaded. float32 and
float64 are computed as they are; bfloat16 and float16 are read and written by the kernels themselves, computed in
float32 and rounded once.

For CUDA tensors CUDA C++ (`csrc/cuda`), for compute capability 8.0 and later. bfloat16 and float16 are multiplied on
tensor cores, and so is float32 (as TF32) where torch allows that for convolutions (`torch.backends.cudnn.allow_tf32`
or `torch.backends.cudnn.conv.fp32_precision`); sums are float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import stacked_phases
from .first_use import FirstUseChecks
from .interface import BlockGeometry, ConvProblem, PoolKind, Problem, UpconvProblem, WindowGeometry
from .native_library import PACKAGE, NativeLibrary


def _say_if_without_threads(library: Any) -> None:
    if not bool(library.has_threads()):
        warnings.warn("the native CPU kernels were built without OpenMP and use one thread", stacklevel=2)


def _too_old() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    import tvm_ffi  # noqa: F401  gives torch the interface where it is older

    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return f"torch {torch.__version__} has no DLPack exchange API, through which kernels get memory"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"its kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


CPU = NativeLibrary(
    name="CPU",
    path=PACKAGE / "libs3d_cpu.so",
    folders=("cpu", "include"),
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    setting=torch.get_num_threads,
    missing="no C++ compiler, or S3D_NATIVE=0, at installation",
    on_load=_say_if_without_threads,
    upconvolves=True,
)

CUDA = NativeLibrary(
    name="CUDA",
    path=PACKAGE / "libs3d_cuda.so",
    folders=("cuda", "include"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    # The attribute that both of torch's ways to set it change; the older one cannot be read after the newer one is set.
    setting=lambda: int(torch.backends.cudnn.conv.fp32_precision == "tf32"),  # type: ignore[attr-defined]
    missing="no nvcc, or S3D_CUDA=0, at installation",
    device_reason=_too_old,
    check_first_use=True,
    fuses=True,
)


def instruction_sets() -> list[str]:
    """What the native kernels can use on this processor, best first; the first is used unless another is chosen.

    Raises:
        RuntimeError: the library is not there; says why.
    """
    return [str(name) for name in CPU.functions().instruction_sets()]


def instruction_set() -> str:
    """The one in use.

    Raises:
        RuntimeError: the library is not there; says why.
    """
    return str(CPU.functions().instruction_set())


def use_instruction_set(name: str) -> None:
    """Use one of :func:`instruction_sets`, for the whole process.

    Raises:
        RuntimeError: the library is not there; says why.
        ValueError: the processor has no such set.
    """
    CPU.functions().use_instruction_set(name)


# Convolutions of up to so many channels have a kernel of their own, which fuses nothing.
_STEM_CHANNELS = 4

METHODS = ("auto", "direct", "winograd")


def use_method(name: str) -> None:
    """How convolutions are computed, for the whole process: "auto", "direct", or "winograd" wherever it applies.

    Raises:
        RuntimeError: the library is not there; says why.
        ValueError: no such method.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {name!r}")
    CPU.functions().use_method(METHODS.index(name))


class NativeBackend:
    """The compiled kernels, by the device of the tensors."""

    def __init__(self, name: str = "native", libraries: Mapping[str, NativeLibrary] | None = None) -> None:
        self.name = name
        self._libraries = libraries or {"cpu": CPU, "cuda": CUDA}
        self._first_uses = FirstUseChecks(self, "native")

    def why_not(self, problem: Problem) -> str | None:
        library = self._libraries.get(problem.device)
        if library is None:
            return f"its kernels are for {' and '.join(self._libraries)} tensors, not {problem.device}"
        if problem.dtype not in library.dtypes:
            *others, last = (str(dtype).removeprefix("torch.") for dtype in library.dtypes)
            return f"on {problem.device} it computes {', '.join(others)} and {last}, not {problem.dtype}"
        if isinstance(problem, ConvProblem | UpconvProblem) and min(problem.in_channels, problem.out_channels) < 1:
            return "it needs at least one channel"
        reason = library.why_not()
        if reason is None and library.check_first_use:
            return self._first_uses.reason(problem)
        return reason

    def _call(self, name: str, x: Tensor, *arguments: Any) -> None:
        """Call a function of the library for the device of x, its first argument."""
        library = self._libraries[x.device.type]
        try:
            getattr(library.functions(), name)(x, *arguments, library.setting())
        except (MemoryError, RuntimeError) as error:
            # torch's allocator hands its own error over the ABI as one of these.
            if x.device.type == "cuda" and ("out of memory" in str(error) or isinstance(error, MemoryError)):
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    # ---- convolution

    def conv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: WindowGeometry, groups: int) -> Tensor:
        y = _empty(x, len(geometry.target_index), *geometry.target_block, len(weight))
        self._call("conv3d", _in(x), _in(weight), _maybe(bias), *_window(geometry), groups, y)
        return y

    def fuses(self, problem: ConvProblem) -> bool:
        """As `fuses` of csrc/cuda/bindings.cc, where the limits of conv3d_halo are explained."""
        if not self._libraries[problem.device].fuses:
            return False
        axes = zip(problem.kernel_size, problem.stride, problem.padding, problem.block, strict=True)
        halo = all(k in (1, 3) and s == 1 and p == k // 2 and b % 4 == 0 for k, s, p, b in axes)
        stem = problem.groups == 1 and problem.in_channels <= _STEM_CHANNELS
        depthwise = problem.groups == problem.in_channels == problem.out_channels
        return halo and problem.kernel_size != (1, 1, 1) and not stem and not depthwise

    def conv3d_fused(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        affine: tuple[Tensor, Tensor, Tensor] | None,
        slope: float,
        geometry: WindowGeometry,
        sample_offsets: Tensor,
        groups: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = _empty(x, len(geometry.target_index), *geometry.target_block, len(weight))
        mean, squares = (torch.empty(geometry.batch, len(weight), device=x.device) for _ in range(2))
        tables = (None, None, None) if affine is None else tuple(_in(table) for table in affine)
        source, target, table, sizes = _window(geometry)
        window = (source, target, table, sizes, sample_offsets)
        self._call("conv3d_fused", _in(x), _in(weight), _maybe(bias), *tables, slope, *window, groups, y, mean, squares)
        return y, mean, squares

    def conv3d_grad_input(self, grad: Tensor, weight: Tensor, geometry: WindowGeometry, groups: int) -> Tensor:
        rows = len(geometry.source_index)
        grad_x = _empty(grad, rows, *geometry.source_block, weight.shape[1] * groups)
        self._call("conv3d_grad_input", _in(grad), _in(weight), *_window(geometry), groups, grad_x)
        return grad_x

    def conv3d_grad_weight(
        self, grad: Tensor, x: Tensor, geometry: WindowGeometry, groups: int
    ) -> tuple[Tensor, Tensor]:
        grad_weight = _empty(x, grad.shape[-1], x.shape[-1] // groups, *geometry.kernel_size)
        grad_bias = _empty(x, grad.shape[-1])
        self._call("conv3d_grad_weight", _in(grad), _in(x), *_window(geometry), groups, grad_weight, grad_bias)
        return grad_weight, grad_bias

    # ---- up-convolution

    def upconv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._libraries[x.device.type].upconvolves:
            return stacked_phases.upconv3d(self, x, weight, bias)
        batch, *sizes, _ = x.shape
        y = _empty(x, batch, *(2 * size for size in sizes), weight.shape[3])
        self._call("upconv3d", _in(x), _in(weight), _maybe(bias), y)
        return y

    def upconv3d_grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        if not self._libraries[grad.device.type].upconvolves:
            return stacked_phases.upconv3d_grad_input(self, grad, weight)
        batch, *sizes, _ = grad.shape
        grad_x = _empty(grad, batch, *(size // 2 for size in sizes), weight.shape[4])
        self._call("upconv3d_grad_input", _in(grad), _in(weight), grad_x)
        return grad_x

    def upconv3d_grad_weight(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self._libraries[grad.device.type].upconvolves:
            return stacked_phases.upconv3d_grad_weight(self, grad, x)
        grad_weight = _empty(x, 2, 2, 2, grad.shape[-1], x.shape[-1], 2, 2, 2)
        grad_bias = _empty(x, grad.shape[-1])
        self._call("upconv3d_grad_weight", _in(grad), _in(x), grad_weight, grad_bias)
        return grad_weight, grad_bias

    # ---- pooling

    def pool3d(self, x: Tensor, geometry: WindowGeometry, kind: PoolKind, divisor: int) -> Tensor:
        y = _empty(x, len(geometry.target_index), *geometry.target_block, x.shape[-1])
        self._call("pool3d", _in(x), *_placed_window(geometry), kind == "max", divisor, y)
        return y

    def pool3d_grad(
        self, grad: Tensor, x: Tensor | None, geometry: WindowGeometry, kind: PoolKind, divisor: int
    ) -> Tensor:
        grad_x = _empty(grad, len(geometry.source_index), *geometry.source_block, grad.shape[-1])
        values = _maybe(x) if kind == "max" else None
        self._call("pool3d_grad", _in(grad), values, *_placed_window(geometry), divisor, grad_x)
        return grad_x

    # ---- normalisation

    def norm_statistics(self, x: Tensor, geometry: BlockGeometry) -> tuple[Tensor, Tensor]:
        table = (geometry.batch, x.shape[-1])
        mean, squares = (torch.empty(table, dtype=_table_dtype(x), device=x.device) for _ in range(2))
        self._call("norm_statistics", _in(x), *_rows(geometry), mean, squares)
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
        self._call("norm_apply", _in(x), *tables, _maybe(residual), slope, *_rows(geometry), y)
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
        self._call(
            "norm_grad_sums",
            _in(grad),
            _in(x),
            _maybe(y),
            *tables,
            slope,
            *_rows(geometry),
            before,
            of_grad,
            of_product,
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
        self._call("norm_grad_input", _in(grad), _in(x), *tables, *_rows(geometry), grad_x)
        return grad_x

    # ---- dense <-> blocks

    def gather_blocks(self, dense: Tensor, geometry: BlockGeometry) -> Tensor:
        blocks = _empty(dense, len(geometry.index), *geometry.block, dense.shape[1])
        index, voxels = geometry.index, _flags(geometry.voxels)
        self._call("gather_blocks", dense.detach(), index, voxels, blocks)
        return blocks

    def scatter_blocks(self, blocks: Tensor, fill: Tensor, geometry: BlockGeometry) -> Tensor:
        dense = _empty(blocks, geometry.batch, *geometry.shape, blocks.shape[-1])
        index, voxels = geometry.index, _flags(geometry.voxels)
        self._call("scatter_blocks", _in(blocks), _in(fill), index, voxels, dense)
        return dense.permute(0, 4, 1, 2, 3)


def _table_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _in(x: Tensor) -> Tensor:
    """An argument as the library takes it: contiguous, apart from autograd."""
    return (x.detach() if x.requires_grad else x).contiguous()


def _maybe(x: Tensor | None) -> Tensor | None:
    return None if x is None else _in(x)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


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
