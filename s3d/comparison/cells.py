"""The matrix of a comparison: which runs it is made of, where each lies, and which needs which.

A cell is a run with a folder. Entries of the matrix with the same settings are one cell: two methods that differ in
their fine-tuning share a pre-training.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3d.pretrain_config import PretrainConfig
from s3d.segmentation.finetune_config import FinetuneConfig

from .protocol import (
    UNKNOWN_STEPS,
    LabelledDataset,
    Protocol,
    Settings,
    finetuning_settings,
    pretraining_settings,
    slug_of,
)


@dataclass(frozen=True, eq=False)
class PretrainingCell:
    """A pre-training.

    Attributes:
        method: the first that needs it.
        seed: of the run.
        folder: of the run, relative to that of the comparison.
        settings: as in the protocol.
    """

    method: str
    seed: int
    folder: Path
    settings: Settings

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.method}, pre-training, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class FinetuningCell:
    """A fine-tuning, and the scores of the model on the test cases.

    Attributes:
        method: the first that needs it.
        dataset: that is learned.
        labels: number of training cases; None: all.
        seed: of the run and of the choice of cases.
        folder: of the run, relative to that of the comparison.
        settings: as in the protocol.
        pretraining: where it begins; None: from scratch.
    """

    method: str
    dataset: LabelledDataset
    labels: int | None
    seed: int
    folder: Path
    settings: Settings
    pretraining: PretrainingCell | None

    @property
    def title(self) -> str:
        """For people."""
        labels = "all labels" if self.labels is None else f"{self.labels} labels"
        return f"{self.method}, {self.dataset.name}, {labels}, seed {self.seed}"


Cell = PretrainingCell | FinetuningCell


@dataclass(frozen=True, eq=False)
class Matrix:
    """The cells of a comparison.

    Attributes:
        pretraining: of (method, seed of the pre-training).
        finetuning: of (method, data set, labels, seed).
    """

    pretraining: Mapping[tuple[str, int], PretrainingCell]
    finetuning: Mapping[tuple[str, str, int | None, int], FinetuningCell]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Each once; pre-trainings before what needs them."""
        every: Iterable[Cell] = (*self.pretraining.values(), *self.finetuning.values())
        return tuple({cell.folder: cell for cell in every}.values())


def plan_matrix(protocol: Protocol, known: Collection[str] = ()) -> Matrix:
    """All cells of a protocol.

    Args:
        protocol: of the comparison.
        known: methods that the folder has runs of: where settings are the same, their folders are used.
    """
    of_identity: dict[str, Any] = {}
    pretraining: dict[tuple[str, int], PretrainingCell] = {}
    finetuning: dict[tuple[str, str, int | None, int], FinetuningCell] = {}
    for method in sorted(protocol.methods, key=lambda method: method.name not in known):
        slug = slug_of(method.name)
        for seed in protocol.seeds:
            start = None
            if method.pretraining is not None:
                own = protocol.pretraining_seed(seed)
                folder = Path("pretraining", slug, f"seed-{own}")
                start = PretrainingCell(method.name, own, folder, method.pretraining)
                start = of_identity.setdefault(_pretraining_identity(protocol, start), start)
                pretraining[method.name, own] = start
            for dataset in protocol.datasets:
                for labels in dataset.labels:
                    number = "all" if labels is None else str(labels)
                    folder = Path("finetuning", slug_of(dataset.name), number, slug, f"seed-{seed}")
                    settings = protocol.finetuning_of(method, dataset)
                    cell = FinetuningCell(method.name, dataset, labels, seed, folder, settings, start)
                    cell = of_identity.setdefault(_finetuning_identity(protocol, cell), cell)
                    finetuning[method.name, dataset.name, labels, seed] = cell
    return Matrix(pretraining, finetuning)


def _pretraining_identity(protocol: Protocol, cell: PretrainingCell) -> str:
    values = pretraining_settings(cell.settings, Path())
    steps = {"steps": UNKNOWN_STEPS} if protocol.budget else {}
    config = PretrainConfig(output_dir=Path(), seed=cell.seed, **{**values, **steps})
    return json.dumps(["pretraining", config.plain()])


def _finetuning_identity(protocol: Protocol, cell: FinetuningCell) -> str:
    start = cell.pretraining
    values = finetuning_settings(cell.settings)
    steps = {"steps": UNKNOWN_STEPS} if protocol.budget else {}
    checkpoint = None if start is None else start.folder
    config = FinetuneConfig(
        output_dir=Path(),
        dataset=Path(cell.dataset.folder),
        checkpoint=checkpoint,
        seed=cell.seed,
        **{**values, **steps},
    )
    return json.dumps(["finetuning", cell.dataset.name, cell.labels, config.plain()])
