"""Peak memory of one training step of an encoder, in a process of its own.

python bench/memory.py CONTENDER PRESET PATCH_SIZE BLOCK MASK_RATIO prints MiB.

CPU: the high-water mark of the resident set during forward and backward, minus the resident set just before, with
weights, gradients and input already there: activations, buffers and what the libraries allocate for the step. The
allocator is told to return freed blocks to the system at once (M_MMAP_THRESHOLD), because otherwise fragmentation, not
need, decides the figure. CUDA: the peak of torch's allocator, minus what was allocated before.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from pathlib import Path

if platform.system() == "Linux":
    # Before anything allocates: blocks of 256 KiB and more come straight from the system and go straight back.
    ctypes.CDLL(None).mallopt(-3, 1 << 18)

import torch
from contenders import CONTENDERS

from s3d.model import build_unet
from s3d_kernels import BlockMask


def peak_mebibytes(contender: str, preset: str, patch_size: int, block: int, ratio: float) -> float:
    """Run the step and measure."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = build_unet(preset).encoder.to(device)
    x = torch.randn(1, 1, *(patch_size,) * 3, device=device)
    mask = BlockMask.random(1, patch_size // block, block, ratio, torch.Generator().manual_seed(0), device=device)
    # A first step on the smallest volume initialises the libraries.
    small = BlockMask.random(1, 2, block, 0.0, device=device)
    _, warm_up = CONTENDERS[contender](encoder, torch.randn(1, 1, *small.shape, device=device), small)
    warm_up().backward()
    del warm_up
    network, forward = CONTENDERS[contender](encoder, x, mask)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward().backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before_kib = _status("VmRSS")
    forward().backward()
    return (_status("VmHWM") - before_kib) / 1024


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise RuntimeError(f"no {key} in /proc/self/status")


if __name__ == "__main__":
    name, preset_, *numbers = sys.argv[1:]
    print(f"{peak_mebibytes(name, preset_, int(numbers[0]), int(numbers[1]), float(numbers[2])):.1f}")
