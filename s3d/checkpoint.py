"""Checkpoints: written atomically, made of plain types and tensors only."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

FORMAT_VERSION = 1
NEWEST = "checkpoint.pt"
PREVIOUS = "checkpoint_previous.pt"

Weights = Literal["raw", "ema"]

log = logging.getLogger(__name__)


class DamagedCheckpointError(ValueError):
    """A file that cannot be read as a checkpoint."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; the one that was there stays beside it as ``checkpoint_previous.pt``.

    Whenever the process or the machine stops, or the disk is full, `path` is what it was before or complete.

    Raises:
        OSError: it could not be written.
    """
    save_atomically(path, {"format_version": FORMAT_VERSION, **content}, previous=path.with_name(PREVIOUS))


def save_atomically(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """torch.save, whole or not at all.

    Args:
        path: of the file; its folder is made.
        content: of the file.
        previous: name under which the file that is there now is kept.
    Raises:
        OSError: it could not be written; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer hides what the system said in a RuntimeError
        raise OSError(
            f"{path} could not be written ({error}); what was there before is untouched. Make room, then run the same "
            "command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _keep(path: Path, previous: Path) -> None:
    """A second name for a file, so that there is no moment without it under the first."""
    link = previous.with_name(previous.name + ".partial")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # file systems without links
        shutil.copyfile(path, link)
    os.replace(link, previous)


def find_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a folder that can be read, or None if there is none at all.

    One that cannot be read is named in a warning.

    Raises:
        DamagedCheckpointError: there are checkpoints, but none can be read.
        ValueError: one is of a newer version.
    """
    damaged: DamagedCheckpointError | None = None
    for path in (folder / NEWEST, folder / PREVIOUS):
        with contextlib.suppress(FileNotFoundError):
            try:
                found = load_checkpoint(path)
            except DamagedCheckpointError as error:
                damaged = error
                continue
            if damaged is not None:
                log.warning("%s; going on from %s, step %d", damaged, path, found["step"])
            return path, found
    if damaged is not None:
        raise damaged
    return None


def put_damaged_aside(folder: Path) -> None:
    """Rename the newest checkpoint, which cannot be read, so that the good one before it keeps its place.

    Call it in one process, when all have found theirs.
    """
    with contextlib.suppress(FileNotFoundError):
        os.replace(folder / NEWEST, folder / "checkpoint_damaged.pt")


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint. Executes no code from the file.

    Returns: "step", "config" (all settings), "network" (state dict of the plain ResEnc U-Net, with the names that
        nnU-Net users know), "method" (mask tokens and densification) and the state of the optimiser; "ema" and
        "ema_method", their moving averages, if the run kept them.
    Raises:
        FileNotFoundError: no such file.
        DamagedCheckpointError: not a file of torch.save, or half of one.
        ValueError: not a checkpoint of s3d, or of a newer version.
    """
    try:
        content: Any = torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError, torch.OutOfMemoryError):  # which say nothing of the content
        raise
    except Exception as error:
        raise DamagedCheckpointError(f"{path} is not a readable s3d checkpoint: {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has checkpoint format {version!r}, this version reads {FORMAT_VERSION}")
    return dict(content)


def weights_of(saved: dict[str, Any], weights: Weights, checkpoint: str) -> dict[str, torch.Tensor]:
    """Weights of the plain network of a checkpoint.

    Args:
        saved: content of the checkpoint.
        weights: "raw": as trained; "ema": their moving average.
        checkpoint: its file, for the message.
    Raises:
        ValueError: it has no such weights.
    """
    entry = {"raw": "network", "ema": "ema"}[weights]
    if entry not in saved:
        why = ", because its run kept no average; accepted: raw" if weights == "ema" else "; it is not whole"
        raise ValueError(f"weights {weights}: {checkpoint} has none{why}")
    return dict(saved[entry])
