"""python -m s3d_kernels.selfcheck: run every operator of every backend on this machine and compare with `reference`.

Prints one row per operator and dtype: ok, unavailable and why, or wrong and by how much. Exit status 1 if any is wrong.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from .backends import REGISTRY, UnsupportedProblem, use_backend
from .block_mask import BlockMask
from .block_sparse import BlockSparseTensor
from .fused_upconv import fused_upconv3d

# Relative l2 error against `reference` in float64.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}

Function = Callable[[BlockSparseTensor, list[Tensor]], BlockSparseTensor | Tensor]


@dataclass(frozen=True)
class Case:
    """One operator: what to call, and the shapes of its weights."""

    name: str
    function: Function
    weights: tuple[tuple[int, ...], ...] = ()


CHANNELS = 6


def _conv_between_norms(x: BlockSparseTensor, w: list[Tensor]) -> BlockSparseTensor:
    activated: Any = F.leaky_relu(functional.sparse_instance_norm(x, w[0], w[1]))  # type: ignore[arg-type]
    return functional.sparse_instance_norm(functional.sparse_conv3d(activated, w[2], None, 1, 1))


CASES: tuple[Case, ...] = (
    Case("conv3d 3x3x3", lambda x, w: functional.sparse_conv3d(x, w[0], w[1], 1, 1), ((8, CHANNELS, 3, 3, 3), (8,))),
    Case(
        "conv3d 3x3x3 stride 2", lambda x, w: functional.sparse_conv3d(x, w[0], None, 2, 1), ((8, CHANNELS, 3, 3, 3),)
    ),
    Case("conv3d 1x3x3", lambda x, w: functional.sparse_conv3d(x, w[0], None, 1, (0, 1, 1)), ((8, CHANNELS, 1, 3, 3),)),
    Case("conv3d 1x1x1", lambda x, w: functional.sparse_conv3d(x, w[0], w[1]), ((8, CHANNELS, 1, 1, 1), (8,))),
    Case("conv3d 5x5x5", lambda x, w: functional.sparse_conv3d(x, w[0], None, 1, 2), ((4, CHANNELS, 5, 5, 5),)),
    Case(
        "conv3d depthwise",
        lambda x, w: functional.sparse_conv3d(x, w[0], None, 1, 1, groups=CHANNELS),
        ((CHANNELS, 1, 3, 3, 3),),
    ),
    Case(
        "conv_transpose3d 2x2x2",
        lambda x, w: functional.sparse_conv_transpose3d(x, w[0], w[1]),
        ((CHANNELS, 8, 2, 2, 2), (8,)),
    ),
    Case(
        "upconv3d",
        lambda x, w: fused_upconv3d(x.to_dense(), w[0], w[1], w[2], w[3]),
        ((CHANNELS, 4, 2, 2, 2), (4,), (8, 4, 3, 3, 3), (8,)),
    ),
    Case("instance norm", lambda x, w: functional.sparse_instance_norm(x, w[0], w[1]), ((CHANNELS,), (CHANNELS,))),
    Case("group norm", lambda x, w: functional.sparse_group_norm(x, 2, w[0], w[1]), ((CHANNELS,), (CHANNELS,))),
    Case(
        "batch norm",
        lambda x, w: functional.sparse_batch_norm(x, None, None, w[0], w[1], training=True),
        ((CHANNELS,), (CHANNELS,)),
    ),
    Case("conv3d between norms", _conv_between_norms, ((CHANNELS,), (CHANNELS,), (8, CHANNELS, 3, 3, 3))),
    Case("average pooling", lambda x, w: functional.sparse_pool3d(x, "avg", 2)),
    Case("average pooling 3x3x3", lambda x, w: functional.sparse_pool3d(x, "avg", 3, 2, 1, count_include_pad=False)),
    Case("maximum pooling", lambda x, w: functional.sparse_pool3d(x, "max", 3, 2, 1)),
)


@dataclass(frozen=True)
class Finding:
    """How one operator of one backend did.

    Attributes:
        error: largest relative l2 error over output and gradients and masks; None if it did not run.
        reason: why it did not run, or None.
    """

    backend: str
    operator: str
    dtype: torch.dtype
    error: float | None
    reason: str | None

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE[self.dtype]


def selfcheck(device: torch.device | str = "cpu") -> Iterator[Finding]:
    """Check every operator of every backend on a device, forward and backward, on whole and partly visible blocks."""
    for dtype in TOLERANCE:
        for case in CASES:
            expected = [_run(case, mask, torch.float64, "reference") for mask in _masks(torch.device(device))]
            for name in REGISTRY:
                error, reason = 0.0, None
                try:
                    for mask, truth in zip(_masks(torch.device(device)), expected, strict=True):
                        error = max(error, _distance(_run(case, mask, dtype, name), truth))
                except UnsupportedProblem as refusal:
                    reason = refusal.reason
                except NotImplementedError as refusal:  # a dtype that torch itself has no kernel for
                    reason = str(refusal).splitlines()[0]
                yield Finding(name, case.name, dtype, None if reason else error, reason)


def _masks(device: torch.device) -> list[BlockMask]:
    generator = torch.Generator().manual_seed(0)
    unequal = BlockMask.random(3, (2, 3, 2), 4, (0.3, 0.9), generator, device=device)
    voxels = BlockMask.from_voxels(torch.rand(2, 8, 12, 4, generator=generator) < 0.3, 4).to(device)
    return [unequal, voxels]


def _run(case: Case, mask: BlockMask, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Output and gradients of input and weights, for fixed random values."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        # Rounded to the checked dtype first, so that only the arithmetic differs.
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(mask.device, dtype)

    x = draw(mask.batch, CHANNELS, *mask.shape).requires_grad_()
    weights = [draw(*shape).requires_grad_() for shape in case.weights]
    # Without TF32, which torch allows convolutions by default: it would hide errors a hundred times as large.
    with use_backend(backend), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = case.function(BlockSparseTensor.from_dense(x, mask), weights).to_dense()
        gradients = torch.autograd.grad(y, [x, *weights], draw(*y.shape))
    return [y.detach(), *gradients]


def _distance(got: list[Tensor], truth: list[Tensor]) -> float:
    """Largest relative l2 distance; infinite if anything is not finite."""
    distances = [
        float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) if bool(a.isfinite().all()) else float("inf")
        for a, b in zip(got, truth, strict=True)
    ]
    return max(distances)


def main(arguments: list[str] | None = None) -> int:
    """Print the table. Returns: the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m s3d_kernels.selfcheck", description="Compare every backend with reference."
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    device = parser.parse_args(arguments).device
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {device}, {torch.get_num_threads()} threads")
    wrong = 0
    for finding in selfcheck(device):
        if finding.reason is not None:
            verdict = f"unavailable: {finding.reason}"
        else:
            verdict = f"{'ok' if finding.ok else 'WRONG'}, relative error {finding.error:.1e}"
            wrong += not finding.ok
        dtype = str(finding.dtype).removeprefix("torch.")
        print(f"{finding.backend:<12} {finding.operator:<24} {dtype:<9} {verdict}", flush=True)
    print(f"{wrong} wrong" if wrong else "all available operators agree with reference")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
