"""The Triton convolutions under Triton's interpreter, as one more backend for CPU tensors.

Volumes are small: the interpreter takes as long for an operation on one number as on a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s3d_kernels import BlockMask, BlockSparseTensor, functional, use_backend
from s3d_kernels.backends.triton_kernels import TritonBackend, configs, conv3d, conv3d_grad_weight
from s3d_kernels.backends.triton_kernels.configs import ConvConfig
from s3d_kernels.backends.triton_kernels.window import WindowShape

from .test_emulated_cuda import MASKS, fits
from .test_operators import CASES, Case, Triple, assert_close, expected, run, seeded, tolerances

# Of 5 and 7 taps a side: nothing in the kernels is different but the time.
LARGE = ("conv 5", "conv 7")
CONVOLUTIONS = [c for c in CASES if c.name.startswith("conv")]


def check(
    backend: TritonBackend, case: Case, mask: BlockMask, dtype: torch.dtype, what: str, allowed: float | None = None
) -> None:
    """Compare with the oracle; NaN at masked voxels changes no bit, and neither does another run."""
    truth = expected(case, mask)
    tolerance = tolerances(case, mask, dtype, truth) if allowed is None else [allowed] * len(truth)
    got, again = (run(case, mask, dtype, backend.name, masked) for masked in (float("nan"), 0.0))
    for i, (a, b, c) in enumerate(zip(got, truth, again, strict=True)):
        assert torch.equal(a, c), f"{what}, result {i}: other bits in another run, or from masked voxels"
        assert_close(a, b, dtype, tolerance[i], f"{what}, result {i}")


def conv_case(
    channels: tuple[int, int], kernel: Triple, stride: Triple, padding: Triple, groups: int = 1, bias: bool = True
) -> Case:
    weights = ((channels[1], channels[0] // groups, *kernel), (channels[1],))
    return Case(
        "conv",
        lambda x, w: functional.sparse_conv3d(x, w[0], w[1] if bias else None, stride, padding, groups),
        lambda x, m, w: oracle.conv3d(x, m, w[0], w[1] if bias else None, stride, padding, groups),
        weights if bias else weights[:1],
        channels[0],
    )


@pytest.mark.parametrize("case", [c for c in CONVOLUTIONS if c.name not in LARGE], ids=lambda c: c.name)
def test_few_channels(case: Case, interpreted: TritonBackend) -> None:
    every = ("side 4, unequal", "side 1", "anisotropic", "empty sample", "nothing", "voxels")
    for name in every if case.name in ("conv 3", "conv 3 stride 2") else ("side 2", "voxels"):
        mask = MASKS[name]()
        if fits(case, mask):
            check(interpreted, case, mask, torch.float32, name)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CONVOLUTIONS if c.name in LARGE], ids=lambda c: c.name)
def test_large_kernels(case: Case, interpreted: TritonBackend) -> None:
    for name in ("side 2", "side 1", "voxels"):
        check(interpreted, case, MASKS[name](), torch.float32, name)


# Kernel, stride, padding.
WINDOWS = {
    "3x3x3": ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "1x3x3": ((1, 3, 3), (1, 1, 1), (0, 1, 1)),
    "1x1x3": ((1, 1, 3), (1, 1, 1), (0, 0, 1)),
    "1x1x1": ((1, 1, 1), (1, 1, 1), (0, 0, 0)),
    "3x3x3 stride 2": ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "1x3x3 stride 1x2x2": ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
}


@pytest.mark.parametrize(
    ("window", "name"),
    [
        ("3x3x3", "side 2"),
        ("1x1x3", "side 8"),
        ("1x3x3", "voxels"),
        ("1x1x1", "side 4, unequal"),
        ("3x3x3 stride 2", "side 8"),
        ("1x3x3 stride 1x2x2", "voxels"),
    ],
)
def test_many_channels(window: str, name: str, interpreted: TritonBackend) -> None:
    """No multiple of a tile, more than one of them."""
    check(interpreted, conv_case((33, 40), *WINDOWS[window]), MASKS[name](), torch.float32, name)


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [
        pytest.param((33, 40), torch.bfloat16, marks=pytest.mark.slow),
        ((32, 32), torch.float16),
        ((1, 32), torch.bfloat16),
        ((1, 32), torch.float16),
    ],
    ids=str,
)
def test_half_precision(channels: tuple[int, int], dtype: torch.dtype, interpreted: TritonBackend) -> None:
    check(interpreted, conv_case(channels, *WINDOWS["1x3x3"]), MASKS["side 4, unequal"](), dtype, str(channels))


@pytest.mark.parametrize("channels", [(3, 8), (20, 24), (6, 6)], ids=str)
def test_masked_voxels_of_the_result_are_zero(channels: tuple[int, int], interpreted: TritonBackend) -> None:
    mask = MASKS["voxels"]()
    assert mask.voxels is not None
    x = BlockSparseTensor.from_dense(torch.randn(1, channels[0], *mask.shape, generator=seeded(0)), mask)
    groups = 6 if channels == (6, 6) else 1
    weight = torch.randn(channels[1], channels[0] // groups, 1, 1, 3, generator=seeded(1))
    with use_backend(interpreted.name):
        y = functional.sparse_conv3d(x, weight, torch.ones(channels[1]), 1, (0, 0, 1), groups).blocks
    assert bool((y[~mask.voxels] == 0).all())


def test_groups_of_many_channels(interpreted: TritonBackend) -> None:
    check(interpreted, conv_case((40, 34), *WINDOWS["1x3x3"], groups=2), MASKS["side 2"](), torch.float32, "groups")


@pytest.mark.parametrize("window", ["1x3x3", "1x3x3 stride 1x2x2"])
def test_taps_are_split_where_there_are_few_tiles(
    window: str, interpreted: TritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (conv3d, conv3d_grad_weight):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 12)
    for channels in ((20, 24), (3, 16)):
        check(interpreted, conv_case(channels, *WINDOWS[window]), MASKS["side 2"](), torch.float32, window)


def test_offsets_of_64_bits(interpreted: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (conv3d, conv3d_grad_weight):
        monkeypatch.setattr(module, "is_wide", lambda *tensors: True)
        monkeypatch.setattr(module, "multiprocessors", lambda device: 12)
    for channels in ((20, 24), (3, 16)):
        check(interpreted, conv_case(channels, *WINDOWS["1x3x3"]), MASKS["side 2"](), torch.float32, "wide")


@pytest.mark.slow
def test_other_tiles_give_the_same(interpreted: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (conv3d, conv3d_grad_weight):
        monkeypatch.setattr(module, "choose", lambda *arguments: ConvConfig(32, 16, 32, 4, 2))
    case = conv_case((40, 36), (1, 1, 3), (1, 1, 1), (0, 0, 1), bias=False)
    check(interpreted, case, MASKS["side 4, unequal"](), torch.float32, "small tiles")


def _between_norms(x: BlockSparseTensor, w: Sequence[Tensor]) -> BlockSparseTensor:
    # The gradient of a bias in front of a norm is zero.
    y = functional.sparse_conv3d(x, w[0], w[0].detach().sum((1, 2, 3, 4)), 1, (0, 0, 1))
    y = F.leaky_relu(functional.sparse_instance_norm(y, w[1], w[2]), 0.1)
    y = functional.sparse_conv3d(y, w[3], None, 1, (0, 0, 1))
    return F.leaky_relu(functional.sparse_instance_norm(y, w[4]) + x, 0.1)


def _dense_between_norms(x: Tensor, m: Tensor, w: Sequence[Tensor]) -> Tensor:
    y = oracle.conv3d(x, m, w[0], w[0].detach().sum((1, 2, 3, 4)), (1, 1, 1), (0, 0, 1), 1)
    y = F.leaky_relu(oracle.norm(y, m, w[1], w[2], 1e-5, y.shape[1]), 0.1)
    y = oracle.conv3d(y, m, w[3], None, (1, 1, 1), (0, 0, 1), 1)
    return F.leaky_relu(oracle.norm(y, m, w[4], None, 1e-5, x.shape[1]) + oracle.select(x, m), 0.1)


RESIDUAL = Case(
    "residual block",
    _between_norms,
    _dense_between_norms,
    ((40, 20, 1, 1, 3), (40,), (40,), (20, 40, 1, 1, 3), (20,)),
    20,
)


@pytest.mark.parametrize("name", ["side 4, unequal", "empty sample", "nothing", "voxels"])
def test_fused_residual_block(name: str, interpreted: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    affine = []
    fused = conv3d.fused

    def spy(*arguments: Any) -> Any:
        affine.append(arguments[3] is not None)
        return fused(*arguments)

    monkeypatch.setattr(conv3d, "fused", spy)
    check(interpreted, RESIDUAL, MASKS[name](), torch.float32, name, 3e-5)
    assert affine == [False, True] * 2  # the second one reads the first one's norm


def test_statistics_of_a_convolution_are_safe_far_from_zero(interpreted: TritonBackend) -> None:
    mask = MASKS["side 4, unequal"]()
    x = BlockSparseTensor.from_dense(torch.randn(mask.batch, 20, *mask.shape, generator=seeded(0)), mask)
    weight = torch.randn(24, 20, 1, 3, 3, generator=seeded(1))
    with use_backend(interpreted.name):
        plain, far = (
            functional.sparse_instance_norm(
                functional.sparse_conv3d(x, weight, torch.full((24,), bias), 1, (0, 1, 1))
            ).blocks
            for bias in (0.0, 1e4)
        )
    assert float((far - plain).norm() / plain.norm()) < 1e-6 * 1e4 / 20


def test_there_is_a_configuration_for_every_class() -> None:
    shape = WindowShape((4, 4, 4), (1, 1, 1), (3, 3, 3), (1, 1, 1), (1, 1, 1), False, False, False)
    for block, channels, (dtype, exact) in itertools.product(
        ((32, 32, 32), (4, 4, 4), (2, 4, 4), (3, 5, 7), (1, 1, 1)),
        itertools.product((1, 3, 16, 33, 320, 1000), repeat=2),
        ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)),
    ):
        window = shape._replace(UNITS=block)
        kinds: list[configs.Class] = [
            configs.ConvClass(dtype, exact, *channels, 1, window),
            configs.GradWeightClass(dtype, exact, *channels, 1, window, flat=False),
        ]
        if block[0] * block[1] * block[2] % 32 == 0:
            kinds.append(configs.ConvClass(dtype, exact, *channels, 1, window, fused=True))
        for kind in kinds:
            found = configs.candidates(kind)
            assert found, f"no configuration for {kind}"
            assert all(kind.shared_bytes(config) <= configs.MAX_SHARED_BYTES for config in found)
