"""protocol.json: what the runs of a folder were made with, so that a folder never holds two comparisons."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s3d.data.store import write_atomically

from .protocol import Protocol, slug_of

KEPT = "protocol.json"


def known_methods(output: Path) -> tuple[str, ...]:
    """Methods that a folder may have runs of."""
    return tuple(_read(output).get("methods", {}))


def keep_protocol(protocol: Protocol, output: Path) -> None:
    """Note what the folder is made with. It may grow by methods, data sets, label counts and seeds, or lose some for a
    while; what made the runs that it holds stays.

    Raises:
        ValueError: as `check_protocol`.
    """
    check_protocol(protocol, output)
    before, now = _read(output), _plain(protocol)
    for name in ("methods", "datasets"):
        now[name] = {**before.get(name, {}), **now[name]}
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / KEPT, (json.dumps(now, indent=2) + "\n").encode())


def check_protocol(protocol: Protocol, output: Path) -> None:
    """That the folder has no runs that were made with anything else.

    Raises:
        ValueError: a method, a data set or the budget was another one before; names what differs.
    """
    before, now = _read(output), _plain(protocol)
    different: list[str] = []
    if before:
        for name in ("budget", "pretraining_seeds", "first_seed"):
            different += _differences(name, before[name], now[name])
        for name in ("methods", "datasets"):
            folders = {slug_of(one): one for one in before[name]}
            for one in now[name]:
                other = folders.get(slug_of(one), one)
                if other != one:  # what was made under the other name would be taken for its own
                    different.append(f"{name}.{one} (was called {other!r}, in the same folders)")
                elif one in before[name]:
                    different += _differences(f"{name}.{one}", before[name][one], now[name][one])
    if different:
        raise ValueError(
            f"output_dir {output} holds runs of another protocol: {'; '.join(sorted(different))}. Give the protocol as "
            "it was (more methods, data sets, label counts or seeds are fine), or another output_dir."
        )


def _plain(protocol: Protocol) -> dict[str, Any]:
    """What decides how runs come out."""
    content = {
        "budget": None if protocol.budget is None else dataclasses.asdict(protocol.budget),
        "pretraining_seeds": protocol.pretraining_seeds,
        # All seeds begin with the pre-training of this one.
        "first_seed": protocol.seeds[0] if protocol.pretraining_seeds == "one" else None,
        "methods": {
            method.name: {
                "pretraining": method.pretraining,
                "finetuning": {**protocol.finetuning, **method.finetuning},
            }
            for method in protocol.methods
        },
        "datasets": {
            dataset.name: {
                "folder": dataset.folder,
                "validation_cases": dataset.validation_cases,
                "finetuning": dataset.finetuning,
            }
            for dataset in protocol.datasets
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _differences(place: str, before: Any, now: Any) -> list[str]:
    """Entries that differ, each as one line."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        missing = "not given"
        return [
            line
            for name in sorted({*before, *now})
            for line in _differences(f"{place}.{name}", before.get(name, missing), now.get(name, missing))
        ]
    return [] if before == now else [f"{place} (was {before!r}, is {now!r})"]


def _read(output: Path) -> dict[str, Any]:
    file = output / KEPT
    if not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
