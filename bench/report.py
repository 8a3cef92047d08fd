"""Tables and plots of measured results, and the parts of the documents that show them.

python bench/report.py            all folders of bench/results, README.md and docs/performance.md
python bench/report.py FOLDER     one folder of results only
python bench/report.py --check    writes nothing; fails if a text is not what the results say

A document has a pair of comments where a table belongs: `<!-- table: MACHINE NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from plots import draw
from rows import AXES, QUESTIONS, Row, best_dense, curve_points, of_case, read_rows, setting_of, speed_up

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/performance.md")

Rows = Sequence[Row]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="results of one machine; default: all, and the documents")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a text would change")
    options = parser.parse_args()
    results = ROOT / "bench" / "results"
    folders = [options.folder] if options.folder else sorted({path.parent for path in results.glob("*/*.json")})
    tables: dict[str, str] = {}
    stale: list[Path] = []
    for folder in folders:
        found = tables_of(*read_all(folder), folder) if options.check else write_folder(folder)
        tables.update({f"{folder.name} {name}": table for name, table in found.items()})
        if options.check:
            paths = {folder / f"{name}.md": table + "\n" for name, table in found.items()}
            stale += [
                path for path, text in paths.items() if not path.exists() or path.read_text(encoding="utf-8") != text
            ]
    for path in [] if options.folder else [ROOT / name for name in DOCUMENTS]:
        document = path.read_text(encoding="utf-8")
        new = insert(document, tables, path.name)
        if options.check:
            stale += [path] if new != document else []
        else:
            path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"not what the results say, run bench/report.py: {path}")
    return 1 if stale else 0


def write_folder(folder: Path) -> dict[str, str]:
    """Write the tables and plots of one machine beside its results. Returns: the tables by name."""
    machine, rows = read_all(folder)
    tables = tables_of(machine, rows, folder)
    for name, table in tables.items():
        (folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    draw(rows, machine, folder)
    return tables


def read_all(folder: Path) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """The machine of a folder, and its rows by question."""
    read = {question: read_rows(folder, question) for question in QUESTIONS}
    machine = next((about for about, rows in read.values() if rows), None)
    if machine is None:
        raise FileNotFoundError(f"{folder} has no results; `pytest bench/ --benchmark` writes them")
    return machine, {question: rows for question, (_, rows) in read.items()}


def insert(document: str, tables: dict[str, str], name: str) -> str:
    """The document with its tables.

    Raises:
        ValueError: a table is asked for that there is not.
    """

    def table(match: re.Match[str]) -> str:
        if match[1] not in tables:
            raise ValueError(f"{name} shows the table {match[1]!r}; there are {', '.join(sorted(tables))}")
        return f"<!-- table: {match[1]} -->\n{tables[match[1]]}\n<!-- end of table -->"

    return re.sub(r"<!-- table: ([^>]*?) -->.*?<!-- end of table -->", table, document, flags=re.DOTALL)


# ---- tables


def tables_of(machine: dict[str, Any], rows: dict[str, list[Row]], folder: Path) -> dict[str, str]:
    """Every table that the rows of a folder give, by name."""
    makers: dict[str, tuple[str, Callable[[Rows], list[str]]]] = {
        "encoder": ("encoder", network_table),
        "encoder-summary": ("encoder", summary_table),
        "step": ("step", network_table),
        "step-summary": ("step", summary_table),
        "layers": ("layer", layer_tables),
        "curve": ("curve", curve_table),
    }
    made = {name: (question, make(rows[question])) for name, (question, make) in makers.items()}
    return {
        name: "\n".join([*lines, "", _machine_line(machine, folder, question, rows[question])])
        for name, (question, lines) in made.items()
        if lines
    }


def _machine_line(machine: dict[str, Any], folder: Path, question: str, rows: Rows) -> str:
    """Where figures come from: the machine, versions, days and the file."""
    versions = machine["versions"]
    others = "".join(f", {name} {versions[name]}" for name in ("triton", "spconv-cu120") if name in versions)
    days = sorted({row.run[:10] for row in rows})
    runs = len({row.run for row in rows})
    path = folder.resolve() / f"{question}.json"
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return (
        f"{machine['device']} ({machine['instruction_set']}), torch {versions['torch']}{others}, Python "
        f"{machine['python']}; {' and '.join(days)}{f', {runs} runs' if runs > 1 else ''}; `{shown}`."
    )


def _table(head: Sequence[str], left: int, body: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; the first `left` columns are words, the others numbers."""
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]


def _describe(case: Case) -> str:
    """What a table's caption says of a case besides its mask ratio."""
    batch = "one patch" if case.batch_size == 1 else f"{case.batch_size} patches"
    masks = f"blocks of {case.block}" if case.mask_kind == "blocks" else "single voxels masked"
    return f"{case.preset}, {batch} of {case.patch_size}^3, {masks}, {case.dtype}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def _duration(row: Row, phase: str) -> str:
    """Median and half of the spread, in per cent of it."""
    median = row.median[phase]
    spread = f" ±{50 * row.spread[phase] / median:.0f} %"
    return (f"{median:.2f} s" if median >= 1 else f"{1000 * median:.3g} ms") + spread


def _settings(rows: Rows) -> list[Case]:
    return list(dict.fromkeys(setting_of(row.case) for row in rows))


def _in(rows: Rows, setting: Case) -> list[Row]:
    return [row for row in rows if setting_of(row.case) == setting]


