"""Backend "spconv": convolutions by the package spconv (https://github.com/traveller59/spconv), its raw operations.

spconv knows points and not blocks: features are rows [P, C], one a visible voxel, and a convolution is a list of pairs
(input row, output row) for each tap. Its own lists let the visible set grow where a stride or a kernel reaches into
masked voxels; here the lists are made from the geometry of the operator, so that the output set is the mask's, and
with them spconv does the arithmetic: for each tap gather the rows, multiply by the tap's matrix, add to the outputs.

    forward          indice_conv; on a GPU implicit_gemm, from the same lists, for up to 32 taps
    grad of input    the same on the lists read the other way round, with the transposed weight
    grad of weight   indice_conv_backward, which computes the gradient of the input too; that one is dropped

Lists are made once for a mask and a window and die with the mask. What spconv does not have (norms, pooling, gathering
and scattering of blocks) is computed as backend "torch" does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import stacked_phases
from .first_use import FirstUseChecks
from .interface import ConvProblem, Problem, Triple, UpconvProblem, WindowGeometry
from .torch_gather import TorchGatherBackend

# On a CPU spconv multiplies float16 in numpy and rounds behind every tap; it has no bfloat16, and no float64 on GPUs.
DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32, torch.float16)}

# implicit_gemm says with the bits of one word which taps an output has.
IMPLICIT_GEMM_TAPS = 32

_INSTALL = "pip install 's3d[spconv]' or pip install spconv-cu120"


# ---- the package


def _import_ops() -> Any:
    """The module with spconv's raw operations.

    Raises:
        Exception: of any kind; spconv loads compiled libraries and generates code when it is imported.
    """
    with warnings.catch_warnings():
        # Of spconv 2.3.6 and what it imports.
        warnings.filterwarnings("ignore", r"`torch\.cuda\.amp\.custom_(fwd|bwd)", FutureWarning)
        warnings.filterwarnings("ignore", r"'?locale\.getdefaultlocale", DeprecationWarning)
        return importlib.import_module("spconv.pytorch.ops")


@functools.cache
def _missing() -> str | None:
    """Why the package cannot be used, in one sentence."""
    try:
        if importlib.util.find_spec("spconv") is None:
            if sys.version_info >= (3, 12):
                return (
                    "the package spconv is not installed, and spconv-cu120 is built for Python before 3.12 only "
                    f"(this is {_python()}); there: {_INSTALL}"
                )
            return f"the package spconv is not installed: {_INSTALL}"
        _import_ops()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return (
            f"{_installed()} cannot be imported by Python {_python()} with {_versions()}: "
            f"{type(error).__name__}: {first}; for a build that fits: {_INSTALL}"
        )
    return None


def _python() -> str:
    return ".".join(map(str, sys.version_info[:2]))


def _installed() -> str:
    names = importlib.metadata.packages_distributions().get("spconv", [])
    return " and ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names))) or "spconv"


def _versions() -> str:
    return f"torch {torch.__version__}, CUDA {torch.version.cuda} and NumPy {np.__version__}"


# ---- pairs of rows


@dataclass(frozen=True)
class VisibleRows:
    """The visible voxels of a block set as rows, in the order in which they lie in the blocks."""

    blocks: int  # V
    block: Triple
    place: Tensor | None  # [P] int64, the voxel of each row among V * voxels of a block; None: all are visible

    @classmethod
    def of(cls, index: Tensor, voxels: Tensor | None, block: Triple, shape: Triple) -> VisibleRows:
        """Of blocks [V, 4] with voxel mask [V, *block]; voxels outside of the volume are not visible."""
        visible = voxels
        for axis in range(3):
            if shape[axis] % block[axis] == 0:
                continue  # no block reaches beyond the volume
            local = torch.arange(block[axis], device=index.device)
            inside = index[:, axis + 1, None] * block[axis] + local < shape[axis]  # [V, b]
            inside = inside.view(len(index), *[-1 if a == axis else 1 for a in range(3)])
            visible = inside.expand(-1, *block) if visible is None else visible & inside
        return cls(len(index), block, None if visible is None else visible.reshape(-1).nonzero()[:, 0])

    def __len__(self) -> int:
        return self.blocks * math.prod(self.block) if self.place is None else len(self.place)

    def select(self, x: Tensor) -> Tensor:
        """[V, *block, C] -> [P, C], without a copy where all voxels are visible."""
        rows = x.reshape(-1, x.shape[-1])
        return rows.contiguous() if self.place is None else rows.index_select(0, self.place)

    def put(self, rows: Tensor) -> Tensor:
        """[P, C] -> [V, *block, C], zeros at masked voxels."""
        channels = rows.shape[-1]
        if self.place is not None:
            rows = rows.new_zeros(self.blocks * math.prod(self.block), channels).index_copy_(0, self.place, rows)
        return rows.view(self.blocks, *self.block, channels)

    def numbers(self, device: torch.device) -> Tensor | None:
        """[V * voxels] int64: the row of each voxel, -1 where masked; None: they are numbered as they lie."""
        if self.place is None:
            return None
        numbers = torch.full((self.blocks * math.prod(self.block),), -1, dtype=torch.int64, device=device)
        numbers[self.place] = torch.arange(len(self.place), device=device)
        return numbers


@dataclass(frozen=True)
class PairLists:
    """All pairs of visible input and output voxels of a window, tap by tap, as spconv wants them."""

    pairs: Tensor  # [2, taps, most] int32: input rows, output rows; -1 behind the pairs of a tap
    counts: Tensor  # [taps] int32, on the CPU: spconv reads it there and would wait for a GPU
    source: VisibleRows
    target: VisibleRows

    @property
    def empty(self) -> bool:
        return self.pairs.shape[2] == 0

    @functools.cached_property
    def to_target(self) -> GemmTables:
        return GemmTables.of(self.pairs[0], self.pairs[1], len(self.target))

    @functools.cached_property
    def to_source(self) -> GemmTables:
        return GemmTables.of(self.pairs[1], self.pairs[0], len(self.source))


@dataclass(frozen=True)
class GemmTables:
    """The same pairs by their results, as implicit_gemm wants them."""

    inputs: Tensor  # [taps, P] int32: the input row of each output row, -1 where there is none
    masks: Tensor  # [P, 1] int32, sorted: bit t says whether there is one for tap t
    order: Tensor  # [P] int32: the output row that each mask belongs to

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor, rows: int) -> GemmTables:
        """From lists [taps, most], -1 behind the pairs of a tap. A row is in one pair of a tap at most."""
        taps = len(inputs)
        table = inputs.new_full((taps, rows + 1), -1)  # the last row takes what stands behind the pairs
        table.scatter_(1, torch.where(outputs < 0, rows, outputs).long(), inputs)
        table = table[:, :rows].contiguous()
        bits = torch.arange(taps, device=table.device)[:, None]
        masks, order = ((table >= 0).long() << bits).sum(0).sort()
        signed = torch.where(masks >= 1 << 31, masks - (1 << 32), masks)
        return cls(table, signed.int()[:, None], order.int())


def make_lists(geometry: WindowGeometry) -> PairLists:
    """The lists of a window. Not to be kept longer than the mask: see :class:`ListsOfMasks`."""
    g = geometry
    device = g.table.device
    source = VisibleRows.of(g.source_index, g.source_voxels, g.source_block, g.shape)
    target = VisibleRows.of(g.target_index, g.target_voxels, g.target_block, g.target_shape)
    numbers = source.numbers(device)
    voxels = math.prod(g.source_block)
    # The first voxel of each neighbour; so far below zero where there is none that its other voxels are, too.
    first = torch.where(g.table >= 0, g.table.long() * voxels, -voxels)  # [Vo, T]
    taps: list[tuple[Tensor, Tensor]] = []
    for tap in itertools.product(*map(range, g.kernel_size)):
        column, local = _reached(g, tap)
        position = (first.index_select(1, column) + local).view(-1)  # [Vo * voxels of target_block]
        if target.place is not None:
            position = position[target.place]
        outputs = (position >= 0).nonzero()[:, 0]
        inputs = position[outputs]
        if numbers is not None:
            inputs = numbers[inputs]
            shown = inputs >= 0
            inputs, outputs = inputs[shown], outputs[shown]
        taps.append((inputs, outputs))
    counts = [len(inputs) for inputs, _ in taps]
    pairs = torch.full((2, len(taps), max(counts)), -1, dtype=torch.int32, device=device)
    for tap_index, (inputs, outputs) in enumerate(taps):
        pairs[0, tap_index, : len(inputs)] = inputs
        pairs[1, tap_index, : len(outputs)] = outputs
    return PairLists(pairs, torch.tensor(counts, dtype=torch.int32, device="cpu"), source, target)


def _reached(geometry: WindowGeometry, tap: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where the voxels of an output block find the input of a tap.

    Returns: for each voxel of target_block the column of the neighbour in the table, and its voxel in source_block.
    """
    column = local = torch.zeros(1, dtype=torch.int64, device=geometry.table.device)
    for axis in range(3):
        side = geometry.source_block[axis]
        outputs = torch.arange(geometry.target_block[axis], device=column.device)
        coordinate = outputs * geometry.stride[axis] - geometry.padding[axis] + tap[axis]
        neighbour = torch.div(coordinate, side, rounding_mode="floor")
        width = 2 * geometry.radius[axis] + 1
        column = (column[:, None] * width + neighbour + geometry.radius[axis]).view(-1)
        local = (local[:, None] * side + coordinate - neighbour * side).view(-1)
    return column, local


