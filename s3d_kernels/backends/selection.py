"""The table of backends and the choice among them: by name, by measurement, or by a fixed order."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from .interface import Backend, BlocksProblem, ConvProblem, FusingBackend, Problem
from .measurements import dropped_with_measurements, is_tuning, store, time_call
from .reference import ReferenceBackend

_log = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# In the order in which `auto` tries them where nothing was measured.
REGISTRY: dict[str, Backend] = {}

# Read when an operator is called and handed to it as a string. A plain global: a ContextVar breaks the graph of
# torch.compile and is not seen by the thread that runs backward.
_current_backend = "auto"

_chosen: dict[tuple[str, Problem], Backend] = dropped_with_measurements({})  # of `auto`, by operation and problem
_fusing: dict[tuple[str, Problem], FusingBackend | None] = dropped_with_measurements({})
_said: set[tuple[str, str]] = dropped_with_measurements(set())


def register(backend: Backend, *, first: bool = True) -> None:
    """Add a backend; ``first`` puts it before the present ones in the order of `auto`."""
    others = {name: other for name, other in REGISTRY.items() if name != backend.name}
    order = {backend.name: backend, **others} if first else {**others, backend.name: backend}
    REGISTRY.clear()
    REGISTRY.update(order)
    _chosen.clear()
    _fusing.clear()


def check_name(name: str) -> str:
    """The name itself if there is such a backend or it is "auto".

    Raises:
        ValueError: no such backend.
    """
    if name != "auto" and name not in REGISTRY:
        raise ValueError(f"backend must be 'auto' or one of {sorted(REGISTRY)}, got {name!r}")
    return name


def current_backend() -> str:
    """Name of the backend that operators use where a call or module names none."""
    return _current_backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use a backend (or "auto") for all operators called inside; their backward uses the same one.

    Raises:
        ValueError: no such backend.
    """
    global _current_backend
    before, _current_backend = _current_backend, check_name(name)
    try:
        yield
    finally:
        _current_backend = before


class UnsupportedProblem(ValueError):
    """The backend that was asked for cannot compute the problem.

    Attributes:
        reason: why not, in a short sentence.
    """

    def __init__(self, name: str, problem: Problem, reason: str) -> None:
        super().__init__(f"backend {name!r} cannot compute {problem}: {reason}")
        self.reason = reason


def call(
    name: str,
    problem: Problem,
    operation: Callable[Concatenate[Backend, Arguments], Result],
    *arguments: Arguments.args,
    **keywords: Arguments.kwargs,
) -> Result:
    """Compute an operation, such as ``Backend.conv3d``, with the backend that is named or that "auto" stands for.

    That is the fastest one that was measured for the operation and problem; where none was, the first that can. Inside
    of :func:`tuning` they are measured here.

    Raises:
        ValueError: no such backend, or none for "auto".
        UnsupportedProblem: it cannot compute the problem; says why.
    """
    method = operation.__name__
    if name == "auto":
        backend = _chosen.get((method, problem))  # the way of nearly every call
        if backend is None:
            names = _to_measure(problem, method)
            if names:
                _measure(problem, method, names, arguments)
            backend = _choose(problem, method)
    else:
        backend = _named(name, problem)
    result: Result = getattr(backend, method)(*arguments, **keywords)
    return result


def _named(name: str, problem: Problem) -> Backend:
    backend = REGISTRY[check_name(name)]
    reason = backend.why_not(problem)
    if reason is not None:
        raise UnsupportedProblem(name, problem, reason)
    return backend


def _choose(problem: Problem, method: str) -> Backend:
    """What "auto" stands for; remembers it."""
    reasons: dict[str, str] = {}  # of those before the first that can
    for first, backend in REGISTRY.items():
        reason = backend.why_not(problem)
        if reason is None:
            break
        reasons[first] = reason
    else:
        raise ValueError(f"no backend can compute {problem}: {reasons}")
    times = {name: time for name, time in measured(problem, method).items() if time is not None}
    for name in sorted(times, key=lambda name: times[name]):
        if name in REGISTRY and REGISTRY[name].why_not(problem) is None:
            backend = REGISTRY[name]
            break
    if _is_captured(problem):
        return backend  # the check of a kernel's first use had to wait
    _chosen[method, problem] = backend
    if backend.name in times:
        listed = ", ".join(f"{name} {time:.3g} ms" for name, time in times.items())
        _log.info("%s computes %s of %s by measurement: %s", backend.name, method, problem, listed)
    for passed, reason in reasons.items():
        if (passed, reason) not in _said:  # once a process, so that nobody takes the slow way unknowingly
            _said.add((passed, reason))
            _log.warning("backend %r is passed over: %s; %r computes instead", passed, reason, backend.name)
    return backend


