"""Measured entries in files: one for each question and machine, as pytest-benchmark writes its own.

`pytest-benchmark compare` reads them. An entry belongs to a run; a new run replaces all entries of the cases that it
measures, so that ratios within a case are ratios within a run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pytest_benchmark.utils import get_commit_info

Entry = dict[str, Any]


class Results:
    """The files of a folder, while a run adds to them.

    Args:
        folder: where they are.
        machine: as ``machine.describe_machine`` says.
        run: a name for the run: when it began.
    """

    def __init__(self, folder: Path, machine: dict[str, Any], run: str) -> None:
        self.folder = folder
        self.written = False
        self._machine = machine
        self._run = run
        self._commit = get_commit_info()
        self._entries: dict[str, list[Entry]] = {}
        self._unsaved: set[str] = set()

    def add(self, question: str, case: str, entry: Entry) -> None:
        """Add an entry of pytest-benchmark to those of its question; :meth:`save` writes them.

        Raises:
            ValueError: the file has results of another machine.
        """
        path = self.folder / f"{question}.json"
        if question not in self._entries:
            present = load(path)
            here = self._machine["device"]
            there = present["machine_info"].get("device", here)
            if there != here:
                raise ValueError(f"{path} has results of {there}, and this is {here}: give another folder as --results")
            self._entries[question] = present["benchmarks"]
        entries = self._entries[question]
        entry = {**entry, "params": None, "options": {}}  # a case is no JSON, and its fields are in extra_info
        entry["extra_info"] = {**entry["extra_info"], "case": case, "run": self._run}
        entry["extra_info"].update(commit=self._commit["id"], versions=self._machine["versions"])
        entries[:] = [e for e in entries if e["extra_info"]["case"] != case or e["extra_info"]["run"] == self._run]
        entries.append(entry)
        self._unsaved.add(question)

    def save(self) -> None:
        """Write what was added. Called behind every case, so that a run that is killed loses the one it measures."""
        for question in self._unsaved:
            content = {
                "machine_info": self._machine,
                "commit_info": self._commit,
                "benchmarks": self._entries[question],
                "datetime": self._run,
                "version": "1",
            }
            save(self.folder / f"{question}.json", content)
            self.written = True
        self._unsaved.clear()


def load(path: Path) -> dict[str, Any]:
    """The content of a file of results; one without entries if there is none.

    Raises:
        ValueError: it is no such file.
    """
    if not path.exists():
        return {"machine_info": {}, "benchmarks": []}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for entry in content["benchmarks"]:
            entry["fullname"], entry["stats"]["median"], entry["stats"]["iqr"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of pytest-benchmark: {type(error).__name__}: {error}") from error
    return content


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a file of results, an entry a line, so that differences between two can be read."""
    head = {key: value for key, value in content.items() if key != "benchmarks"}
    lines = ",\n".join(json.dumps(_rounded(entry)) for entry in content["benchmarks"])
    text = json.dumps(head, indent=1)[:-2] + f',\n "benchmarks": [\n{lines}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _rounded(value: Any) -> Any:
    """Seven digits are more than any clock gives."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value