def network_table(rows: Rows) -> list[str]:
    """Encoder or training step: every ratio and contender."""
    parts: list[str] = []
    for setting in _settings(rows):
        mine = sorted(_in(rows, setting), key=lambda row: row.case.mask_ratio)
        body: list[list[str]] = []
        for row in mine:
            same = of_case(mine, row.case)
            dense_masked, dense = same.get("dense masked"), best_dense(same.values())
            peak, base = row.peak_mebibytes, dense_masked.peak_mebibytes if dense_masked else None
            body.append(
                [
                    f"{100 * row.masked:.0f} %",
                    row.contender,
                    *[_duration(row, phase) for phase in ("forward", "backward", "both")],
                    _times(speed_up(dense_masked, row)),
                    _times(speed_up(dense, row)),
                    f"{1e9 * row.median['both'] / row.figures['visible_voxels']:.0f}",
                    "" if peak is None else f"{peak:.0f}",
                    "" if peak is None or base is None else f"{peak / base:.2f}x",
                ]
            )
        head = ["masked", "contender", "forward", "backward", "both", "faster than dense masked", "than dense, best"]
        head += ["ns / visible voxel", "peak memory, MiB", "of dense masked"]
        parts += [f"{setting.question.capitalize()}: {_describe(setting)}.", "", *_table(head, 2, body), ""]
    return parts[:-1]


def summary_table(rows: Rows) -> list[str]:
    """The first setting alone, a line for each ratio: for newcomers."""
    if not rows:
        return []
    setting = _settings(rows)[0]
    mine = sorted(_in(rows, setting), key=lambda row: row.case.mask_ratio)
    names = [name for name in dict.fromkeys(row.contender for row in mine) if not name.startswith("dense")]
    body = []
    for case in dict.fromkeys(row.case for row in mine):
        same = of_case(mine, case)
        dense_masked, dense, ours = same.get("dense masked"), best_dense(same.values()), same.get(names[0])
        cells = [f"{100 * next(iter(same.values())).masked:.0f} %"]
        for row in (*[same.get(name) for name in names], dense_masked, dense):
            cells.append("" if row is None else _duration(row, "both"))
        cells += [_times(speed_up(base, ours)) for base in (dense_masked, dense)]
        peaks = [row.peak_mebibytes if row else None for row in (ours, dense_masked)]
        cells.append("" if peaks[0] is None or peaks[1] is None else f"{peaks[0] / peaks[1]:.2f}x")
        body.append(cells)
    head = ["masked", *[f"`{name}`" for name in names], "dense masked", "dense, best"]
    head += [f"`{names[0]}`: faster than dense masked", "than dense, best", "its peak memory, of dense masked"]
    what = "Encoder" if setting.question == "encoder" else "Training step of S3D"
    return [f"{what}, forward and backward: {_describe(setting)}.", "", *_table(head, 0, body)]


def layer_tables(rows: Rows) -> list[str]:
    """Every layer and contender, a table for each setting and mask ratio."""
    parts: list[str] = []
    for setting in _settings(rows):
        for ratio in dict.fromkeys(row.case.mask_ratio for row in _in(rows, setting)):
            mine = [row for row in _in(rows, setting) if row.case.mask_ratio == ratio]
            names = list(dict.fromkeys(row.contender for row in mine))
            body = []
            for case in dict.fromkeys(row.case for row in mine):
                same = of_case(mine, case)
                cells = [case.layer]
                for name in names:
                    cells.append(_layer_cell(same[name]) if name in same else "")
                cells += [_times(speed_up(same.get("dense masked"), same.get("native")))]
                body.append([*cells, _times(speed_up(best_dense(same.values()), same.get("native")))])
            head = ["layer", *names, "`native`: faster than dense masked", "than dense, best"]
            caption = (
                f"Layers: {_describe(setting)}, {100 * mine[0].masked:.0f} % masked. Milliseconds: forward / both."
            )
            parts += [caption, "", *_table(head, 1, body), ""]
    return parts[:-1]


def _layer_cell(row: Row) -> str:
    cell = f"{1000 * row.median['forward']:.3g} / {1000 * row.median['both']:.3g}"
    if row.contender.startswith("dense") or row.utilisation is None:
        return cell
    unit = "GFLOP/s" if row.multiplies else "GB/s"
    return f"{cell} ({row.rate / 1e9:.3g} {unit}, {row.utilisation:.2f})"


# ---- cost curve


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """k of the power law y = a * x ** k that fits the points best, in logarithms."""
    x, y = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def curve_table(rows: Rows) -> list[str]:
    """Time and memory of a training step against each axis, and the exponents that fit."""
    points = curve_points(rows)
    if not points:
        return []
    base = next(iter(points.values()))[0].case
    body = []
    for axis, along in points.items():
        at = [AXES[axis](row) for row in along]
        seconds = [row.median["both"] for row in along]
        peaks = [row.peak_mebibytes or float("nan") for row in along]
        body.append(
            [
                axis,
                ", ".join(f"{x:.3g}" for x in at),
                ", ".join(f"{s:.3g}" for s in seconds),
                f"{exponent(list(zip(at, seconds, strict=True))):.2f}",
                ", ".join(f"{p:.0f}" for p in peaks),
                f"{exponent(list(zip(at, peaks, strict=True))):.2f}",
            ]
        )
    head = ["varied", "values", "step, s", "exponent", "peak memory, MiB", "exponent"]
    return [
        f"Training step of S3D with `auto`, {base.preset}, {base.dtype}, one thing varied at a time: time and memory "
        "grow as (what is varied) ^ exponent.",
        "",
        *_table(head, 2, body),
    ]


if __name__ == "__main__":
    sys.exit(main())