def _is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is captured, which forbids to wait for the lengths of lists."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class ListsOfMasks:
    """Lists that were made, by the tensors of the mask and the numbers of the window.

    Tensors are compared as objects, which they are to the operators of forward and backward, and are held weakly: with
    the first of them that dies the lists die. So no list can meet another mask whose tensors lie in the same memory.
    """

    def __init__(self, make: Callable[[WindowGeometry], PairLists]) -> None:
        self._make = make
        self._root = WeakTensorKeyDictionary()

    def get(self, geometry: WindowGeometry) -> PairLists:
        """The lists of a window; makes them if nobody did.

        Raises:
            RuntimeError: there are none and a CUDA graph is captured.
        """
        g = geometry
        # The table is left out: it follows from the others, and for large windows it is made anew for each call.
        # An index stands where there is no voxel mask, so that something does.
        voxels = [
            i if v is None else v for i, v in ((g.source_index, g.source_voxels), (g.target_index, g.target_voxels))
        ]
        node: Any = self._root
        for tensor in (g.source_index, g.target_index, voxels[0]):
            node = node.setdefault(tensor, WeakTensorKeyDictionary())
        windows = node.setdefault(voxels[1], {})
        sizes = tuple(g.sizes())
        if sizes not in windows:
            if _is_captured(g.table.device):
                raise RuntimeError(
                    "lists of pairs cannot be made while a CUDA graph is captured: run the step once before, "
                    "with the same masks"
                )
            windows[sizes] = self._make(g)
        lists: PairLists = windows[sizes]
        return lists


