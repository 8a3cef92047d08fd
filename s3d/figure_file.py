"""Pictures of the documentation as files that tell whether they are up to date."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3d.data.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def digest(shown: Any) -> str:
    """SHA-256 of what a figure shows, as lists, dictionaries, numbers and text."""
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def write_figure(path: Path, figure: Figure, shown: str) -> None:
    """Write a figure as PNG that carries the digest of what it shows: a test compares it with the code of today.

    Raises:
        OSError: it could not be written.
    """
    content = io.BytesIO()
    # Without the version of matplotlib, so that the same figure gives the same file.
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None, "Description": shown})
    write_atomically(path, content.getvalue())
