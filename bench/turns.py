"""Measuring a case: its contenders take turns, so that whatever else the machine does meets all alike.

pytest-benchmark gives each contender and phase an entry of its own. But it measures one after another, and on a machine
whose speed drifts a ratio of such figures is of little worth. So a case is measured when its first entry is asked
for, and each entry then plays its rounds back on a clock of its own.
"""

from __future__ import annotations

import contextlib
import gc
import math
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
from rows import PHASES
from torch import Tensor

from s3d.profiling import profile_steps
from s3d_kernels import BlockSparseTensor, to_sparse
from s3d_kernels.backends import UnsupportedProblem

Report = Callable[[Case, str, str], None]  # case, contender, phase: the fixture that measures

# Relative l2 error against `reference` beyond which a contender is wrong, whatever its speed. float32 may be rounded to
# TF32 on a GPU.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
TOLERANCE_ON_GPU = {**TOLERANCE, torch.float32: 2e-3}
# Sums over a million voxels differ by the order in which float32 adds them up, also those of `reference`; in a whole
# network rounding flips the signs of some activations near zero, where LeakyReLU has a kink.
OF_SUMS = 10


def word(name: str) -> str:
    """The name of a contender for files and identifiers of tests."""
    return name.replace(" ", "_")


class WrongResult(AssertionError):
    """A contender computes something else than the others."""


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
        why_not: why it cannot compute the case, or None.
        error: how it failed, or None.
        figures: of the case and the contender, by name; written beside the times.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    why_not: str | None = None
    error: str | None = None
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
    """Each contender's rounds, after one that is not counted and in which results and gradients are compared.

    One that fails, or computes something else than `reference`, has no rounds and says why; the others go on.
    """
    measured = {name: Measured() for name in names}
    with _threads(case.threads):
        ready = _get_ready(case, measured)
        shared = _figures_of(case)
        begin = time.perf_counter()
        for number in range(rounds):
            if number >= 2 and time.perf_counter() - begin > seconds:
                break
            for name in list(ready):
                try:
                    times, _ = _timed(ready[name])
                except Exception as error:
                    _fail(measured[name], error)
                    del ready[name]
                    continue
                for phase, taken in times.items():
                    measured[name].seconds[phase].append(taken)
        ready.clear()
    gc.collect()
    torch.cuda.empty_cache()  # for the processes that measure memory
    for name, entry in measured.items():
        entry.figures = dict(shared)
        if memory and entry.why_not is None and entry.error is None:
            try:
                entry.figures["peak_mebibytes"] = peak_of(case, name)
            except RuntimeError as error:
                _fail(entry, error)
    return measured


def _get_ready(case: Case, measured: dict[str, Measured]) -> dict[str, Run]:
    """The contenders that can compute the case and compute it right."""
    ready: dict[str, Run] = {}
    expected: dict[str, Tensor] = {}
    if case.layer:
        try:
            run = prepare(case, "reference")
            expected = run.found(_timed(run)[1])
            del run
        except Exception as error:  # then nobody's result can be trusted
            for entry in measured.values():
                _fail(entry, error)
            return {}
    for name, entry in measured.items():
        try:
            run = prepare(case, name)
            _, result = _timed(run)
            found = run.found(result)
            for what, value in found.items():
                _compare(case, f"{what} of {name}", value, expected.setdefault(what, value))
        except UnsupportedProblem as error:
            entry.why_not = error.reason
        except Exception as error:
            _fail(entry, error)
        else:
            ready[name] = run
    return ready


def _fail(entry: Measured, error: Exception) -> None:
    """Of one contender, whatever it raised: an error of another package must not cost the others their figures."""
    entry.error = f"{type(error).__name__}: {error}"
    entry.seconds = {phase: [] for phase in PHASES}


def record(case: Case, names: Sequence[str], folder: Path) -> None:
    """A trace and tables of one step of each contender, in folders of their names below that of the case."""
    for name in names:
        run = prepare(case, name)

        def step(run: Run = run) -> None:
            run.drop_gradients()
            result = run.forward()
            result.backward(torch.ones_like(result))

        with _threads(case.threads):
            profile_steps(step, folder / case.id / word(name), run.network, steps=1, device=device())


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
    # Of a layer that of the sum of cubes: constants and the result itself have no gradient through a norm.
    gradient = torch.ones_like(result) if result.dim() == 0 else result.detach().square()
    synchronise()
    before_backward = time.perf_counter()
    result.backward(gradient)
    synchronise()
    forward, backward = middle - begin, time.perf_counter() - before_backward
    return {"forward": forward, "backward": backward, "both": forward + backward}, result.detach()


def _compare(case: Case, what: str, found: Tensor, expected: Tensor) -> None:
    error = float((found - expected).norm() / expected.norm())
    limit = (TOLERANCE_ON_GPU if device() == "cuda" else TOLERANCE)[case.torch_dtype]
    limit *= OF_SUMS if not case.layer or found.dim() == 0 else 1
    if not error <= limit:
        raise WrongResult(f"{what} is wrong by {error:.1e}, beyond {limit:.1e}: its time means nothing")


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
        flop, moved = work_of(layer, features, *output_size(to_sparse(layer), features))
        figures.update(flop=flop, forward_bytes=moved)
    return figures


def output_size(layer: torch.nn.Module, features: BlockSparseTensor) -> tuple[int, int]:
    """Voxels that a layer writes, and their channels."""
    if isinstance(layer, Scatter):
        return features.mask.batch * math.prod(features.mask.shape), int(features.shape[1])
    with torch.no_grad():
        y = features if isinstance(layer, Gather) else layer(features)
    return int(y.mask.visible_voxels().sum()), int(y.shape[1])
