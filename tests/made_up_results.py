"""Made-up results of a comparison, small enough to recompute by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from s3d.comparison.results import EvaluatedCell, PretrainedCell, Results


def evaluated(
    method: str,
    dice: ArrayLike,  # [cases] or [cases, classes]
    dataset: str = "liver",
    labels: int | None = None,
    seed: int = 0,
    classes: Sequence[str] = (),
) -> EvaluatedCell:
    """A fine-tuned model with these scores, in a folder that says what it is."""
    scores = np.asarray(dice, dtype=np.float64)
    scores = scores[:, None] if scores.ndim == 1 else scores
    return EvaluatedCell(
        method=method,
        dataset=dataset,
        labels=labels,
        seed=seed,
        folder=Path("finetuning", dataset, "all" if labels is None else str(labels), method, f"seed-{seed}"),
        classes=tuple(classes) or tuple(f"class {i}" for i in range(scores.shape[1])),
        cases=tuple(f"{dataset}_{i}" for i in range(len(scores))),
        dice=scores,
        curve=((10, 0.2), (20, float(np.nan_to_num(scores).mean()))),
        seconds=60.0 + seed,
    )


def pretrained(method: str, seed: int = 0, steps: int = 100, picture: Path | None = None) -> PretrainedCell:
    """A pre-trained model of `steps` steps of 2 seconds and 5 TFLOP."""
    return PretrainedCell(
        method=method,
        seed=seed,
        folder=Path("pretraining", method, f"seed-{seed}"),
        steps=steps,
        parameters=1000,
        seconds=2.0 * steps,
        seconds_per_step=2.0,
        memory_mib=512.0,
        step_flops=5e12,
        losses=((50, 0.9), (100, 0.7 - 0.1 * seed)),
        trivial_loss=1.0,
        loss_label="mean squared error",
        picture=picture,
    )


def results_of(
    evaluated_cells: Sequence[EvaluatedCell],
    pretrained_cells: Sequence[PretrainedCell] = (),
    planned: int | None = None,
) -> Results:
    """Methods and data sets in the order in which they come."""
    return Results(
        methods=tuple(dict.fromkeys(cell.method for cell in evaluated_cells)),
        datasets=tuple(dict.fromkeys(cell.dataset for cell in evaluated_cells)),
        evaluated=tuple(evaluated_cells),
        pretrained=tuple(pretrained_cells),
        planned=len(evaluated_cells) + len(pretrained_cells) if planned is None else planned,
    )


def random_results(methods: int, seeds: int = 3, cases: int = 12) -> Results:
    """Methods "m0", "m1", ... of which the later are better, on two data sets, one of them with 8 and all labels."""
    generator = np.random.default_rng(0)
    difficulty = {name: generator.uniform(0.4, 0.7, size=(cases, 2)) for name in ("liver", "spleen")}
    cells = []
    for i in range(methods):
        for dataset, labels in (("liver", 8), ("liver", None), ("spleen", None)):
            for seed in range(seeds):
                gain = 0.01 * i + (0.1 if labels is None else 0) + generator.normal(0, 0.02, size=(cases, 2))
                scores = np.clip(difficulty[dataset] + gain, 0, 1)
                cells.append(evaluated(f"m{i}", scores, dataset, labels, seed))
    return results_of(cells, [pretrained(f"m{i}") for i in range(1, methods)])
