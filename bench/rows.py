"""Measured entries as rows: a case, a contender, and what it needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case
from results import load

PHASES = ("forward", "backward", "both")
QUESTIONS = ("encoder", "step", "layer", "curve")
DENSE = ("dense", "dense channels-last")


@dataclass(frozen=True)
class Row:
    """What one contender needed for one case.

    Attributes:
        case, contender: what was measured.
        median: seconds, by phase ("forward", "backward", "both").
        spread: seconds between the quartiles, by phase.
        figures: other figures by name; see ``turns``.
    """

    case: Case
    contender: str
    median: dict[str, float]
    spread: dict[str, float]
    figures: dict[str, Any]

    @property
    def masked(self) -> float:
        """The share that really is masked: a grid of 27 blocks has no 75 %."""
        share: float = 1 - self.figures["visible_voxels"] / self.figures["voxels"]
        return share

    @property
    def run(self) -> str:
        """When the run began that measured it."""
        return str(self.figures["run"])

    @property
    def peak_mebibytes(self) -> float | None:
        return self.figures.get("peak_mebibytes")

    @property
    def utilisation(self) -> float | None:
        """Forward, as a share of the best that the machine does: a matrix product, or a copy if none is needed."""
        if "flop" not in self.figures:
            return None
        best: float = self.figures["multiplication_flop_per_second" if self.multiplies else "copy_bytes_per_second"]
        return self.rate / best

    @property
    def multiplies(self) -> bool:
        return bool(self.figures["flop"] > 0)

    @property
    def rate(self) -> float:
        """Forward: FLOP/s of visible pairs; bytes/s where nothing is multiplied."""
        work: float = self.figures["flop" if self.multiplies else "forward_bytes"]
        return work / self.median["forward"]


def read_rows(folder: Path, question: str) -> tuple[dict[str, Any], list[Row]]:
    """The machine, and the rows of a question whose phases were all measured, in the order of their settings."""
    content = load(folder / f"{question}.json")
    entries: dict[tuple[Case, str], dict[str, Any]] = {}
    names = [field.name for field in dataclasses.fields(Case)]
    for entry in content["benchmarks"]:
        extra = entry["extra_info"]
        case = Case(**{name: extra[name] for name in names})
        entries.setdefault((case, extra["contender"]), {})[extra["phase"]] = entry
    rows = []
    for (case, contender), phases in entries.items():
        if set(phases) != set(PHASES):
            continue  # of a run that was stopped between them, or was asked for one of them
        median = {phase: entry["stats"]["median"] for phase, entry in phases.items()}
        spread = {phase: entry["stats"]["iqr"] for phase, entry in phases.items()}
        figures = next(iter(phases.values()))["extra_info"]
        rows.append(Row(case, contender, median, spread, figures))
    return content["machine_info"], sorted(rows, key=lambda row: _order(row.case))


def _order(case: Case) -> tuple[Any, ...]:
    """The usual settings first, the larger ones behind; not when they were measured."""
    unusual = (case.mask_kind != "blocks", case.dtype != "float32", case.preset != "resenc-l")
    return (*unusual, case.patch_size, case.batch_size, -case.block, case.threads)


def setting_of(case: Case) -> Case:
    """A case without what tables and plots vary: the mask ratio and the layer."""
    return dataclasses.replace(case, mask_ratio=0.0, layer="")


def of_case(rows: Iterable[Row], case: Case) -> dict[str, Row]:
    """Those of a case, by contender."""
    return {row.contender: row for row in rows if row.case == case}


def best_dense(rows: Iterable[Row]) -> Row | None:
    """The faster memory format of the dense layer or network: the honest baseline."""
    return min((row for row in rows if row.contender in DENSE), key=lambda row: row.median["both"], default=None)


def speed_up(base: Row | None, row: Row | None) -> float | None:
    """How many times faster `row` is, forward and backward; None if one of them is not there."""
    return None if base is None or row is None else base.median["both"] / row.median["both"]


# ---- cost curve

# What is varied -> how it is read off a row.
AXES: dict[str, Callable[[Row], float]] = {
    "patch side": lambda row: row.case.patch_size,
    "batch": lambda row: row.case.batch_size,
    "visible share": lambda row: 1 - row.masked,
    "threads": lambda row: row.figures["threads_used"],
}


def curve_points(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows along each axis, in which all else is as in the case that the axes share."""
    cases = [row.case for row in rows]
    if not cases:
        return {}
    base = max(cases, key=lambda case: sum(_differences(case, other) <= 1 for other in cases))
    fields = {"patch side": "patch_size", "batch": "batch_size", "visible share": "mask_ratio", "threads": "threads"}
    points = {}
    for axis, name in fields.items():
        along = [row for row in rows if dataclasses.replace(row.case, **{name: getattr(base, name)}) == base]
        if len(along) > 1:
            points[axis] = sorted(along, key=AXES[axis])
    return points


def _differences(a: Case, b: Case) -> int:
    return sum(getattr(a, field.name) != getattr(b, field.name) for field in dataclasses.fields(Case))
