"""SIGINT and SIGTERM end a run in order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM makes non-empty, so that the step in progress ends and a checkpoint is written.

    A second SIGINT acts as if there were no handler. SIGTERM may come several times: a scheduler sends it to all
    processes of a job, and torchrun sends it on.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker: int) -> None:
    """Terminals and schedulers signal all processes of a job; only the main one acts, and ends its workers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
