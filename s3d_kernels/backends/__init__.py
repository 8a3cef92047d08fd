"""Backends: one table of them, and the choice among them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .interface import (
    Backend,
    BlockGeometry,
    BlocksProblem,
    ConvProblem,
    FusingBackend,
    NormProblem,
    PoolProblem,
    Problem,
    WindowGeometry,
)
from .native import NativeBackend
from .reference import ReferenceBackend
from .torch_gather import TorchGatherBackend

__all__ = [
    "REGISTRY",
    "Backend",
    "BlockGeometry",
    "BlocksProblem",
    "ConvProblem",
    "FusingBackend",
    "NormProblem",
    "PoolProblem",
    "Problem",
    "UnsupportedProblem",
    "WindowGeometry",
    "choose",
    "computes_natively",
    "current_backend",
    "explain",
    "fusing",
    "register",
    "use_backend",
]

_log = logging.getLogger(__name__)

# In the order in which `auto` tries them.
REGISTRY: dict[str, Backend] = {}

# Read when an operator is called and handed to it as a string. A plain global: a ContextVar breaks the graph of
# torch.compile and is not seen by the thread that runs backward.
_current_backend = "auto"

_chosen: dict[Problem, str] = {}
_fusing: dict[tuple[str, Problem], FusingBackend | None] = {}
_said: set[tuple[str, str]] = set()


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


def choose(name: str, problem: Problem) -> Backend:
    """The backend for a problem: the one that is named, or for "auto" the first that can.

    Raises:
        ValueError: no such backend.
        UnsupportedProblem: it cannot compute the problem; says why.
    """
    if check_name(name) != "auto":
        reason = REGISTRY[name].why_not(problem)
        if reason is not None:
            raise UnsupportedProblem(name, problem, reason)
        return REGISTRY[name]
    if problem not in _chosen:
        reasons = explain(problem)
        able = [candidate for candidate, reason in reasons.items() if reason is None]
        if not able:
            raise ValueError(f"no backend can compute {problem}: {reasons}")
        if problem.device == "cuda" and torch.cuda.is_current_stream_capturing():
            return REGISTRY[able[0]]  # the check of a kernel's first use had to wait
        _chosen[problem] = able[0]
        for passed, reason in reasons.items():
            if passed == able[0]:
                break
            if (passed, str(reason)) not in _said:  # once a process, so that nobody takes the slow way unknowingly
                _said.add((passed, str(reason)))
                _log.warning("backend %r is passed over: %s; %r computes instead", passed, reason, able[0])
    return REGISTRY[_chosen[problem]]


def fusing(name: str, problem: ConvProblem) -> FusingBackend | None:
    """The backend that :func:`choose` gives if it can fuse this convolution with the norms around it, or None.

    Raises:
        ValueError, UnsupportedProblem: as :func:`choose`.
    """
    key = (name, problem)
    if key not in _fusing:  # to look at a protocol takes longer than anything else here
        backend = choose(name, problem)
        _fusing[key] = backend if isinstance(backend, FusingBackend) and backend.fuses(problem) else None
    return _fusing[key]


def computes_natively(x: Tensor) -> bool:
    """Whether blocks of the device and dtype of ``x`` would be computed by the backend "native" now."""
    problem = BlocksProblem(x.device.type, x.dtype, x.shape[1], (1, 1, 1), partial=False)
    return _current_backend in ("auto", "native") and REGISTRY["native"].why_not(problem) is None


def explain(problem: Problem) -> dict[str, str | None]:
    """For every backend, in the order of `auto`: None if it can compute the problem, otherwise the reason."""
    return {name: backend.why_not(problem) for name, backend in REGISTRY.items()}


register(ReferenceBackend())
register(TorchGatherBackend())
register(NativeBackend())
