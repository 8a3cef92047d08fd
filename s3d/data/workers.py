"""Work on many things in several processes, such that one that dies is noticed, and what it worked on is named."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from s3d.data.reading import BadImageError

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


class WorkerDiedError(ChildProcessError):
    """A worker process ended before it was done; the message names what it was working on."""


class _Worker(Generic[Task]):
    """A process and the one task that it has."""

    def __init__(self, work: Callable[[Task], Any], context: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        with contextlib.suppress(ConnectionError):  # it is dead: whoever waits for its answer will see that
            self.connection.send(task)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work_through(
    work: Callable[[Task], Outcome], tasks: Sequence[Task], workers: int
) -> Generator[tuple[Task, Outcome], None, None]:
    """`run_in_processes`, or the same in this process: without workers, and for a single task, not worth the start."""
    if workers and len(tasks) > 1:
        yield from run_in_processes(work, tasks, workers)
    else:
        for task in tasks:
            yield task, work(task)


def sort_out(
    work: Callable[[Task], Outcome | BadImageError], tasks: Sequence[Task], workers: int, *, skip_bad: bool, bar: tqdm
) -> tuple[list[tuple[Task, Outcome]], list[tuple[Task, BadImageError]]]:
    """`work_through` for work that gives what is wrong with an image as its outcome.

    Args:
        work, tasks, workers: as for `work_through`.
        skip_bad: go on behind a bad image instead of raising what is wrong with it.
        bar: goes on by one for each task; is closed.
    Returns: tasks with their outcomes, and bad ones with what is wrong.
    """
    good: list[tuple[Task, Outcome]] = []
    bad: list[tuple[Task, BadImageError]] = []
    with contextlib.closing(work_through(work, tasks, workers)) as outcomes, bar:
        for task, outcome in outcomes:
            if not isinstance(outcome, BadImageError):
                good.append((task, outcome))
            elif skip_bad:
                bad.append((task, outcome))
            else:
                raise outcome
            bar.update()
    return good, bad


def run_in_processes(
    work: Callable[[Task], Outcome], tasks: Sequence[Task], workers: int
) -> Generator[tuple[Task, Outcome], None, None]:
    """Calls `work` on every task in other processes and yields task and outcome as they are done, in any order.

    Processes are started without a fork of this one (its threads and open files stay its own), so a script that calls
    this needs the usual `if __name__ == "__main__":`. They end after their present task when the iterator is closed,
    or this process dies. Each computes on one thread, as there are others for the other cores.

    Args:
        work: a function of a module, and tasks and outcomes: things that can be pickled.
        tasks: what to work on, in this order.
        workers: processes, at least 1.
    Raises:
        WorkerDiedError: a process was killed or crashed; names its task.
        Exception: what `work` raised, with the traceback of the process as its cause.
    """
    # A server that has the modules loaded and forks for each worker: without it every worker takes seconds to import.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([work.__module__])
    waiting = list(reversed(tasks))
    pool: list[_Worker[Task]] = []
    try:
        for _ in range(min(workers, len(tasks))):
            worker = _Worker(work, context)
            pool.append(worker)
            worker.give(waiting.pop())
        busy = {worker.connection: worker for worker in pool}
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]
                task = worker.task
                assert task is not None
                outcome = _receive(worker)
                if waiting:
                    worker.give(waiting.pop())
                else:
                    del busy[connection]
                yield task, outcome
    finally:
        # They end when they have no one to answer to, with what they are doing done: nothing is left half-written.
        for worker in pool:
            worker.connection.close()
        for worker in pool:
            worker.process.join()


def _receive(worker: _Worker[Any]) -> Any:
    try:
        succeeded, value = worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        code = worker.process.exitcode
        how = f"by signal {-code} ({signal.strsignal(-code)})" if code is not None and code < 0 else f"with code {code}"
        hint = "; out of memory? try fewer workers" if code == -9 else "; what it wrote before says why"
        raise WorkerDiedError(
            f"a worker process was ended {how} while it worked on {worker.task}{hint}; run the same command again: "
            "what is done is kept"
        ) from None
    if not succeeded:
        error, text = value
        raise error from RuntimeError(text)
    return value


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, to all processes: the main one ends the others
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):  # the main process is gone
            return
        try:
            answer = (True, work(task))
        except Exception as error:
            answer = (False, (error, traceback.format_exc()))
        try:
            connection.send(answer)
        except ConnectionError:
            return
