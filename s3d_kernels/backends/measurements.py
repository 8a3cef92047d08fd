"""What was measured on this machine, in one file: times of backends, and configurations that a backend tuned.

A measurement is a JSON value under a key, apart for every machine (see :func:`machine`). Nothing is measured but inside
:func:`tuning`, for a step of a training run must neither take time that others wait for nor depend on noise. This
module knows neither backends nor operators, so that a backend can keep its own measurements here::

    value = store().get(key, "cuda")
    if value is None and is_tuning():
        value = min(configurations, key=lambda c: time_call(lambda: launch(c), x.device))
        store().put(key, value, "cuda")

To look a value up takes some microseconds, so keep it in a cache of :func:`dropped_with_measurements`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from .._version import __version__

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Raised when the same text would mean something else.
FORMAT = 1

# A call is timed in at most so many batches of at least so long, until the limit is reached.
_BATCHES, _BATCH_MS, _LIMIT_MS = 7, 2.0, 1000.0
_MAX_CALLS = 50  # in a batch


class MeasurementStore:
    """JSON values by key and machine, in memory and in a file.

    A file that cannot be read or written is named in one warning; it is left as it is, and what is put here then lives
    in memory only.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._machines: dict[str, dict[str, Any]] | None = None  # None: not read yet
        self._in_memory_only = False

    def get(self, key: str, device: str) -> Any | None:
        """The value, or None if there is none of this machine.

        Args:
            key: what was measured, in a text that is the same in every process.
            device: type of the device that it was measured on, "cpu" or "cuda".
        """
        if self._machines is None:
            self._machines = self._read_or_warn()
        return self._machines.get(machine(device), {}).get(key)

    def put(self, key: str, value: Any, device: str) -> None:
        """Keep a value, in the file too, beside what other processes have written there meanwhile."""
        if self._machines is None:
            self._machines = self._read_or_warn()
        self._machines.setdefault(machine(device), {})[key] = value
        if self._in_memory_only:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                machines = self._read_or_warn()
                if not self._in_memory_only:
                    machines.setdefault(machine(device), {})[key] = value
                    _write(self.path, json.dumps({"format": FORMAT, "machines": machines}, indent=1) + "\n")
        except OSError as error:
            self._warn(f"cannot be written ({error.strerror}); measurements are kept in memory only")

    def read(self) -> dict[str, dict[str, Any]]:
        """What the file holds: machine -> key -> value.

        Raises:
            OSError: it cannot be read.
            ValueError: it holds something else.
        """
        content = json.loads(self.path.read_text(encoding="utf-8"))
        machines = content.get("machines") if isinstance(content, dict) and content.get("format") == FORMAT else None
        if not isinstance(machines, dict) or not all(isinstance(values, dict) for values in machines.values()):
            raise ValueError(f"no measurements in format {FORMAT}")
        return machines

    def _read_or_warn(self) -> dict[str, dict[str, Any]]:
        try:
            return self.read()
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"is ignored: {error}. Remove it to measure again; until then measurements are in memory only")
            return {}

    def _warn(self, what: str) -> None:
        if not self._in_memory_only:
            self._in_memory_only = True
            warnings.warn(f"the file of measurements {self.path} {what}", stacklevel=4)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process is inside; where files cannot be locked, only the last of two writes may stay."""
    with open(path, "a") as lock:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str) -> None:
    """All or nothing, also for those who read meanwhile."""
    temporary = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def machine(device: str) -> str:
    """What measurements on a type of device hold for: the device with its settings, and the versions."""
    if device == "cuda" and torch.cuda.is_available():
        precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        name = f"{torch.cuda.get_device_name()}, {'TF32' if precision == 'tf32' else 'no TF32'}"
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, s3d_kernels {__version__}"


@functools.cache
def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        model = re.search(r"model name\s*: (.*)", information.read_text())
        if model is not None:
            return model.group(1)
    return platform.processor() or platform.machine()


def default_path() -> Path:
    """`s3d_kernels/measurements.json` in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # as the XDG specification wants it
        folder = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(folder) / "s3d_kernels" / "measurements.json"


# Plain globals: a ContextVar is not seen by the thread that runs backward.
_store: MeasurementStore | None = None
_tuning = False

Cache = TypeVar("Cache", bound="dict[Any, Any] | set[Any]")
_dependents: list[dict[Any, Any] | set[Any]] = []


def store() -> MeasurementStore:
    """The measurements in use."""
    global _store
    if _store is None:
        _store = MeasurementStore(default_path())
    return _store


def is_tuning() -> bool:
    """Whether what has no measurement is to be measured now."""
    return _tuning


def dropped_with_measurements(cache: Cache) -> Cache:
    """The cache itself, which from now on is emptied whenever other measurements may be in use."""
    _dependents.append(cache)
    return cache


def drop_dependents() -> None:
    """Empty all caches of :func:`dropped_with_measurements`."""
    for cache in _dependents:
        cache.clear()


def load_measurements(path: str | os.PathLike[str]) -> None:
    """Use the measurements of a file from now on, in place of those in the user's cache folder.

    For runs of several processes, which must all choose the same backends: give each the same file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no measurements.
    """
    loaded = MeasurementStore(Path(path))
    try:
        loaded.read()
    except ValueError as error:
        raise ValueError(f"{path} is no file of measurements: {error}") from error
    _use(loaded)


def _use(other: MeasurementStore) -> None:
    global _store
    _store = other
    drop_dependents()


@contextlib.contextmanager
def tuning(path: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Measure inside what has no measurement on this machine, and keep it for this process and later ones.

    Every operator that is called with the backend "auto", forward or backward, times all backends that can compute it
    on the tensors that it was called with, and goes on with the fastest. So run one training step of every kind inside.
    Nothing is measured while a CUDA graph is captured.

    Args:
        path: the file to use from now on, also behind the context; default: the present one, which is
            `s3d_kernels/measurements.json` in the user's cache folder if :func:`load_measurements` was not called.
    Raises:
        RuntimeError: this is one of several processes of a distributed run, which might choose differently.
    """
    global _tuning
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise RuntimeError(
                f"tuning is for one process, and this is one of {ranks}, which would choose different backends: tune "
                "in a process of its own before, and call load_measurements with the same file in all of them"
            )
    if path is not None:
        _use(MeasurementStore(Path(path)))
    before, _tuning = _tuning, True
    drop_dependents()
    try:
        yield
    finally:
        _tuning = before


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of a call that computes on a device, after one that is not timed.

    Short calls are timed several at once, in seven batches; calls that take long, fewer times within about a second.
    """

    def batch(calls: int) -> float:
        """Milliseconds of one of so many calls."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / calls * 1e3

    batch(1)
    times = [batch(1)]
    calls = min(math.ceil(_BATCH_MS / max(times[0], 1e-6)), _MAX_CALLS)
    spent = times[0]
    while len(times) < _BATCHES and spent < _LIMIT_MS:
        times.append(batch(calls))
        spent += times[-1] * calls
    return statistics.median(times)
