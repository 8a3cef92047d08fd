"""What only a GPU can tell; `bench/gpu_check.sh` runs it. Skipped where torch sees none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import s3d_kernels as sk
from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, backends, use_backend

from . import test_upconv
from .test_fused_conv import BLOCK
from .test_operators import CASES, MASKS, Case, assert_close, expected, run, seeded, tolerances

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

BACKENDS = [name for name in REGISTRY if name not in ("reference",)]
TF32 = 1e-3


def skip_if_unavailable(backend: str, dtype: torch.dtype) -> None:
    problem = backends.BlocksProblem("cuda", dtype, 4, (4, 4, 4), partial=False)
    reason = REGISTRY[backend].why_not(problem)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_the_oracle(case: Case, backend: str, tf32: bool, dtype: torch.dtype) -> None:
    if tf32 and dtype != torch.float32:
        pytest.skip("TF32 is a way to multiply float32")
    skip_if_unavailable(backend, dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        for name, make in MASKS.items():
            mask = make()
            if case.needs_even and any(side % 2 for side in mask.shape):
                continue
            truth = expected(case, mask)
            allowed = [TF32] * len(truth) if tf32 else tolerances(case, mask, dtype, truth)
            got = run(case, mask, dtype, backend, device="cuda")
            again = run(case, mask, dtype, backend, masked=0.0, device="cuda")
            for i, (a, b, c) in enumerate(zip(got, truth, again, strict=True)):
                assert_close(a, b, dtype, allowed[i], f"{name}, result {i}")
                if backend in ("native", "triton"):
                    assert torch.equal(a, c), f"{name}, result {i}: other bits in another run, or from masked voxels"


@pytest.fixture(params=["native", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The backends with kernels of our own."""
    return str(request.param)


@pytest.mark.parametrize("name", ["side 8", "side 4, unequal", "empty sample", "voxels"])
def test_fused_residual_block_against_the_oracle(name: str, kernels: str) -> None:
    skip_if_unavailable(kernels, torch.float32)
    mask = MASKS[name]()
    with torch.backends.cudnn.flags(allow_tf32=False):
        got, again = (run(BLOCK, mask, torch.float32, kernels, masked, "cuda") for masked in (float("nan"), 0.0))
    for i, (a, b, c) in enumerate(zip(got, expected(BLOCK, mask), again, strict=True)):
        assert_close(a, b, torch.float32, 3e-5, f"result {i}")
        assert torch.equal(a, c), f"result {i}: other bits in another run, or from masked voxels"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_upconv_against_two_steps(backend: str, dtype: torch.dtype) -> None:
    skip_if_unavailable(backend, dtype)
    # What the bias of the transposed convolution contributes is convolved by cuDNN, whose gradients may vary in bits.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for name in test_upconv.SHAPES:
            test_upconv.check(name, dtype, (), backend, "cuda")


class Block(torch.nn.Module):
    """A convolution, its norm and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = sk.SparseConv3d(16, 40, 3, padding=1)
        self.norm = sk.SparseInstanceNorm3d(40, affine=True)

    def forward(self, x: BlockSparseTensor) -> BlockSparseTensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.01)


def block_and_input() -> tuple[Block, BlockSparseTensor]:
    torch.manual_seed(0)
    mask = BlockMask.random(2, (3, 2, 3), 8, 0.5, seeded(0)).to("cuda")
    x = torch.randn(mask.num_blocks, 8, 8, 8, 16, generator=seeded(1)).cuda().requires_grad_()
    return Block().cuda(), BlockSparseTensor(x, mask)


def step(block: Block, x: BlockSparseTensor) -> list[Tensor]:
    """Output and gradients."""
    y = block(x).blocks
    gradients = torch.autograd.grad(y.square().mean(), [x.blocks, *block.parameters()])
    return [y.detach(), *gradients]  # without its graph, which belongs to the stream of this step


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_forward_and_backward_do_not_wait_for_the_gpu(kernels: str) -> None:
    skip_if_unavailable(kernels, torch.float32)
    block, x = block_and_input()
    with use_backend(kernels):
        step(block, x)  # the check of the first use waits, once
        try:
            torch.cuda.set_sync_debug_mode("error")
            step(block, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_is_used(kernels: str) -> None:
    """Work on a side stream that is kept busy: kernels on another stream would read what is not there yet."""
    skip_if_unavailable(kernels, torch.float32)
    block, x = block_and_input()
    with use_backend(kernels):
        truth = step(block, x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = torch.zeros_like(x.blocks).requires_grad_()
            torch.cuda._sleep(200_000_000)
            with torch.no_grad():
                late.copy_(x.blocks)
            got = step(block, x.with_blocks(late))
        stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))


def test_a_step_can_be_captured_as_a_graph(kernels: str) -> None:
    skip_if_unavailable(kernels, torch.float32)
    block, x = block_and_input()
    with use_backend(kernels):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(block, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(block, x)
        with torch.no_grad():
            x.blocks.copy_(torch.randn(x.blocks.shape, generator=seeded(9)))
        graph.replay()
        torch.cuda.synchronize()
        truth = step(block, x)
    assert all(torch.equal(a, b) for a, b in zip(captured, truth, strict=True))


def test_another_device_than_the_current_one(kernels: str) -> None:
    skip_if_unavailable(kernels, torch.float32)
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    block, x = block_and_input()
    with use_backend(kernels):
        truth = [t.cpu() for t in step(block, x)]
        other = BlockSparseTensor(x.blocks.detach().to("cuda:1").requires_grad_(), x.mask.to("cuda:1"))
        got = [t.cpu() for t in step(block.to("cuda:1"), other)]
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))


def test_tensors_of_two_devices_are_refused(kernels: str) -> None:
    skip_if_unavailable(kernels, torch.float32)
    _, x = block_and_input()
    weight = torch.randn(40, 16, 3, 3, 3)
    with pytest.raises((ValueError, RuntimeError), match=r"weight|device|cpu"):
        sk.sparse_conv3d(x, weight, padding=1, backend=kernels)


def test_more_than_two_to_the_31_elements(kernels: str) -> None:
    """Only the last block is not zero."""
    skip_if_unavailable(kernels, torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    mask = BlockMask.from_grid(torch.ones(1, 1, 1, 1100, dtype=torch.bool), 32).to("cuda")
    x = torch.zeros(mask.num_blocks, 32, 32, 32, 64, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[-1] = torch.randn(32, 32, 32, 64, generator=seeded(0)).cuda()
    weight = torch.randn(40, 64, 3, 3, 3, generator=seeded(1)).cuda().bfloat16()
    y = sk.sparse_conv3d(BlockSparseTensor(x, mask), weight, padding=1, backend=kernels).blocks
    dense = F.conv3d(x[-1].permute(3, 0, 1, 2)[None].float(), weight.float(), padding=1)[0].permute(1, 2, 3, 0)
    assert float((y[-1].float() - dense).norm() / dense.norm()) < 1e-2
    assert not y[:-2].any()
