"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """Those that train together, seen from one of them.

    Attributes:
        rank: number of this one.
        world: how many there are.
        device: of this one.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def total(self, *values: float | torch.Tensor) -> list[float]:
        """Sums over all processes, float64."""
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in values])
        if self.world > 1:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return [float(value) for value in sums]

    def gather(self, value: Any) -> list[Any]:
        """A small object of every process, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """Every world-th of some items, so that each process has its own."""
        return items[self.rank :: self.world]


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, for as long as the context lasts; alone without it.

    GPUs talk through NCCL, CPUs through gloo.

    Args:
        device: as in ``RunSettings``.
    Raises:
        ValueError: no such device here.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(0, 1, choose_device(device))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto" and torch.cuda.is_available():
        device = "cuda"
    if ":" in device:
        raise ValueError(f"device must be a kind such as cuda where several processes train, got {device!r}")
    own = choose_device(f"cuda:{local}" if device == "cuda" else device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    yield Processes(dist.get_rank(), world, own)
    # Not after an error: it would wait for the others, which wait for this one. torchrun ends them all.
    dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is cuda where there is one, otherwise the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise ValueError(f"device must be auto, cpu or a device of this machine, got {name!r}: {error}") from error
    return device