# ---- the backend


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """spconv launches on the current device, so that of the tensors has to be it."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


class SpconvBackend(TorchGatherBackend):
    """Convolutions by spconv, everything else by torch."""

    name = "spconv"

    def __init__(self) -> None:
        self._lists = ListsOfMasks(lambda geometry: make_lists(geometry))
        self._checks = FirstUseChecks(self, "spconv")

    def why_not(self, problem: Problem) -> str | None:
        if problem.device not in DTYPES:
            return f"spconv is for {' and '.join(DTYPES)} tensors, not {problem.device}"
        if problem.dtype not in DTYPES[problem.device]:
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[problem.device])
            return f"on {problem.device} it computes {names}, not {problem.dtype}"
        if isinstance(problem, ConvProblem) and problem.groups != 1:
            return f"spconv has no groups, and {problem.groups} are asked for"
        if isinstance(problem, ConvProblem | UpconvProblem) and min(problem.in_channels, problem.out_channels) < 1:
            return "it needs at least one channel"
        reason = _missing()
        if reason is not None or problem.device != "cuda":
            return reason
        if torch.version.hip is not None or _import_ops().CPU_ONLY_BUILD:
            return "this build of spconv has no kernels for this GPU"
        return self._checks.reason(problem) if isinstance(problem, ConvProblem | UpconvProblem) else None

    def conv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: WindowGeometry, groups: int) -> Tensor:
        with _on_device_of(x):
            lists = self._lists.get(geometry)
            y = _convolve(lists.source.select(x), weight.permute(0, 2, 3, 4, 1), lists, inverse=False)
            if bias is not None:
                y += bias
            return lists.target.put(y)

    def conv3d_grad_input(self, grad: Tensor, weight: Tensor, geometry: WindowGeometry, groups: int) -> Tensor:
        with _on_device_of(grad):
            lists = self._lists.get(geometry)
            rows = _convolve(lists.target.select(grad), weight.permute(1, 2, 3, 4, 0), lists, inverse=True)
            return lists.source.put(rows)

    def conv3d_grad_weight(
        self, grad: Tensor, x: Tensor, geometry: WindowGeometry, groups: int
    ) -> tuple[Tensor, Tensor]:
        with _on_device_of(x):
            lists = self._lists.get(geometry)
            grad_rows, rows = lists.target.select(grad), lists.source.select(x)
            # Zeros for the weight, of which only the gradient of the input depends.
            grad_weight = rows.new_zeros(grad.shape[-1], *geometry.kernel_size, x.shape[-1])
            if not lists.empty:
                _, grad_weight = _import_ops().indice_conv_backward(
                    rows, grad_weight, grad_rows, lists.pairs, lists.counts
                )
            return grad_weight.permute(0, 4, 1, 2, 3).contiguous(), grad_rows.sum(0)

    # Not inherited: these convolve by spconv, and `auto` measures only what a backend does in its own way.
    def upconv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return stacked_phases.upconv3d(self, x, weight, bias)

    def upconv3d_grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        return stacked_phases.upconv3d_grad_input(self, grad, weight)

    def upconv3d_grad_weight(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return stacked_phases.upconv3d_grad_weight(self, grad, x)


def _convolve(
    rows: Tensor,  # [P, C]
    weight: Tensor,  # [C', kd, kh, kw, C], any strides
    lists: PairLists,
    inverse: bool,  # from output rows to input rows
) -> Tensor:  # [P', C']
    ops, results = _import_ops(), len(lists.source if inverse else lists.target)
    if lists.empty:
        return rows.new_zeros(results, len(weight))
    weight = weight.contiguous()
    y: Tensor
    if rows.is_cuda and len(lists.counts) <= IMPLICIT_GEMM_TAPS:
        y = _implicit_gemm(ops, rows, weight, lists.to_source if inverse else lists.to_target)
    else:
        y = ops.indice_conv(rows, weight, lists.pairs, lists.counts, results, inverse)
    return y


def _implicit_gemm(ops: Any, rows: Tensor, weight: Tensor, tables: GemmTables) -> Tensor:
    """spconv's algorithm MaskImplicitGemm without splits, never run on a GPU so far."""
    y: Tensor
    y, _, _ = ops.implicit_gemm(
        rows,
        weight,
        tables.inputs,
        [tables.masks],
        [tables.order],
        len(tables.order),
        [np.array([0xFFFFFFFF], dtype=np.uint32)],  # all taps are in the one split
        is_train=False,  # that would be for spconv's own gradient of the weight
        is_subm=False,  # that is for lists of its own
        fp32_accum=True,
    )
    return y