def _is_captured(problem: Problem) -> bool:
    return problem.device == "cuda" and torch.cuda.is_current_stream_capturing()


def measured(problem: Problem, method: str) -> dict[str, float | None]:
    """Milliseconds of the backends that were measured on this machine; None if one ran out of memory."""
    times: dict[str, float | None] = store().get(_key(problem, method), problem.device) or {}
    return times


def _key(problem: Problem, method: str) -> str:
    return f"{method} {problem}"


def _to_measure(problem: Problem, method: str) -> list[str]:
    """The backends that are to be compared now: none outside of tuning, or where the answer is known."""
    if not is_tuning() or _is_captured(problem):
        return []
    # `reference` takes many times the time and memory of any other.
    others = [name for name, backend in REGISTRY.items() if not isinstance(backend, ReferenceBackend)]
    able = [name for name in others if REGISTRY[name].why_not(problem) is None]
    able = [name for name in able if not any(_inherits(name, other, method) for other in able)]
    return able if len(able) > 1 and not set(able) <= set(measured(problem, method)) else []


def _inherits(name: str, other: str, method: str) -> bool:
    """Whether a backend has an operation from the class of another, so that there is nothing to compare."""
    one, base = type(REGISTRY[name]), type(REGISTRY[other])
    return one is not base and issubclass(one, base) and getattr(one, method) is getattr(base, method)


def _measure(problem: Problem, method: str, names: list[str], arguments: tuple[Any, ...]) -> None:
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    times: dict[str, float | None] = {}
    for name in names:
        try:
            times[name] = round(time_call(functools.partial(getattr(REGISTRY[name], method), *arguments), device), 4)
        except (MemoryError, torch.OutOfMemoryError):
            _log.warning("backend %r runs out of memory in %s of %s and is not chosen", name, method, problem)
            times[name] = None
    store().put(_key(problem, method), times, problem.device)


def fusing(name: str, problem: ConvProblem) -> FusingBackend | None:
    """The backend that computes this convolution if it can fuse it with the norms around it, or None.

    Raises:
        ValueError, UnsupportedProblem: as :func:`call`.
    """
    key = (name, problem)
    if key not in _fusing:  # to look at a protocol takes longer than anything else here
        method = Backend.conv3d.__name__
        if name != "auto":
            backend = _named(name, problem)
        elif _to_measure(problem, method):
            return None  # the convolution by itself is what is measured
        else:
            backend = _chosen.get((method, problem)) or _choose(problem, method)
        _fusing[key] = backend if isinstance(backend, FusingBackend) and backend.fuses(problem) else None
    return _fusing[key]


def computes_natively(x: Tensor) -> bool:
    """Whether the backend "native" can compute blocks of the device and dtype of ``x`` and may do it now."""
    problem = BlocksProblem(x.device.type, x.dtype, x.shape[1], (1, 1, 1), partial=False)
    return _current_backend in ("auto", "native") and REGISTRY["native"].why_not(problem) is None


# What problems are first of all about.
_FORWARD = {
    "conv3d": "conv3d",
    "norm": "norm_apply",
    "pool3d": "pool3d",
    "blocks": "gather_blocks",
    "upconv3d": "upconv3d",
}


def explain(problem: Problem, operation: str | None = None) -> dict[str, str | float | None]:
    """What `auto` knows of every backend, in its fixed order.

    Args:
        problem: what is to be computed.
        operation: a method of the backends, such as "conv3d_grad_input"; default: forward.
    Returns: for each name the reason why it cannot compute the problem; the milliseconds that it took when it was
        measured; or None if it can and was not measured.
    """
    times = measured(problem, operation or _FORWARD[problem.operator])
    explained: dict[str, str | float | None] = {}
    for name, backend in REGISTRY.items():
        reason = backend.why_not(problem)
        if reason is None and name in times and times[name] is None:
            reason = "it ran out of memory when it was measured"
        explained[name] = times.get(name) if reason is None else reason
    return explained
