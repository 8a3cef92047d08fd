"""What became slower between two files of results.

python bench/compare.py BEFORE.json AFTER.json

Compares the entries that both have and names those whose median grew by more than the larger of both spreads (between
the quartiles) and by more than --threshold. Exit status: 0 if there are none, 1 if there are some, 2 if nothing can be
compared. Files of pytest-benchmark work too.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from results import load


@dataclass(frozen=True)
class Change:
    """An entry of two files.

    Attributes:
        name: of the entry.
        before, after: median seconds.
        spread: seconds between the quartiles, of the wider one.
    """

    name: str
    before: float
    after: float
    spread: float

    def is_slower(self, threshold: float) -> bool:
        """Whether it takes longer by more than the spread and a share of what it took."""
        return self.after - self.before > max(self.spread, threshold * self.before)

    def __str__(self) -> str:
        growth, spread = self.after / self.before - 1, self.spread / self.before
        times = f"{1e3 * self.before:.4g} -> {1e3 * self.after:.4g} ms"
        return f"{self.name}: {times} ({100 * growth:+.0f} %, spread {100 * spread:.0f} %)"


def changes(before: Path, after: Path) -> list[Change]:
    """Of the entries that both files have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: they have no entry in common.
    """
    for path in (before, after):
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
    old, new = ({entry["fullname"]: entry["stats"] for entry in load(path)["benchmarks"]} for path in (before, after))
    common = [name for name in old if name in new]
    if not common:
        raise ValueError(f"{before} and {after} have no entry in common")
    return [
        Change(name, old[name]["median"], new[name]["median"], max(old[name]["iqr"], new[name]["iqr"]))
        for name in common
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="share that is never worth a word (default: 0.05)"
    )
    options = parser.parse_args(arguments)
    try:
        compared = changes(options.before, options.after)
    except (FileNotFoundError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    devices = [
        load(path)["machine_info"].get("device", "an unknown machine") for path in (options.before, options.after)
    ]
    if devices[0] != devices[1]:
        print(f"different machines: {devices[0]} and {devices[1]}; the figures say little")
    slower = [change for change in compared if change.is_slower(options.threshold)]
    for change in sorted(slower, key=lambda change: change.before / change.after):
        print(f"slower: {change}")
    print(f"{len(slower)} of {len(compared)} became slower")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
