"""Peak memory of one step of a contender, in a process of its own, so that nothing of another is counted.

python bench/memory.py CONTENDER CASE, with a case as JSON, prints MiB.

CPU: the high-water mark of the resident set during forward and backward, minus the resident set just before, with
weights, gradients and input already there: activations, buffers and what the libraries allocate for the step. The
allocator is told to return freed blocks to the system at once (M_MMAP_THRESHOLD), because otherwise fragmentation, not
need, decides the figure. CUDA: the peak of torch's allocator, minus what was allocated before.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cases import Case


def peak_of(case: Case, contender: str) -> float:
    """MiB, measured by a new process.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = [sys.executable, __file__, contender, json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the memory of {contender} in {case.id} could not be measured:\n{done.stderr}")
    return float(done.stdout)


def _peak_mebibytes(contender: str, case: Case) -> float:
    import torch
    from turns import prepare

    torch.set_num_threads(case.threads or torch.get_num_threads())
    # A first step initialises the libraries; on a GPU one of full size, in which kernels are tuned and compiled.
    run = prepare(case if torch.cuda.is_available() else case.smaller(), contender)
    run.forward().sum().backward()
    run = prepare(case, contender)
    for parameter in run.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.forward().sum().backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before_kib = _status("VmRSS")
    run.forward().sum().backward()
    return (_status("VmHWM") - before_kib) / 1024


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise RuntimeError(f"no {key} in /proc/self/status")


if __name__ == "__main__":
    if platform.system() == "Linux":
        # Before anything allocates: blocks of 256 KiB and more come straight from the system and go straight back.
        ctypes.CDLL(None).mallopt(-3, 1 << 18)
    from cases import Case

    print(f"{_peak_mebibytes(sys.argv[1], Case(**json.loads(sys.argv[2]))):.1f}")
