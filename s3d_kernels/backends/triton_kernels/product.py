"""The products of tiles that convolutions are made of, and what all their kernels do alike."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The interpreter (seen in Triton 3.8.0) multiplies the bits of bfloat16 numbers as integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply(a, b, sums, PRECISION: tl.constexpr):
    """sums + a @ b, in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def offset_of(number, width, WIDE: tl.constexpr):
    """number * width, in 64 bits where a tensor has so many elements."""
    if WIDE:
        return number.to(tl.int64) * width
    else:
        return number * width


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: rounded to TF32 where torch allows that for convolutions."""
    # The attribute that both of torch's ways to set it change.
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if allowed or dtype != torch.float32 else "ieee"


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
