"""Dice of whole validation cases, by sliding windows, and pictures of them."""

from __future__ import annotations

import statistics

import numpy as np
import torch
from numpy.typing import NDArray

from s3d.csv_table import csv_text
from s3d.data.store import write_atomically
from s3d.distributed import Processes
from s3d.model import Network
from s3d.optimizer_step import autocast
from s3d.report import save_figure
from s3d.training_log import TrainingLog

from .case_store import CaseStore
from .comparison import mean_score
from .finetune_config import FinetuneConfig
from .metrics import dice
from .pictures import segmentation_figure
from .plan import SegmentationPlan
from .windows import predict_logits

# Of all validation cases, while the run goes on; at its end all are looked at.
MAX_CASES = 16
# In TensorBoard; the first also as a file.
PICTURES = 4
VALIDATION = "validation.csv"


def dice_column(class_name: str) -> str:
    """Name of a class's Dice in the log."""
    return f"dice_{class_name}"


class SegmentationValidator:
    """Predicts whole cases; the processes share them. Dice is taken on the grid of the plan.

    Args:
        config: of the run.
        plan: of the model.
        store: where the cases are.
        cases: names of those to validate on; none: there is nothing to see.
        processes: that share the cases.
    """

    def __init__(
        self, config: FinetuneConfig, plan: SegmentationPlan, store: CaseStore, cases: list[str], processes: Processes
    ) -> None:
        self.config = config
        self.plan = plan
        self.store = store
        self.cases = cases
        self.processes = processes

    def __call__(self, network: Network, training_log: TrainingLog | None, step: int) -> float:
        """Mean Dice over classes and cases; the first process writes it, by class too, and pictures.

        At the end of the run all cases are looked at, and ``validation.csv`` has each of them.

        Returns: NaN where there is no case, or no class in any of them.
        """
        whole = step == self.config.steps
        cases = self.cases if whole else self.cases[:MAX_CASES]
        if not cases:
            return float("nan")
        deep_supervision, network.decoder.deep_supervision = network.decoder.deep_supervision, False
        network.eval()
        scores: dict[str, list[float]] = {}
        for number, name in enumerate(self.processes.share(cases)):
            case = self.store.position(name)
            image, truth = self.store.read(case), self.store.read_labels(case)
            with torch.no_grad(), autocast(self.config.precision, self.processes.device):
                logits = predict_logits(
                    network,
                    torch.from_numpy(image),
                    self.plan.patch_size,
                    mirror=False,
                    device=self.processes.device,
                )
            prediction = logits.argmax(0).numpy().astype(np.uint8)
            scores[name] = dice(prediction, truth, len(self.plan.class_names)).tolist()
            if training_log is not None and number < PICTURES:
                self._picture(training_log, step, number, name, image, truth, prediction)
        network.train()
        network.decoder.deep_supervision = deep_supervision
        scores = {name: row for part in self.processes.gather(scores) for name, row in part.items()}
        means = mean_score(np.array(list(scores.values())), axis=0)
        known = {
            dice_column(name): float(mean)
            for name, mean in zip(self.plan.class_names[1:], means, strict=True)
            if not np.isnan(mean)
        }
        mean_dice = statistics.fmean(known.values()) if known else float("nan")
        if training_log is not None:
            training_log.write(step, validation_dice=mean_dice, **known)
            if whole:
                self._write_table(scores)
        return mean_dice

    def _picture(
        self,
        training_log: TrainingLog,
        step: int,
        number: int,
        name: str,
        image: NDArray[np.float32],
        truth: NDArray[np.uint8],
        prediction: NDArray[np.uint8],
    ) -> None:
        title = f"{name}, step {step}"
        figure = segmentation_figure(
            image[0], truth, prediction, self.plan.class_names, title, spacing_mm=self.plan.spacing_mm
        )
        if number == 0:
            save_figure(figure, self.config.output_dir / f"segmentation_{step:06d}.png")
        training_log.tensorboard.add_figure(f"segmentation/{name}", figure, step)

    def _write_table(self, scores: dict[str, list[float]]) -> None:
        header = ("case", *map(dice_column, self.plan.class_names[1:]))
        rows = ([name, *(f"{score:.6f}" for score in row)] for name, row in sorted(scores.items()))
        write_atomically(self.config.output_dir / VALIDATION, csv_text(header, rows).encode())
