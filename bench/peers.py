"""Other packages' submanifold 3x3x3 convolution, each behind one adapter, for a benchmark to measure beside ours.

An adapter packs the weight and builds the package's tables once, in `prepare`; what it returns runs the convolution
alone. A package's module is imported only when its adapter prepares, so none of them needs to be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Convolve = Callable[[Tensor], Tensor]
"""Features [P, C_in] to [P, C_out], both in the order of the coordinates; differentiable in features and weight."""


class Prepared(NamedTuple):
    """A convolution that is ready to be timed.

    Attributes:
        convolve: The convolution.
        parameter: The leaf that receives the weight's gradient, in the package's own layout.
    """

    convolve: Convolve
    parameter: nn.Parameter


class PeerPackage(Protocol):
    """A package whose convolution the suite can measure."""

    def why_not(self, device: str) -> str | None:
        """Say in one sentence why the package cannot be measured on `device`; None when it can."""

    def prepare(self, coordinates: Tensor, shape: tuple[int, int, int], batch: int, weight: nn.Parameter) -> Prepared:
        """Pack the weight and build the tables.

        Args:
            coordinates: [P, 4] int32 (sample, d, h, w) of the visible voxels, sorted lexicographically.
            shape: The extents (D, H, W) of the grid.
            batch: The number of samples.
            weight: [C_out, C_in, 3, 3, 3], as `torch.nn.functional.conv3d` takes it.
        """


class _Package:
    """What the adapters share: whether the package is there, and whether it runs on a device."""

    name: ClassVar[str]
    module: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def why_not(self, device: str) -> str | None:
        """Say in one sentence why the package cannot be measured on `device`; None when it can."""
        if find_spec(self.module) is None:
            return f"{self.name} is not installed"
        if device.split(":")[0] not in self.devices:
            return f"its kernels are for {' and '.join(self.devices)} tensors, not {device}"
        try:
            import_module(self.module)
        except Exception as error:  # of any kind: it loads libraries that were built for another torch or CUDA
            return f"{self.name} cannot be imported: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return None


def _channels_last(weight: nn.Parameter) -> nn.Parameter:
    """A copy as [C_out, 3, 3, 3, C_in]."""
    return nn.Parameter(weight.detach().permute(0, 2, 3, 4, 1).contiguous())


def _taps_first(weight: nn.Parameter, *axes: int) -> nn.Parameter:
    """A copy as [27, C_in, C_out], its taps counted over the weight's spatial `axes`, the last of them fastest."""
    return nn.Parameter(weight.detach().permute(*axes, 1, 0).flatten(0, 2).contiguous())


def _blank_features(coordinates: Tensor, weight: nn.Parameter) -> Tensor:
    """Zeros [P, C_in], for the first call, in which most packages build their tables."""
    return weight.new_zeros(len(coordinates), weight.shape[1])


def _split_samples(rows: Tensor, coordinates: Tensor, batch: int) -> list[Tensor]:
    """Split rows that lie in the order of the coordinates into one tensor a sample."""
    return list(rows.split(torch.bincount(coordinates[:, 0].long(), minlength=batch).tolist()))


def _in_our_order(convolve: Convolve, rows: Tensor) -> Convolve:
    """Let a package that sorts its voxels take and return ours.

    Args:
        convolve: The convolution in the package's order.
        rows: For each of the package's voxels, its row in our coordinates.
    """
    if torch.equal(rows, torch.arange(len(rows), device=rows.device)):
        return convolve
    back = torch.argsort(rows)
    return lambda features: convolve(features.index_select(0, rows)).index_select(0, back)


class SpconvTriton(_Package):
    """spconv-triton 1.0."""

    # Taps and order of rows: spconv_triton/pytorch/_impl/pairs.py; the table's reuse: spconv_triton/pytorch/conv.py.

    name = "spconv-triton"
    module = "spconv_triton"

    def prepare(self, coordinates: Tensor, shape: tuple[int, int, int], batch: int, weight: nn.Parameter) -> Prepared:
        """Pack the weight and build the tables."""
        import spconv_triton.pytorch as spconv

        layer: Any = spconv.SubMConv3d(weight.shape[1], weight.shape[0], 3, bias=False, indice_key="subm")
        layer.weight = _channels_last(weight)
        sparse: Any = spconv.SparseConvTensor(_blank_features(coordinates, weight), coordinates, list(shape), batch)
        # The layer leaves its table on its output under the key; a tensor that carries it is not searched again.
        sparse.indice_dict = layer(sparse).indice_dict
        return Prepared(lambda features: layer(sparse.replace_feature(features)).features, layer.weight)


class FlexGEMM(_Package):
    """FlexGEMM's main branch; it has no numbered releases."""

    # Taps, arguments and cache: flex_gemm/ops/spconv/submanifold_conv3d.py.

    name = "FlexGEMM"
    module = "flex_gemm"

    def prepare(self, coordinates: Tensor, shape: tuple[int, int, int], batch: int, weight: nn.Parameter) -> Prepared:
        """Pack the weight and build the tables."""
        from flex_gemm.ops.spconv import sparse_submanifold_conv3d

        parameter = _channels_last(weight)
        # Its backward asks the bias whether it requires a gradient, and so fails on a bias of None.
        bias = weight.new_zeros(weight.shape[0])
        dense_shape = torch.Size((batch, weight.shape[1], *shape))
        coordinates = coordinates.contiguous()

        def run(features: Tensor, cache: Any) -> tuple[Tensor, Any]:
            return sparse_submanifold_conv3d(features, coordinates, dense_shape, parameter, bias, cache)

        # Called with gradients on: without them the cache lacks the tables of the backward pass.
        with torch.enable_grad():
            _, cache = run(_blank_features(coordinates, weight), None)
        return Prepared(lambda features: run(features, cache)[0], parameter)


