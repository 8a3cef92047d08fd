"""Modules: call forms, refusals, autocast, batch norm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import nn

import s3d_kernels as sk
from s3d_kernels import BlockMask, BlockSparseTensor

PAIRS: list[tuple[type[nn.Module], type[nn.Module], dict[str, Any]]] = [
    (nn.Conv3d, sk.SparseConv3d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}),
    (
        nn.ConvTranspose3d,
        sk.SparseConvTranspose3d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 2, "stride": 2},
    ),
    (nn.InstanceNorm3d, sk.SparseInstanceNorm3d, {"num_features": 4, "affine": True}),
    (nn.BatchNorm3d, sk.SparseBatchNorm3d, {"num_features": 4}),
    (nn.GroupNorm, sk.SparseGroupNorm, {"num_groups": 2, "num_channels": 4}),
    (nn.AvgPool3d, sk.SparseAvgPool3d, {"kernel_size": 2}),
    (nn.MaxPool3d, sk.SparseMaxPool3d, {"kernel_size": 3, "stride": 2, "padding": 1}),
]


def make_mask(ratio: float = 0.5) -> BlockMask:
    return BlockMask.random(2, (2, 3, 2), 4, ratio, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dense_class", "sparse_class", "arguments"), PAIRS)
def test_three_call_forms(
    dense_class: type[nn.Module], sparse_class: type[nn.Module], arguments: dict[str, Any]
) -> None:
    mask = make_mask()
    x = torch.randn(2, 4, *mask.shape)
    sparse, dense = sparse_class(**arguments), dense_class(**arguments)
    assert list(sparse.state_dict()) == list(dense.state_dict())
    dense.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(sparse(x), dense(x))
    sparse.load_state_dict(dense.state_dict())
    from_sparse = sparse(BlockSparseTensor.from_dense(x, mask))
    assert isinstance(from_sparse, BlockSparseTensor)
    assert torch.equal(sparse(torch.where(mask.to_dense(), x, float("nan")), mask), from_sparse.to_dense())
    # With everything visible, sparse is dense.
    full = make_mask(0.0)
    torch.testing.assert_close(sparse(x, full), dense(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="mask must not be given with a BlockSparseTensor"):
        sparse(BlockSparseTensor.from_dense(x, mask), mask)
    with pytest.raises(TypeError, match="mask must be a BlockMask, got Tensor"):
        sparse(x, mask.to_dense())


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: sk.SparseConv3d(1, 1, 3, padding=1, dilation=2), "SparseConv3d: dilation must be 1"),
    (
        lambda: sk.SparseConv3d(1, 1, 3, padding=1, padding_mode="reflect"),
        "padding_mode must be 'zeros', got 'reflect'",
    ),
    (lambda: sk.SparseConv3d(1, 1, 3), "kernel_size 3, stride 1, padding 0 along depth"),
    (lambda: sk.SparseConv3d(1, 1, (3, 3, 5), padding=1), "kernel_size 5, stride 1, padding 1 along width"),
    (lambda: sk.SparseConv3d(1, 1, 2, padding=1), "kernel_size 2, stride 1, padding 1"),
    (lambda: sk.SparseConvTranspose3d(1, 1, 3, stride=2), "stride must equal kernel_size"),
    (lambda: sk.SparseConvTranspose3d(1, 1, 2, stride=2, output_padding=1), "output_padding must be 0"),
    (lambda: sk.SparseInstanceNorm3d(4, track_running_stats=True), "track_running_stats must be False"),
    (lambda: sk.SparseAvgPool3d(2, ceil_mode=True), "ceil_mode must be False"),
    (lambda: sk.SparseMaxPool3d(2, return_indices=True), "return_indices must be False"),
    (lambda: sk.SparseMaxPool3d(2, dilation=2), "dilation must be 1"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_refusals_at_construction(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_refusals_at_call() -> None:
    mask = BlockMask.from_voxels(torch.ones(1, 5, 6, 6, dtype=torch.bool), 2)
    x = torch.randn(1, 4, 5, 6, 6)
    with pytest.raises(ValueError, match=r"volume \(5, 6, 6\) does not fit kernel_size \(2, 2, 2\)"):
        sk.SparseConv3d(4, 4, 2, stride=2)(x, mask)
    with pytest.raises(ValueError, match=r"weight must be .* for C_in=4 and groups=1, got \(4, 3"):
        sk.SparseConv3d(3, 4, 1)(x, mask)
    with pytest.raises(ValueError, match="x must have 3 channels, got 4"):
        sk.SparseInstanceNorm3d(3)(x, mask)
    with pytest.raises(ValueError, match=r"same dtype outside autocast, got torch.float64 and torch.float32"):
        sk.SparseConv3d(4, 4, 1)(x.double(), mask)


def test_functional_arguments_are_checked() -> None:
    mask = make_mask()
    x = BlockSparseTensor.from_dense(torch.randn(2, 4, *mask.shape), mask)
    with pytest.raises(ValueError, match=r"weight must be a vector of 4 channels, got shape \(1,\)"):
        sk.sparse_instance_norm(x, torch.ones(1), torch.ones(4))
    with pytest.raises(ValueError, match=r"bias must be a vector of 6 channels, got shape \(4,\)"):
        sk.sparse_conv3d(x, torch.ones(6, 4, 1, 1, 1), torch.ones(4))
    with pytest.raises(ValueError, match="groups must divide the 3 output channels, got 2"):
        sk.sparse_conv3d(x, torch.ones(3, 2, 1, 1, 1), groups=2)
    with pytest.raises(ValueError, match="num_groups must divide the 4 channels, got 0"):
        sk.sparse_group_norm(x, 0)
    assert BlockMask.random(1, np.array([2, 1, 2]), np.int64(4), 0.5).shape == (8, 4, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    mask = make_mask()
    layers = [sk.SparseConv3d(4, 4, 3, padding=1), sk.SparseInstanceNorm3d(4, affine=True), sk.SparseAvgPool3d(2)]
    layers += [nn.LeakyReLU(inplace=True), sk.SparseConvTranspose3d(4, 2, 2, stride=2)]
    network = nn.Sequential(*layers)
    x = torch.randn(2, 4, *mask.shape)
    with torch.autocast("cpu", dtype):
        y = network(BlockSparseTensor.from_dense(x, mask))
    assert y.dtype == dtype
    y.to_dense().float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())
    exact = network(BlockSparseTensor.from_dense(x, mask)).to_dense()
    error = (y.to_dense().float() - exact).norm() / exact.norm()
    assert 0 < error < 2e-2


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_running_statistics(momentum: float | None) -> None:
    """With everything visible they are those of torch; over visible voxels otherwise."""
    sparse, dense = sk.SparseBatchNorm3d(4, momentum=momentum), nn.BatchNorm3d(4, momentum=momentum)
    for step in range(3):
        x = torch.randn(2, 4, 8, 12, 8, generator=torch.Generator().manual_seed(step)) * 3 + 1
        sparse(x, make_mask(0.0)), dense(x)
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], value)
    mask = make_mask()
    sparse.eval(), dense.eval()
    torch.testing.assert_close(sparse(x, mask), torch.where(mask.to_dense(), dense(x), 0.0), rtol=1e-4, atol=1e-5)
    sparse.train().reset_running_stats()
    sparse(x, mask)
    values = x.transpose(0, 1)[:, mask.to_dense()[:, 0]]
    weight = 1.0 if momentum is None else momentum
    torch.testing.assert_close(sparse.running_mean, weight * values.mean(1))
    torch.testing.assert_close(sparse.running_var, 1 - weight + weight * values.var(1), rtol=1e-4, atol=1e-5)


def test_batch_norm_without_visible_voxels_keeps_its_statistics() -> None:
    norm = sk.SparseBatchNorm3d(4)
    y = norm(torch.randn(2, 4, 8, 12, 8), make_mask(1.0))
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert torch.equal(norm.running_var, torch.ones(4))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, upstream = torch.load(f"{folder}/input.pt")
    mask = BlockMask.from_grid(torch.load(f"{folder}/grid.pt")[2 * rank : 2 * rank + 2], 4)
    norm = sk.SparseBatchNorm3d(3)
    part = x[2 * rank : 2 * rank + 2].requires_grad_()
    y = norm(part, mask)
    y.backward(upstream[2 * rank : 2 * rank + 2])
    torch.save((y.detach(), part.grad, norm.weight.grad, norm.running_mean, norm.running_var), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_batch_norm_is_synchronised_across_ranks(tmp_path: Path) -> None:
    """Two processes with two samples each, with unequal visible counts, are one with four."""
    grid = torch.rand(4, 2, 2, 2, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.9, 0.8, 0.2, 0.0]).view(
        4, 1, 1, 1
    )
    x, upstream = torch.randn(4, 3, 8, 8, 8) + 2, torch.randn(4, 3, 8, 8, 8)
    torch.save((x, upstream), tmp_path / "input.pt")
    torch.save(grid, tmp_path / "grid.pt")
    torch.multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    norm, mask = sk.SparseBatchNorm3d(3), BlockMask.from_grid(grid, 4)
    whole = x.clone().requires_grad_()
    y = norm(whole, mask)
    y.backward(upstream)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), y.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[0][2] + parts[1][2], norm.weight.grad, rtol=1e-4, atol=1e-4)
    for part in parts:
        torch.testing.assert_close(part[3], norm.running_mean)
        torch.testing.assert_close(part[4], norm.running_var)
    truth = oracle.norm(x.double(), mask.to_dense(), None, None, 1e-5, "batch")
    torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=1e-5)
