"""What the numbers of a comparison mean, what they leave out, and what is missing: sentences below its tables."""

from __future__ import annotations

from s3d.segmentation.comparison import CONFIDENCE

from .results import Results
from .standings import Standings

NOTHING = "–"  # noqa: RUF001 (the sign that tables have where there is no number)


def missing_notes(found: Standings) -> list[str]:
    """Which methods lack runs, and what follows."""
    notes = []
    for row in found.rows:
        if row.average is not None or not found.tasks:
            continue
        lacking = []
        for task in found.tasks:
            seeds = row.scores[task].seeds if task in row.scores else ()
            if len(seeds) < len(found.seeds):
                lacking.append(f"{task}: {len(seeds)} of {len(found.seeds)} seeds")
        notes.append(
            f"{row.method} is unfinished ({'; '.join(lacking)}): it has no average, rank or difference yet, and the "
            "ranks of the others are without it."
        )
    reference = [row for row in found.rows if row.method == found.reference]
    if reference and reference[0].average is None and found.tasks:
        notes.append(f"Differences need all runs of the reference, {found.reference}.")
    return notes


def statistics_notes(results: Results, found: Standings) -> list[str]:
    """What intervals, tests, ranks and costs mean, and what they leave out; sentences."""
    seeds = len(found.seeds)
    pretrainings = max((sum(cell.method == name for cell in results.pretrained) for name in results.methods), default=0)
    notes = [
        "Dice in %: mean over the classes of a case, then over test cases and seeds. The average counts each column "
        "(data set and number of labels) the same. Bold: best; italic: second best, by the digits shown.",
        "Ranks: 1 is the highest mean Dice of a column, equals share the mean of their places; averaged over columns.",
        f"In brackets: {CONFIDENCE:.0%} intervals, by bootstrap over test cases within each data set"
        + (
            ", and over seeds, drawn independently of each other."
            if seeds > 1
            else "; there is one seed, so they do not say how far another training would move the number."
        ),
    ]
    if seeds > 1:
        notes.append(
            f"{seeds} seeds are few: the part of the intervals that stands for them is too narrow (their bootstrap "
            f"variance is {seeds - 1}/{seeds} of what it should be, and itself known poorly)."
        )
    if pretrainings == 1 and seeds > 1:
        notes.append(
            "Every method was pre-trained once, and all its seeds start from that network: no interval and no test "
            "says how far another pre-training would move the numbers."
        )
    notes += [
        f"Pre-training has seen the images, not the labels, of {number} test cases of {dataset}: methods that begin "
        "from scratch have not."
        for dataset, number in results.seen.items()
    ]
    notes += [
        f"Differences to {found.reference} are paired by case and seed, over the cases that both have a score for. "
        "p: Wilcoxon's signed-rank test over the test cases of all data sets, two-sided, each case with its mean over "
        "seeds and numbers of labels; corrected for the tests of a table (Holm). It weighs every case the same, so "
        "that large data sets count more than in the average, and takes the trained networks as given: where the "
        "interval of a difference holds 0, other seeds may reverse it, however small p is.",
        f"Pre-training: time of all steps, operations of all steps, forward and backward, peak memory; {NOTHING} is "
        "none. Time and memory depend on the machine and on what ran beside it, operations do not.",
    ]
    return notes


def progress_note(results: Results) -> str | None:
    """How many runs of the matrix are finished; None where all are."""
    finished = len(results.evaluated) + len(results.pretrained)
    if finished >= results.planned:
        return None
    return f"Unfinished: {finished} of {results.planned} runs are done, the tables show these."
