"""How the methods of a comparison stand: mean Dice, average, rank, difference to a reference, cost of pre-training.

A method that lacks runs keeps what it has, but has no average, rank or difference: these would be over other runs than
those of the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from s3d.segmentation.comparison import (
    Interval,
    average_with_interval,
    holm,
    mean_score,
    mean_with_interval,
    ranks,
    signed_rank_test,
)

from .results import EvaluatedCell, Results


@dataclass(frozen=True)
class Task:
    """A data set with so many labelled training cases (None: all), as all methods are fine-tuned on it."""

    dataset: str
    labels: int | None

    @property
    def labels_text(self) -> str:
        return "all" if self.labels is None else str(self.labels)

    def __str__(self) -> str:
        return f"{self.dataset}, {self.labels_text} labels"


@dataclass(frozen=True)
class Score:
    """A method on a task.

    Attributes:
        dice: mean over seeds and cases of a case's mean over its classes, 0 to 1.
        seeds: of the finished runs.
        folders: of these runs, in the same order.
    """

    dice: Interval
    seeds: tuple[int, ...]
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Against:
    """A method against the reference, under the same seeds on the same cases.

    Attributes:
        difference: of the Dice, method - reference, mean over seeds and cases, then over tasks.
        cases: that both have a score for.
        p_value: Wilcoxon's signed-rank test, two-sided, over the cases of all data sets; a case counts once, with its
            mean over seeds and numbers of labels.
        p_holm: corrected for the tests of the same table.
    """

    difference: Interval
    cases: int
    p_value: float
    p_holm: float


@dataclass(frozen=True)
class Cost:
    """What a method's pre-training took, mean over its runs.

    Attributes:
        seconds: of all steps.
        flops: of all steps.
        memory_mib: peak.
        folders: of the runs.
    """

    seconds: float
    flops: float
    memory_mib: float
    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Standing:
    """A method among others.

    Attributes:
        method: its name.
        scores: on the tasks that it has finished runs of.
        average: of the tasks, each of which counts the same; None: runs are missing.
        ranks: on each task, among the methods without missing runs, 1 is best; empty: runs are missing.
        against: the reference; None: it is the reference, or runs of either are missing.
        cost: None: it has no pre-training.
    """

    method: str
    scores: dict[Task, Score]
    average: Interval | None
    ranks: dict[Task, float]
    against: Against | None
    cost: Cost | None

    @property
    def average_rank(self) -> float | None:
        return float(np.mean(list(self.ranks.values()))) if self.ranks else None


@dataclass(frozen=True)
class Standings:
    """All methods of a table.

    Attributes:
        tasks: data sets in the order of the configuration, numbers of labels from few to all.
        seeds: of any run.
        reference: name of the method that the others are compared with.
        rows: the methods in the order they were asked for.
    """

    tasks: tuple[Task, ...]
    seeds: tuple[int, ...]
    reference: str
    rows: tuple[Standing, ...]


@dataclass(frozen=True)
class LabelStanding:
    """A method on one data set with several numbers of labels.

    Attributes:
        method: its name.
        scores: on the tasks that it has finished runs of.
        against: the reference on each task; without those of which runs of either are missing.
    """

    method: str
    scores: dict[Task, Score]
    against: dict[Task, Against]


def tasks_of(results: Results) -> tuple[Task, ...]:
    """Those with a finished run: data sets in order, numbers of labels from few to all."""
    found = {Task(cell.dataset, cell.labels) for cell in results.evaluated}
    return tuple(
        sorted(
            found,
            key=lambda task: (
                results.datasets.index(task.dataset),
                task.labels is None,
                0 if task.labels is None else task.labels,
            ),
        )
    )


def seeds_of(results: Results) -> tuple[int, ...]:
    """Of any fine-tuned model."""
    return tuple(sorted({cell.seed for cell in results.evaluated}))


def check_results(results: Results) -> None:
    """That what is averaged and paired belongs together.

    Raises:
        ValueError: a cell is there twice or has no score, names a method or data set that is none, or two cells of a
            data set have other cases or classes; names the folders.
    """
    first_of: dict[str, EvaluatedCell] = {}
    seen: dict[tuple[str, str, int | None, int], EvaluatedCell] = {}
    for cell in results.evaluated:
        if cell.method not in results.methods or cell.dataset not in results.datasets:
            raise ValueError(
                f"{cell.folder} is of method {cell.method!r} on data set {cell.dataset!r}; the comparison has the "
                f"methods {', '.join(results.methods)} and the data sets {', '.join(results.datasets)}"
            )
        key = cell.method, cell.dataset, cell.labels, cell.seed
        if key in seen:
            raise ValueError(f"{seen[key].folder} and {cell.folder} are both {_named(cell)}")
        seen[key] = cell
        if np.isnan(cell.dice).all():
            raise ValueError(f"{cell.folder} has nothing to score: neither truth nor prediction has any class")
        first = first_of.setdefault(cell.dataset, cell)
        for what in ("cases", "classes"):
            if getattr(first, what) != getattr(cell, what):
                raise ValueError(
                    f"{first.folder} and {cell.folder} were tested on other {what} of data set {cell.dataset!r}: they "
                    "cannot be compared; remove the older of the two and run it again"
                )


def _named(cell: EvaluatedCell) -> str:
    return f"{cell.method} on {Task(cell.dataset, cell.labels)}, seed {cell.seed}"


class Scoreboard:
    """Looks up the scores of methods on tasks.

    Args:
        results: all that is measured.
        reference: the method that others are compared with.
    Attributes:
        results, reference: as given.
        tasks, seeds: of the results.
    Raises:
        ValueError: there is no such method, or the results do not fit each other (`check_results`).
    """

    def __init__(self, results: Results, reference: str) -> None:
        check_results(results)
        self.results = results
        self.reference = reference
        self.tasks = tasks_of(results)
        self.seeds = seeds_of(results)
        self._cells = {(cell.method, Task(cell.dataset, cell.labels), cell.seed): cell for cell in results.evaluated}
        self.check_methods([reference])

    def check_methods(self, methods: Iterable[str]) -> None:
        """That the comparison has these methods.

        Raises:
            ValueError: there is one that it does not have.
        """
        for method in methods:
            if method not in self.results.methods:
                raise ValueError(
                    f"there is no method {method!r} to make a table of; the comparison has "
                    f"{', '.join(self.results.methods)}"
                )

    def cells(self, method: str, task: Task) -> list[EvaluatedCell]:
        """Finished runs, by seed."""
        return [self._cells[method, task, seed] for seed in self.seeds if (method, task, seed) in self._cells]

    def complete(self, method: str, tasks: Sequence[Task]) -> bool:
        """Whether a method has a run of every seed on some tasks, and there are any."""
        return bool(tasks) and all(len(self.cells(method, task)) == len(self.seeds) for task in tasks)

    def score(self, method: str, task: Task) -> Score | None:
        """None: there is no finished run."""
        cells = self.cells(method, task)
        if not cells:
            return None
        return Score(
            dice=mean_with_interval(_case_dice(cells)),
            seeds=tuple(cell.seed for cell in cells),
            folders=tuple(cell.folder for cell in cells),
        )

    def scores(self, method: str, tasks: Sequence[Task]) -> dict[Task, Score]:
        """Of the tasks with finished runs."""
        found = {task: self.score(method, task) for task in tasks}
        return {task: score for task, score in found.items() if score is not None}

    def average(self, method: str, tasks: Sequence[Task]) -> Interval | None:
        """None: runs are missing."""
        if not self.complete(method, tasks):
            return None
        tables = [_case_dice(self.cells(method, task)) for task in tasks]
        return average_with_interval(tables, [task.dataset for task in tasks])

    def against(self, method: str, tasks: Sequence[Task]) -> Against | None:
        """The reference, not yet corrected for other tests; None: runs of either are missing."""
        if method == self.reference or not all(self.complete(name, tasks) for name in (method, self.reference)):
            return None
        tables = [_case_dice(self.cells(method, task)) - _case_dice(self.cells(self.reference, task)) for task in tasks]
        of_case = []
        for dataset in dict.fromkeys(task.dataset for task in tasks):
            rows = [table for task, table in zip(tasks, tables) if task.dataset == dataset]
            of_case.append(mean_score(np.concatenate(rows), axis=0))
        differences = np.concatenate(of_case)
        p_value = signed_rank_test(np.zeros_like(differences), differences)
        return Against(
            difference=average_with_interval(tables, [task.dataset for task in tasks]),
            cases=int(np.count_nonzero(~np.isnan(differences))),
            p_value=p_value,
            p_holm=p_value,
        )

    def cost(self, method: str) -> Cost | None:
        """None: it has no finished pre-training."""
        cells = [cell for cell in self.results.pretrained if cell.method == method]
        if not cells:
            return None
        return Cost(
            seconds=float(np.mean([cell.seconds for cell in cells])),
            flops=float(np.mean([cell.step_flops * cell.steps for cell in cells])),
            memory_mib=float(np.mean([cell.memory_mib for cell in cells])),
            folders=tuple(cell.folder for cell in cells),
        )


def _case_dice(cells: Sequence[EvaluatedCell]) -> NDArray[np.float64]:
    """Mean over the classes of a case, [seeds, cases]."""
    return np.array([mean_score(cell.dice, axis=-1) for cell in cells])


def standings(scoreboard: Scoreboard, methods: Sequence[str]) -> Standings:
    """The methods of a table, ranked among themselves.

    Args:
        scoreboard: of all results.
        methods: that are wanted, in the order of the rows.
    Raises:
        ValueError: there is no such method.
    """
    scoreboard.check_methods(methods)
    tasks = scoreboard.tasks
    rows = [
        Standing(
            method=method,
            scores=scoreboard.scores(method, tasks),
            average=scoreboard.average(method, tasks),
            ranks={},
            against=scoreboard.against(method, tasks),
            cost=scoreboard.cost(method),
        )
        for method in methods
    ]
    ranked = [row for row in rows if row.average is not None]
    if ranked:
        places = ranks(np.array([[row.scores[task].dice.mean for row in ranked] for task in tasks]))
        place_of = {row.method: dict(zip(tasks, places[:, i].tolist())) for i, row in enumerate(ranked)}
        rows = [replace(row, ranks=place_of.get(row.method, {})) for row in rows]
    corrected = iter(_corrected([row.against for row in rows if row.against is not None]))
    rows = [row if row.against is None else replace(row, against=next(corrected)) for row in rows]
    return Standings(tasks=tasks, seeds=scoreboard.seeds, reference=scoreboard.reference, rows=tuple(rows))


def label_standings(scoreboard: Scoreboard, methods: Sequence[str], dataset: str) -> list[LabelStanding]:
    """The methods on one data set with different numbers of labels; tests are corrected for all of the list.

    Raises:
        ValueError: there is no such method.
    """
    scoreboard.check_methods(methods)
    tasks = [task for task in scoreboard.tasks if task.dataset == dataset]
    pairs = {(method, task): scoreboard.against(method, [task]) for method, task in itertools.product(methods, tasks)}
    there = {key: against for key, against in pairs.items() if against is not None}
    corrected = dict(zip(there, _corrected(list(there.values()))))
    return [
        LabelStanding(
            method=method,
            scores=scoreboard.scores(method, tasks),
            against={task: corrected[method, task] for task in tasks if (method, task) in corrected},
        )
        for method in methods
    ]


def datasets_with_several_labels(tasks: Sequence[Task]) -> list[str]:
    """Data sets that were trained with different numbers of labels."""
    names = [task.dataset for task in tasks]
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _corrected(tests: Sequence[Against]) -> list[Against]:
    """For how many there are."""
    values = holm([test.p_value for test in tests])
    return [replace(test, p_holm=float(value)) for test, value in zip(tests, values)]
