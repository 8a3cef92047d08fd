"""Measuring a case: its contenders take turns, so that whatever else the machine does meets all alike.

pytest-benchmark gives each contender and phase an entry of its own. But it measures one after another, and on a machine
whose speed drifts a ratio of such figures is of little worth. So a case is measured when its first entry is asked
for, and each entry then plays its rounds back on a clock of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cases import Case, Gather, Scatter, voxels_of, work_of
from contenders import AUTO, CONTENDERS, Contender, Run
from machine import copy_rate, device, multiplication_rate, synchronise
from memory import peak_of
from torch import Tensor

from s3d.profiling import profile_steps
from s3d_kernels import BlockSparseTensor, to_sparse
from s3d_kernels.backends import UnsupportedProblem

PHASES = ("forward", "backward", "both")

Report = Callable[[Case, str, str], None]  # case, contender, phase: the fixture that measures

# Relative l2 error against `reference` beyond which a contender is wrong, whatever its speed. float32 may be rounded to
# TF32 on a GPU.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
TOLERANCE_ON_GPU = {**TOLERANCE, torch.float32: 2e-3}


def word(name: str) -> str:
    """The name of a contender for files and identifiers of tests."""
    return name.replace(", ", "_").replace(" ", "_")


class Clock:
    """A clock on which a call takes as long as it took when it was measured."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def spend(self, seconds: float) -> None:
        self._now += seconds


CLOCK = Clock()


@dataclass
class Measured:
    """What a contender needed for a case.

    Attributes:
        seconds: of each round, by phase.
        why_not: why there are none, or None.
        figures: of the case and the contender, by name; written beside the times.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    why_not: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)


def find(name: str) -> Contender:
    """The contender of a name."""
    return AUTO if name == AUTO.name else CONTENDERS[name]


def prepare(case: Case, name: str) -> Run:
    """A contender, ready for a case; all of them get the same weights, input and mask."""
    torch.backends.cudnn.benchmark = True  # the dense baseline at its best
    mask = case.layer_mask(device()) if case.layer else case.mask(device())
    return find(name).prepare(case, case.network().to(device()), case.input(mask), mask)


def measure(case: Case, names: Sequence[str], rounds: int, seconds: float, memory: bool) -> dict[str, Measured]:
    """Each contender's rounds, after one that is not counted and in which results are compared.

    Raises:
        AssertionError: a contender computes something else.
    """
    measured = {name: Measured() for name in names}
    with _threads(case.threads):
        ready: dict[str, Run] = {}
        expected = _expected(case) if case.layer else None
        for name in names:
            try:
                ready[name] = prepare(case, name)
                _, result = _timed(ready[name])
            except UnsupportedProblem as error:
                measured[name].why_not = error.reason
                ready.pop(name, None)
                continue
            visible = ready[name].visible
            if visible is not None and case.question != "encoder":  # its sums of features say little: see bench_encoder
                found = visible(result).double()
                expected = found if expected is None else expected  # of a whole step, the first one's loss
                _compare(case, name, found, expected)
                del found
            del result
        shared = _figures_of(case)
        begin = time.perf_counter()
        for number in range(rounds):
            if number >= 2 and time.perf_counter() - begin > seconds:
                break
            for name, run in ready.items():
                times, _ = _timed(run)
                for phase, taken in times.items():
                    measured[name].seconds[phase].append(taken)
        del ready
    for name, entry in measured.items():
        entry.figures = dict(shared)
        if memory and entry.why_not is None:
            entry.figures["peak_mebibytes"] = peak_of(case, name)
    return measured


def record(case: Case, names: Sequence[str], folder: Path) -> None:
    """A trace and tables of one step of each contender, in folders of their names below that of the case."""
    for name in names:
        run = prepare(case, name)

        def step(run: Run = run) -> None:
            run.drop_gradients()
            result = run.forward()
            result.backward(torch.ones_like(result))

        with _threads(case.threads):
            profile_steps(step, folder / case.id / word(name), run.network, steps=1)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(run: Run) -> tuple[dict[str, float], Tensor]:
    """Seconds of each phase of one round, and the result."""
    run.drop_gradients()
    synchronise()
    begin = time.perf_counter()
    result = run.forward()
    synchronise()
    middle = time.perf_counter()
    gradient = torch.ones_like(result)
    synchronise()
    before_backward = time.perf_counter()
    result.backward(gradient)
    synchronise()
    forward, backward = middle - begin, time.perf_counter() - before_backward
    return {"forward": forward, "backward": backward, "both": forward + backward}, result.detach()


def _expected(case: Case) -> Tensor:
    """What `reference` computes."""
    run = prepare(case, "reference")
    assert run.visible is not None
    with torch.no_grad():
        return run.visible(run.forward()).double()


def _compare(case: Case, name: str, found: Tensor, expected: Tensor) -> None:
    error = float((found - expected).norm() / expected.norm())
    limit = (TOLERANCE_ON_GPU if device() == "cuda" else TOLERANCE)[case.torch_dtype]
    assert error <= limit, f"{name} is wrong by {error:.1e} in {case.id}, beyond {limit}: its time means nothing"


def _figures_of(case: Case) -> dict[str, Any]:
    """What is known of a case, whoever computes it."""
    visible, voxels = voxels_of(case)
    figures: dict[str, Any] = {
        "visible_voxels": visible,
        "voxels": voxels,
        "threads_used": torch.get_num_threads(),
        "multiplication_flop_per_second": multiplication_rate(case.torch_dtype),
        "copy_bytes_per_second": copy_rate(),
    }
    if case.layer:
        mask = case.layer_mask(device())
        features = BlockSparseTensor.from_dense(case.input(mask), mask)
        layer = case.network().to(device())
        work = work_of(layer, features, *_output_size(to_sparse(layer), features))
        figures.update(flop=work.flop, forward_bytes=work.forward_bytes, backward_bytes=work.backward_bytes)
    return figures


def _output_size(layer: torch.nn.Module, features: BlockSparseTensor) -> tuple[int, int]:
    """Visible voxels and channels of what a layer gives."""
    with torch.no_grad():
        y = features if isinstance(layer, Gather | Scatter) else layer(features)
    return int(y.mask.visible_voxels().sum()), int(y.shape[1])
