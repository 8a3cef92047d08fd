"""The cells of a comparison, beside each other on several devices, with one progress bar over all of them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from s3d.data.workers import available_cores
from s3d.stop_signals import stop_signals

from .cells import Cell, FinetuningCell
from .run_cell import OUTPUT, CellStoppedError, Workplace, read_record, run_cell

# Of what has failed, so many lines are shown.
SHOWN_LINES = 12
# Seconds between looks at the logs of running cells, where a person sees the bar and where a file keeps it, and between
# reminders to processes that are to stop.
LOOK, LOOK_FILED, REMIND = 1.0, 60.0, 3.0


@dataclass
class Outcome:
    """What became of the cells.

    Attributes:
        failed: cells with what went wrong.
        stopped: a signal has ended the work.
    """

    failed: list[tuple[Cell, str]] = field(default_factory=list)
    stopped: bool = False


def run_cells(
    cells: Sequence[Cell], place: Workplace, devices: Sequence[str], cost: Callable[[Cell], float]
) -> Outcome:
    """Run cells that are not finished, long ones first, pre-trainings before what begins with them.

    A cell that fails, or whose process dies, does not keep the others from being run; those that need it are left out.

    Args:
        cells: of the matrix.
        place: where they are run.
        devices: each gets a process; none: all is run in this process.
        cost: of a cell, in a unit of any kind.
    """
    left = [cell for cell in cells if read_record(place.output / cell.folder) is None]
    outcome = Outcome()
    with contextlib.closing(_Bar(cells, left, place, cost)) as bar:
        queue = _Queue(left, bar, outcome, cost)
        if devices:
            _run_beside_each_other(queue, place, devices)
        else:
            _run_here(queue, place)
    return outcome


class _Queue:
    """Which cell is next, and what became of those that were given out."""

    def __init__(self, left: Sequence[Cell], bar: _Bar, outcome: Outcome, cost: Callable[[Cell], float]) -> None:
        self.bar, self.outcome = bar, outcome
        needed: dict[Path, list[Cell]] = {}
        for cell in left:
            if isinstance(cell, FinetuningCell) and cell.pretraining is not None:
                needed.setdefault(cell.pretraining.folder, []).append(cell)

        def urgency(cell: Cell) -> float:
            """Of the cell and the longest that waits for it."""
            return cost(cell) + max(map(cost, needed.get(cell.folder, ())), default=0.0)

        self.waiting = sorted(left, key=urgency, reverse=True)
        self.unfinished = {cell.folder for cell in left}
        self.broken: set[Path] = set()

    def next(self) -> Cell | None:
        """A cell whose pre-training is done; None where there is none now."""
        for cell in self.waiting:
            start = cell.pretraining if isinstance(cell, FinetuningCell) else None
            if start is None or start.folder not in self.unfinished:
                self.waiting.remove(cell)
                self.bar.begin(cell)
                return cell
        return None

    def done(self, cell: Cell) -> None:
        self.unfinished.remove(cell.folder)
        self.bar.end(cell, finished=True)

    def failed(self, cell: Cell, why: str, output: Path) -> None:
        self.outcome.failed.append((cell, why))
        self.bar.end(cell, finished=False)
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.is_file() else []
        self.bar.say("\n".join([f"failed: {cell.title}: {why}", *(f"  | {line}" for line in lines[-SHOWN_LINES:])]))
        self.bar.say(f"  more in {output}")
        self.broken.add(cell.folder)
        for other in [cell for cell in self.waiting if isinstance(cell, FinetuningCell) and cell.pretraining]:
            assert other.pretraining is not None
            if other.pretraining.folder in self.broken:
                self.waiting.remove(other)
                self.outcome.failed.append((other, "its pre-training has failed"))

    def stopped(self, cell: Cell) -> None:
        self.outcome.stopped = True
        self.bar.end(cell, finished=False)


def _run_here(queue: _Queue, place: Workplace) -> None:
    while not queue.outcome.stopped:
        cell = queue.next()
        if cell is None:
            return
        try:
            run_cell(cell, place, "auto")
        except CellStoppedError:
            queue.stopped(cell)
        except Exception as error:
            queue.failed(cell, _one_line(error), place.output / cell.folder / OUTPUT)
        else:
            queue.done(cell)


def _run_beside_each_other(queue: _Queue, place: Workplace, devices: Sequence[str]) -> None:
    threads = max(1, available_cores() // len(devices))
    idle = [_Worker(device, threads) for device in devices]
    busy: dict[Connection, _Worker] = {}
    try:
        with stop_signals() as received:
            while True:
                # A signal may reach a worker before it reaches this process.
                stop = queue.outcome.stopped = queue.outcome.stopped or bool(received)
                while idle and not stop:
                    cell = queue.next()
                    if cell is None:
                        break
                    worker = idle.pop()
                    worker.give(cell, place)
                    busy[worker.connection] = worker
                if not busy:
                    break
                if stop:
                    for worker in busy.values():
                        worker.stop()
                for connection in wait(list(busy), timeout=LOOK):
                    assert isinstance(connection, Connection)
                    worker = busy.pop(connection)
                    idle.append(_settle(worker, queue, place, stop))
                queue.bar.look()
    finally:
        for worker in (*idle, *busy.values()):
            worker.end()


def _settle(worker: _Worker, queue: _Queue, place: Workplace, stopping: bool) -> _Worker:
    """Take the answer of a worker. Returns: it, or the one that takes the place of one that died."""
    cell, worker.cell = worker.cell, None
    assert cell is not None
    try:
        what, why = worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit status {code}"
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        what, why = ("stopped", "") if stopping else ("failed", f"its process was ended {how}{hint}")
        worker.end()
        worker = worker if stopping else _Worker(worker.device, worker.threads)
    if what == "done":
        queue.done(cell)
    elif what == "stopped":
        queue.stopped(cell)
    else:
        queue.failed(cell, why, place.output / cell.folder / OUTPUT)
    return worker


class _Worker:
    """A process with a device, which imports everything once. It starts when it is first given something to do."""

    def __init__(self, device: str, threads: int) -> None:
        self.device, self.threads = device, threads
        self.cell: Cell | None = None
        self._reminded = 0.0
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon: those may not have processes of their own, which read patches.
        self.process = context.Process(target=_serve, args=(theirs, device, threads))
        # What it says goes to files: not ten lines of a progress bar a second. Threads are counted on import.
        with _environment(TQDM_MININTERVAL="10", OMP_NUM_THREADS=str(threads)):
            self.process.start()
        theirs.close()

    def give(self, cell: Cell, place: Workplace) -> None:
        self.cell = cell
        with contextlib.suppress(ConnectionError):  # it is dead: whoever waits for its answer will see that
            self.connection.send((cell, place))

    def stop(self) -> None:
        """Behind the step that it is at; again after some seconds, for it may have been between two things."""
        if time.monotonic() - self._reminded > REMIND and self.process.is_alive():
            self._reminded = time.monotonic()
            self.process.terminate()

    def end(self) -> None:
        """Where it has nothing to do, it ends as nobody speaks to it any more."""
        self.connection.close()
        while self.process.is_alive():
            if self.cell is not None:
                self.stop()
            self.process.join(0.1)


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(connection: Connection, device: str, threads: int) -> None:
    """What a process does: one cell after another, until it is told to stop or nobody listens."""
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, to all processes: the main one ends the others

    def stop(number: int, frame: Any) -> None:
        # While it trains, training has its own handler, which saves first.
        raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            cell, place = connection.recv()
            try:
                run_cell(cell, place, device)
            except CellStoppedError:
                connection.send(("stopped", ""))
            except Exception as error:
                connection.send(("failed", _one_line(error)))
            else:
                connection.send(("done", ""))
    except (EOFError, ConnectionError, SystemExit):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already


def _end_with_parent() -> None:
    """A process whose parent was killed would go on with a cell that the next call gives to another one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(REMIND)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Bar:
    """Progress over all cells, finished ones included, by what they cost."""

    def __init__(
        self, cells: Sequence[Cell], left: Sequence[Cell], place: Workplace, cost: Callable[[Cell], float]
    ) -> None:
        self._place, self._cost = place, cost
        self._count, self._finished = len(cells), len(cells) - len(left)
        total, rest = (sum(map(cost, some)) for some in (cells, left))
        self._running: dict[Path, Cell] = {}
        self._done = total - rest
        self._looked = time.monotonic()
        self._every = LOOK if sys.stderr.isatty() else LOOK_FILED
        layout = "{desc}: {percentage:5.1f} %|{bar}| {elapsed}, {remaining} left{postfix}"
        self._bar = tqdm(total=total, initial=self._done, desc="compare", bar_format=layout)

    def close(self) -> None:
        self._bar.close()

    def begin(self, cell: Cell) -> None:
        self._running[cell.folder] = cell
        self._show()

    def end(self, cell: Cell, *, finished: bool) -> None:
        del self._running[cell.folder]
        if finished:
            self._finished += 1
            self._done += self._cost(cell)
        self._show()

    def say(self, text: str) -> None:
        tqdm.write(text)

    def look(self) -> None:
        """See how far the running cells are, now and then."""
        if time.monotonic() - self._looked >= self._every:
            self._looked = time.monotonic()
            self._show()

    def _show(self) -> None:
        shares = {cell: _share_done(self._place.output / cell.folder) for cell in self._running.values()}
        now = self._done + sum(share * self._cost(cell) for cell, share in shares.items())
        self._bar.n = max(self._bar.n, now)
        titles = ", ".join(f"{cell.title} ({share:.0%})" for cell, share in shares.items())
        self._bar.set_postfix_str(f"{self._finished} of {self._count} runs; now {titles or 'none'}", refresh=False)
        self._bar.refresh()


def _share_done(folder: Path) -> float:
    """Of the steps of a run that goes on, from the last row of its log."""
    try:
        steps = json.loads((folder / "config.json").read_text(encoding="utf-8"))["steps"]
        with (folder / "log.csv").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            rows = [row.partition(b",")[0] for row in file.read().splitlines()]
    except (OSError, ValueError):  # not there yet, or just being written
        return 0.0
    done = next((int(row) for row in reversed(rows) if row.isdigit()), 0)
    return min(1.0, done / steps)
