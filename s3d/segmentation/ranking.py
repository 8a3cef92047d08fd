"""s3d rank: runs ranked over several evaluated data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s3d.csv_table import csv_text
from s3d.data.store import write_atomically
from s3d.segmentation.comparison import mean_score, ranks
from s3d.segmentation.scores import number, read_scores
from s3d.segmentation.summary import Table


@dataclass(frozen=True)
class RankConfig:
    """Rank runs over several data sets that `s3d evaluate` has scored."""

    results: tuple[Path, ...]
    """The cases.csv of each data set, each in a folder of its own, whose name is taken for that of the data set. All
    must hold the same runs."""
    output_dir: Path
    """Folder for ranks.csv and ranks.md."""

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("results must name at least one cases.csv, got none")


def rank(config: RankConfig) -> dict[str, float]:
    """Rank the runs on each data set by their mean Dice, write the tables and print them.

    Returns: mean rank of each run, 1 is best.
    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no cases.csv, has other runs than the first, or two data sets have one name.
    """
    scores = {}
    for file in config.results:
        name = file.resolve().parent.name
        if name in scores:
            raise ValueError(f"results: {file} is in a second folder called {name!r}; rename one of them")
        scores[name] = read_scores(file)
    runs = next(iter(scores.values())).runs
    for file, found in zip(config.results, scores.values()):
        if set(found.runs) != set(runs):
            raise ValueError(
                f"{file}: holds the runs {', '.join(sorted(found.runs))}, but {config.results[0]} "
                f"{', '.join(sorted(runs))}; evaluate the same runs on every data set"
            )
    means = np.array(
        [
            [mean_score(found.case_dice[found.runs.index(run)], axis=0) for run in runs] for found in scores.values()
        ]  # [data sets, runs]
    )
    places = ranks(means)
    mean_ranks = places.mean(axis=0)
    order = np.argsort(mean_ranks, kind="stable")
    table = Table(
        "Ranks",
        ("run", *scores, "mean Dice", "mean rank"),
        [
            (
                runs[i],
                *(f"{dice:.3f} ({place:g})" for dice, place in zip(means[:, i], places[:, i])),
                f"{means[:, i].mean():.3f}",
                f"{mean_ranks[i]:.2f}",
            )
            for i in order
        ],
    )
    note = "- Mean Dice on each data set and, in brackets, the run's rank there; 1 is best, equals share their ranks."
    markdown = f"## {table.title}\n\n{table.markdown()}\n\n{note}\n"
    rows = [
        (name, run, number(means[i, j]), number(places[i, j]))
        for i, name in enumerate(scores)
        for j, run in enumerate(runs)
    ]
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output_dir / "ranks.csv", csv_text(("dataset", "run", "dice", "rank"), rows).encode())
    write_atomically(config.output_dir / "ranks.md", markdown.encode())
    print(markdown)
    return dict(zip(runs, mean_ranks.tolist()))