class WarpConvNet(_Package):
    """WarpConvNet 1.8, with its default algorithms, which it tunes on the first calls."""

    # Taps: warpconvnet/csrc/discrete_kernels.cu; the map's cache: warpconvnet/nn/functional/sparse_conv/helper.py.

    name = "WarpConvNet"
    module = "warpconvnet"

    def prepare(self, coordinates: Tensor, shape: tuple[int, int, int], batch: int, weight: nn.Parameter) -> Prepared:
        """Pack the weight and build the tables."""
        from warpconvnet.geometry.types.voxels import Voxels
        from warpconvnet.nn.modules.sparse_conv import SparseConv3d

        layer: Any = SparseConv3d(weight.shape[1], weight.shape[0], kernel_size=3, bias=False)
        layer.weight = _taps_first(weight, 2, 3, 4)
        voxels: Any = Voxels(
            _split_samples(coordinates[:, 1:].contiguous(), coordinates, batch),
            _split_samples(_blank_features(coordinates, weight), coordinates, batch),
        )
        layer(voxels)  # leaves the kernel map on its input, from where `replace` hands it on
        return Prepared(lambda features: layer(voxels.replace(batched_features=features)).feature_tensor, layer.weight)


class FVDB(_Package):
    """fVDB 0.6, with the default backend of its convolution plan."""

    # Taps and weight: fvdb/utils/tests/convolution_utils.py; plan: fvdb/convolution_plan.py; order: fvdb/grid_batch.py.

    name = "fVDB"
    module = "fvdb"
    devices = ("cpu", "cuda")

    def prepare(self, coordinates: Tensor, shape: tuple[int, int, int], batch: int, weight: nn.Parameter) -> Prepared:
        """Build the tables; the weight is taken as it is."""
        import fvdb

        ijk = fvdb.JaggedTensor(_split_samples(coordinates[:, 1:].contiguous(), coordinates, batch))
        grid: Any = fvdb.GridBatch.from_ijk(ijk)
        plan: Any = fvdb.ConvolutionPlan.from_grid_batch(kernel_size=3, stride=1, source_grid=grid, target_grid=grid)

        def convolve(features: Tensor) -> Tensor:
            return plan.execute(grid.jagged_like(features), weight).jdata

        # A grid numbers its voxels tile by tile. The two gathers are timed: features come and go in our order.
        rows = torch.argsort(grid.ijk_to_index(ijk, cumulative=True).jdata)
        return Prepared(_in_our_order(convolve, rows), weight)


class TorchSparse(_Package):
    """torchsparse 2.1, with its default dataflow."""

    # Taps (d fastest for odd kernels): torchsparse/backend/others/sparsemapping_cuda.cu; cache: .../conv/conv.py.

    name = "torchsparse"
    module = "torchsparse"

    def prepare(self, coordinates: Tensor, shape: tuple[int, int, int], batch: int, weight: nn.Parameter) -> Prepared:
        """Pack the weight and build the tables."""
        import torchsparse
        import torchsparse.nn

        layer: Any = torchsparse.nn.Conv3d(weight.shape[1], weight.shape[0], 3)
        layer.kernel = _taps_first(weight, 4, 3, 2)
        coordinates = coordinates.contiguous()
        first: Any = torchsparse.SparseTensor(_blank_features(coordinates, weight), coordinates)
        layer(first)  # leaves the kernel map in the caches of its input

        def convolve(features: Tensor) -> Tensor:
            sparse: Any = torchsparse.SparseTensor(features, coordinates)
            sparse._caches = first._caches  # as the package does from a layer's input to its output
            return layer(sparse).feats

        return Prepared(convolve, layer.kernel)


class MinkowskiEngine(_Package):
    """MinkowskiEngine 0.5.4; float32 and float64 only."""

    # Taps (d fastest): src/kernel_region.hpp; order of rows: MinkowskiEngine/MinkowskiSparseTensor.py.

    name = "MinkowskiEngine"
    module = "MinkowskiEngine"
    devices = ("cpu", "cuda")

    def prepare(self, coordinates: Tensor, shape: tuple[int, int, int], batch: int, weight: nn.Parameter) -> Prepared:
        """Pack the weight and build the tables."""
        import MinkowskiEngine as engine

        layer: Any = engine.MinkowskiConvolution(weight.shape[1], weight.shape[0], kernel_size=3, dimension=3)
        layer.kernel = _taps_first(weight, 4, 3, 2)
        first: Any = engine.SparseTensor(_blank_features(coordinates, weight), coordinates=coordinates.contiguous())
        layer(first)  # leaves the kernel map in the coordinate manager
        key, manager = first.coordinate_map_key, first.coordinate_manager

        def convolve(features: Tensor) -> Tensor:
            return layer(engine.SparseTensor(features, coordinate_map_key=key, coordinate_manager=manager)).F

        # The map of coordinates may number its voxels in another order than they came in.
        return Prepared(_in_our_order(convolve, first.unique_index), layer.kernel)


PEERS: dict[str, PeerPackage] = {
    package.name: package
    for package in (SpconvTriton(), FlexGEMM(), WarpConvNet(), FVDB(), TorchSparse(), MinkowskiEngine())
}
