"""s3d evaluate: scores of one or more runs on labelled cases, their comparison, and a report."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from s3d.data.reading import IMAGE_SUFFIXES, stem
from s3d.data.store import write_atomically
from s3d.data.workers import available_cores, work_through
from s3d.segmentation.case_scores import CaseTask, score_case
from s3d.segmentation.evaluation_report import evaluation_report
from s3d.segmentation.raw_dataset import image_files, read_class_names
from s3d.segmentation.scores import Scores, scores_csv
from s3d.segmentation.summary import MEAN, comparisons_csv, summarise, summary_csv, summary_markdown

log = logging.getLogger(__name__)

CASES = "cases.csv"
DATASET_JSON = "dataset.json"


@dataclass(frozen=True)
class EvaluateConfig:
    """Score predicted segmentations against the truth, and compare runs."""

    labels: Path
    """Folder of the true class maps, such as labelsTs."""
    predictions: tuple[str, ...]
    """Folders of predictions, each a run: NAME=FOLDER, or FOLDER, whose own name is then the run's. Files are named as
    those of the labels."""
    output_dir: Path
    """Folder for cases.csv, summary.csv, comparisons.csv, summary.md and report.html."""
    dataset_json: Path | None = None
    """File with the names of the classes; default: dataset.json in the folder of the labels, or in the one above."""
    images: Path | None = None
    """Folder of the images (CASE_0000.nii.gz, ...), for the pictures; without it they show contours only."""
    tolerance_mm: float = 1.0
    """Surfaces so far apart, in mm, still agree (NSD). Take what two experts differ by."""
    workers: int | None = None
    """Processes; default: one for each core. 0: none beside the main one."""

    def __post_init__(self) -> None:
        if not self.predictions:
            raise ValueError("predictions must name at least one folder, got none")
        if not self.tolerance_mm >= 0:
            raise ValueError(f"tolerance_mm must be at least 0, got {self.tolerance_mm}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")


def evaluate(config: EvaluateConfig) -> Scores:
    """Score every case, write tables and the report, and print the tables.

    Returns: the scores.
    Raises:
        FileNotFoundError: a folder, a prediction, an image or dataset.json is missing.
        BadImageError: a file cannot be read, holds values that dataset.json does not name, or lies on another grid.
        ValueError: two runs or two cases have one name, a class is called "mean", or a run has nothing to score.
    """
    dataset_json = _dataset_json(config)
    class_names = read_class_names(dataset_json)
    if MEAN in class_names:
        raise ValueError(f"{dataset_json}: a class is called {MEAN!r}, as the mean of all classes is; rename it")
    runs = _runs(config.predictions)
    tasks = _tasks(config, runs, class_names)
    images = None if config.images is None else _images(config.images, [task.name for task in tasks])

    dice, nsd = _score(tasks, config.workers)
    scores = Scores(tuple(runs), tuple(task.name for task in tasks), class_names[1:], dice, nsd)
    summary = summarise(scores)
    markdown = summary_markdown(summary, config.tolerance_mm)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (CASES, scores_csv(scores)),
        ("summary.csv", summary_csv(summary)),
        ("comparisons.csv", comparisons_csv(summary)),
        ("summary.md", markdown),
        ("report.html", evaluation_report(scores, summary, tasks, images, config.tolerance_mm)),
    ):
        write_atomically(config.output_dir / name, content.encode())
    print(markdown)
    print(f"report: {config.output_dir / 'report.html'}")
    return scores


def _score(tasks: Sequence[CaseTask], workers: int | None) -> NDArray[np.float64]:
    """[2, runs, cases, classes]"""
    workers = available_cores() if workers is None else workers
    with contextlib.closing(work_through(score_case, tasks, workers)) as results:
        bar = tqdm(results, total=len(tasks), unit="case", desc="evaluating cases")
        done = {task.name: scores for task, scores in bar}
    return np.stack([done[task.name] for task in tasks], axis=2)


def _dataset_json(config: EvaluateConfig) -> Path:
    if config.dataset_json is not None:
        return config.dataset_json
    places = [config.labels / DATASET_JSON, config.labels.resolve().parent / DATASET_JSON]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"{places[0]}: no such file, nor is there one in the folder above; name it with --dataset-json"
    )


def _runs(predictions: Sequence[str]) -> dict[str, Path]:
    """Name and folder of each run."""
    runs: dict[str, Path] = {}
    for text in predictions:
        name, _, folder = text.partition("=")
        if not folder or Path(text).is_dir():  # a folder may have the sign in its own name
            name, folder = Path(text).resolve().name, text
        if not name:
            raise ValueError(f"predictions: {text!r} names no run before the =; give NAME=FOLDER or FOLDER")
        path = Path(folder)
        if name in runs:
            raise ValueError(
                f"predictions: {runs[name]} and {path} are both called {name!r}; name them, as in "
                f"first={runs[name]} second={path}"
            )
        runs[name] = path
    return runs


def _tasks(config: EvaluateConfig, runs: Mapping[str, Path], class_names: tuple[str, ...]) -> list[CaseTask]:
    truths = _files(config.labels)
    predictions = {run: _files(folder) for run, folder in runs.items()}
    for run, files in predictions.items():
        missing = [name for name in truths if name not in files]
        if missing:
            raise FileNotFoundError(
                f"{runs[run] / truths[missing[0]].name}: no such file; {len(missing)} of the {len(truths)} labels in "
                f"{config.labels} have no prediction of run {run!r}, predict them or evaluate other labels"
            )
        surplus = len(files.keys() - truths.keys())
        if surplus:
            log.warning("%s: left out %d of its files, which have no label in %s", runs[run], surplus, config.labels)
    return [
        CaseTask(name, truth, tuple(files[name] for files in predictions.values()), class_names, config.tolerance_mm)
        for name, truth in truths.items()
    ]


def _files(folder: Path) -> dict[str, Path]:
    """The images of a folder by case name, sorted."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files: dict[str, Path] = {}
    for path in image_files(folder):
        if stem(path) in files:
            raise ValueError(f"{folder}: {files[stem(path)].name} and {path.name} are one case; remove one of them")
        files[stem(path)] = path
    if not files:
        raise FileNotFoundError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _images(folder: Path, cases: Sequence[str]) -> dict[str, Path]:
    """The first channel of each case."""
    files = _files(folder)
    for case in cases:
        if f"{case}_0000" not in files:
            raise FileNotFoundError(f"{folder}: holds no first channel of case {case}; it must be called {case}_0000")
    return {case: files[f"{case}_0000"] for case in cases}
