"""Checkpoints: written atomically, made of plain types and tensors only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary file and rename, so that a killed run never leaves half a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        torch.save({"format_version": FORMAT_VERSION, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint. Executes no code from the file.

    Returns: "step", "config" (all settings), "network" (state dict of the plain ResEnc U-Net, with the names that
        nnU-Net users know), "method" (mask tokens and densification) and the state of the optimiser.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of s3d, or of a newer version.
    """
    try:
        content: Any = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a readable s3d checkpoint: {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has checkpoint format {version!r}, this version reads {FORMAT_VERSION}")
    return dict(content)
