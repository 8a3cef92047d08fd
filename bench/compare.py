"""What became slower between two files of results.

python bench/compare.py BEFORE.json AFTER.json

Compares the entries that both have and names those whose median grew by more than the larger of both spreads (between
the quartiles) and by more than --threshold; and those that were not measured again. Between two runs the speed of a
machine may differ: --relative-to "dense masked" compares multiples of a contender's time in the same run. Exit status:
0 if nothing became slower, 1 if something did, 2 if nothing can be compared. Files of pytest-benchmark work too.
"""

from __future__ import annotations

import argparse
import operator
import sys
from dataclasses import dataclass
from pathlib import Path

from results import load


@dataclass(frozen=True)
class Change:
    """An entry of two files.

    Attributes:
        name: of the entry.
        before, after: medians.
        spread: between the quartiles, of the wider one.
    """

    name: str
    before: float
    after: float
    spread: float

    def is_slower(self, threshold: float) -> bool:
        """Whether it takes longer by more than the spread and a share of what it took."""
        return self.after - self.before > max(self.spread, threshold * self.before)

    def say(self, unit: str) -> str:
        growth, spread = self.after / self.before - 1, self.spread / self.before
        times = f"{self.before:.4g} -> {self.after:.4g} {unit}"
        return f"{self.name}: {times} ({100 * growth:+.0f} %, spread {100 * spread:.0f} %)"


def changes(before: Path, after: Path, base: str | None) -> tuple[list[Change], list[str]]:
    """Of the entries that both files have; and the names of those that only the former has.

    Args:
        before, after: the files.
        base: a contender; times are then multiples of its median in the same case and phase, which do not change with
            the speed of the whole machine.
    Raises:
        FileNotFoundError: no such file.
        ValueError: a file is not one of pytest-benchmark, or they have no entry in common.
    """
    for path in (before, after):
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
    old, new = (_times(path, base) for path in (before, after))
    common = [name for name in old if name in new]
    if not common:
        raise ValueError(f"{before} and {after} have no entry in common" + (f" beside one of {base}" if base else ""))
    found = [Change(name, old[name][0], new[name][0], max(old[name][1], new[name][1])) for name in common]
    return found, [name for name in old if name not in new]


def _times(path: Path, base: str | None) -> dict[str, tuple[float, float]]:
    """Median and spread of each entry, by name."""
    entries = load(path)["benchmarks"]
    if base is None:
        return {entry["fullname"]: (entry["stats"]["median"], entry["stats"]["iqr"]) for entry in entries}
    key = operator.itemgetter("case", "phase")
    bases = {key(e["extra_info"]): e["stats"]["median"] for e in entries if e["extra_info"].get("contender") == base}
    return {
        entry["fullname"]: (entry["stats"]["median"] / unit, entry["stats"]["iqr"] / unit)
        for entry in entries
        if (unit := bases.get(key(entry["extra_info"]))) and entry["extra_info"]["contender"] != base
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, help="share not worth a word (default: %(default)s)")
    parser.add_argument("--relative-to", metavar="CONTENDER", help="compare multiples of this contender's times")
    options = parser.parse_args(arguments)
    try:
        compared, gone = changes(options.before, options.after, options.relative_to)
        machines = [load(path)["machine_info"] for path in (options.before, options.after)]
    except (FileNotFoundError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    devices = [machine.get("device", "an unknown machine") for machine in machines]
    if devices[0] != devices[1]:
        print(f"different machines: {devices[0]} and {devices[1]}; the figures say little")
    for name in gone:
        print(f"not measured again: {name}")
    slower = [change for change in compared if change.is_slower(options.threshold)]
    unit = "s" if options.relative_to is None else f"x {options.relative_to}"
    for change in sorted(slower, key=lambda change: change.before / change.after):
        print(f"slower: {change.say(unit)}")
    print(f"{len(slower)} of {len(compared)} became slower, {len(gone)} were not measured again")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
