"""Tables and plot of examples/hippocampus.py."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from s3d.segmentation.comparison import Interval, mean_score, mean_with_interval, signed_rank_test

PUBLISHED = ("sawtooth", "encoder+decoder")
SCRATCH = ("scratch", "")


@dataclass(frozen=True)
class Result:
    """A run and its scores.

    Attributes:
        part: of the experiment.
        schedule, scope: of the run; the scope of one from scratch is empty.
        labels: training cases; 0: those of nnU-Net's first fold.
        seed: of the run.
        steps: of the run.
        seconds: of its steps.
        classes: names, without the background.
        dice: of each test case and class, [cases, classes].
        folder: of the run.
    """

    part: str
    schedule: str
    scope: str
    labels: int
    seed: int
    steps: int
    seconds: float
    classes: tuple[str, ...]
    dice: NDArray[np.float64]
    folder: Path

    @property
    def kind(self) -> tuple[str, str]:
        return self.schedule, self.scope


def write_results(results: Sequence[Result], pretraining: str, output: Path) -> str:
    """Write results.csv, results.md and labels.png.

    Args:
        results: of all runs.
        pretraining: a sentence about it.
        output: folder of the files.
    Returns: the Markdown.
    """
    short = [result for result in results if result.part != "a"]
    parts = [_long_runs([result for result in results if result.part == "a"])]
    labels = sorted({result.labels for result in short if result.part == "b"})
    if len(labels) > 1:
        parts.append(_by_labels(short, labels))
        _plot(short, labels).savefig(output / "labels.png", dpi=110)
        parts.append("![Dice against number of labels](labels.png)")
    parts.append(_by_schedule(short))
    parts.append(_runs(results, pretraining))
    markdown = "\n\n".join(part for part in parts if part) + "\n"
    (output / "results.md").write_text(markdown, encoding="utf-8")
    with open(output / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["part", "schedule", "scope", "labels", "seed", "steps", "seconds", "dice", *results[0].classes]
        )
        for result in results:
            means = [f"{mean:.4f}" for mean in (_case_dice(result).mean(), *np.nanmean(result.dice, axis=0))]
            row = [result.part, result.schedule, result.scope, result.labels or "fold 0", result.seed, result.steps]
            writer.writerow([*row, f"{result.seconds:.0f}", *means])
    return markdown


def _case_dice(result: Result) -> NDArray[np.float64]:
    """Mean over the classes, [cases]."""
    return mean_score(result.dice, axis=-1)


def _table_of(results: Sequence[Result], kind: tuple[str, str], labels: int) -> NDArray[np.float64]:
    """[seeds, cases], seeds in order."""
    chosen = [result for result in results if result.kind == kind and result.labels == labels]
    return np.array([_case_dice(result) for result in sorted(chosen, key=lambda result: result.seed)])


def _difference(table: NDArray[np.float64], to: NDArray[np.float64]) -> tuple[Interval, float]:
    """Of runs of the same seeds on the same cases; the p-value is of the cases' means over seeds."""
    return mean_with_interval(table - to), signed_rank_test(to.mean(axis=0), table.mean(axis=0))


def _table(title: str, note: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(cells) for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join([f"## {title}", "", note, "", *(f"| {line} |" for line in lines)])


def _long_runs(results: Sequence[Result]) -> str:
    rows = [
        [
            "nnU-Net's fold 0 left out" if result.labels == 0 else f"{result.labels} labels",
            str(mean_with_interval(_case_dice(result))),
            *(f"{mean:.3f}" for mean in np.nanmean(result.dice, axis=0)),
            f"{result.steps}",
            f"{result.seconds / 60:.1f}",
            f"[{result.folder.name}](runs/{result.folder.name}/report.html)",
        ]
        for result in results
    ]
    if not rows:
        return ""
    header = ["trained on", "mean Dice", *results[0].classes, "steps", "minutes", "curve"]
    return _table("a. From scratch", "Mean over the test cases; 95 % interval over cases.", header, rows)


def _by_labels(results: Sequence[Result], labels: Sequence[int]) -> str:
    rows = []
    for number in labels:
        scratch, tuned = _table_of(results, SCRATCH, number), _table_of(results, PUBLISHED, number)
        difference, p_value = _difference(tuned, scratch)
        means = [str(mean_with_interval(table)) for table in (scratch, tuned)]
        rows.append([str(number), *means, str(difference), f"{p_value:.2g}"])
    note = (
        f"Mean Dice over the test cases and {len(tuned)} seeds, 95 % interval over cases and seeds; difference paired "
        "by case and seed; p of Wilcoxon's signed-rank test over cases, not corrected for the number of rows. "
        "Intervals over so few seeds are somewhat too narrow."
    )
    return _table(
        "b. With few labels", note, ["labels", "from scratch", "pre-trained, sawtooth", "difference", "p"], rows
    )


def _by_schedule(results: Sequence[Result]) -> str:
    compared = [result for result in results if result.part == "c"]
    if not compared:
        return ""
    labels = compared[0].labels
    kinds = dict.fromkeys([SCRATCH, PUBLISHED, *(result.kind for result in compared)])
    tables = {kind: _table_of(results, kind, labels) for kind in kinds}
    rows = []
    for (schedule, scope), table in tables.items():
        cells = [schedule, scope, str(mean_with_interval(table))]
        for other in (SCRATCH, PUBLISHED):
            if (schedule, scope) == other:
                cells += ["", ""]
            else:
                difference, p_value = _difference(table, tables[other])
                cells += [str(difference), f"{p_value:.2g}"]
        rows.append(cells)
    header = ["schedule", "scope", "mean Dice", "against scratch", "p", "against the published", "p"]
    return _table(f"c. Schedules and scopes, {labels} labels", "Columns as in b.", header, rows)


def _runs(results: Sequence[Result], pretraining: str) -> str:
    rows = [
        [
            result.folder.name,
            str(result.seed),
            str(result.steps),
            f"{result.seconds:.0f}",
            f"{_case_dice(result).mean():.4f}",
        ]
        for result in results
    ]
    return _table(
        "Runs",
        f"Seconds are those of the steps. {pretraining}".strip(),
        ["run", "seed", "steps", "seconds", "mean Dice"],
        rows,
    )


def _plot(results: Sequence[Result], labels: Sequence[int]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, name, shift in ((SCRATCH, "from scratch", 0.97), (PUBLISHED, "pre-trained, sawtooth", 1.03)):
        intervals = [mean_with_interval(_table_of(results, kind, number)) for number in labels]
        means = [interval.mean for interval in intervals]
        below = [interval.mean - interval.low for interval in intervals]
        above = [interval.high - interval.mean for interval in intervals]
        places = [shift * number for number in labels]  # side by side
        axes.errorbar(places, means, yerr=[below, above], marker="o", capsize=3, label=name)
    axes.set_xscale("log")
    axes.set_xticks(list(labels), [str(number) for number in labels], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("labelled training cases")
    axes.set_ylabel("mean Dice of the test cases, 95 % interval")
    axes.legend()
    return figure
