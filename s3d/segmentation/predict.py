"""s3d predict: segment images with a fine-tuned network, on their own grids (docs/inference.md)."""

from __future__ import annotations

import hashlib
import logging
import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from s3d.checkpoint import Weights, load_checkpoint, weights_of
from s3d.data.reading import BadImageError, by, one_line
from s3d.distributed import Processes, processes
from s3d.model import Network
from s3d.optimizer_step import autocast
from s3d.segmentation.plan import SegmentationPlan
from s3d.segmentation.prediction_record import begin_predictions
from s3d.segmentation.prepared_case import CaseGrid, PreparedCase, prepare_case
from s3d.segmentation.raw_dataset import RawCase, find_cases
from s3d.segmentation.restoring import restore, write_segmentation
from s3d.segmentation.windows import check_windows, predict_logits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictConfig:
    """Segment images with a fine-tuned network; the result lies on the grid of each image."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint of s3d finetune."""
    images: Path
    """Folder of images named case_0000.nii.gz, case_0001.nii.gz (second channel), or of a data set with imagesTs."""
    output_dir: Path
    """Folder of the segmentations, case.nii.gz. Cases that are there already are not done again."""
    weights: Weights = "raw"
    """Those that were trained, or their moving average."""
    overlap: float = 0.5
    """Of neighbouring windows, a share of their side."""
    mirror: bool = False
    """Average over the eight mirror images of each window, as nnU-Net does: eight times the work."""
    batch: int = 1
    """Windows that the network sees at a time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1; windows are there, whole volumes never."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the network under autocast."""
    overwrite: bool = False
    """Remove what output_dir has of these cases, and do them again."""
    skip_bad: bool = False
    """Name and skip cases that cannot be used, instead of stopping at the first."""

    def __post_init__(self) -> None:
        check_windows(self.overlap, self.batch)


@dataclass(frozen=True)
class PredictSummary:
    """What a process has done.

    Attributes:
        predicted: names of the cases that it has segmented.
        skipped: why others could not be.
    """

    predicted: tuple[str, ...]
    skipped: tuple[BadImageError, ...]


def predict(config: PredictConfig) -> PredictSummary:
    """Segment the cases of a folder; the processes of torchrun share them.

    The next case is read, and the last one written, while the network works.

    Returns: what this process has done.
    Raises:
        FileNotFoundError: no such checkpoint or folder, or a channel of a case is missing.
        ValueError: not a checkpoint of s3d finetune, files that are not named as its data set's are, or an output
            folder whose content is of other settings or not of `s3d predict`.
        BadImageError: a case cannot be used (and not ``skip_bad``).
        FloatingPointError: the network's answer is not finite.
        OSError: a segmentation could not be written.
    """
    plan, network = load_segmentation(config.checkpoint, config.weights)
    folder = config.images / "imagesTs" if (config.images / "imagesTs").is_dir() else config.images
    if folder.resolve() == config.output_dir.resolve():
        raise ValueError(f"output_dir {config.output_dir} is the folder of the images; give another folder")
    cases = find_cases(folder, len(plan.channel_names), plan.file_ending)
    outputs = {_output(config, plan, case.name): case for case in cases}
    log.info("%s: %d cases, %d classes of %s", folder, len(cases), len(plan.class_names), plan.dataset)
    with processes(config.device) as group:
        if group.first:
            begin_predictions(config.output_dir, _settings(config, plan), outputs, config.overwrite)
        left = {case.name for path, case in outputs.items() if not path.exists()}
        # Of the first process, when the folder is as it should be and before any case is done.
        left = group.gather(left)[0]
        if len(left) < len(cases) and group.first:
            log.info("%d of %d cases are in %s already", len(cases) - len(left), len(cases), config.output_dir)
        own = group.share([case for case in cases if case.name in left])
        summary = _segment(config, plan, network.to(group.device).eval(), own, group)
    return summary


def load_segmentation(path: Path, weights: Weights = "raw") -> tuple[SegmentationPlan, Network]:
    """Plan and network of a checkpoint of `s3d finetune`, on the CPU.

    Args:
        path: of the checkpoint.
        weights: those that were trained, or their moving average.
    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, a checkpoint of something else, or has no such weights.
    """
    saved = load_checkpoint(path)
    if "plan" not in saved:
        raise ValueError(
            f"checkpoint {path} is one of pre-training, which knows no classes; train it on labelled images first, "
            "with `s3d finetune`, and give the checkpoint of that"
        )
    try:
        plan = SegmentationPlan.from_plain(saved["plan"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"checkpoint {path}: its plan cannot be read ({one_line(error)}); give it as `s3d finetune` has written it"
        ) from error
    state = weights_of(saved, weights, str(path))
    network = plan.build_network()
    expected = network.state_dict()
    for name in (*expected, *state):
        there, wanted = (by(tensors[name].shape) if name in tensors else "missing" for tensors in (state, expected))
        if there != wanted:
            raise ValueError(
                f"checkpoint {path}: its weights contradict its plan: {name} is {there} in the weights and {wanted} in "
                "the network of the plan; give the checkpoint as `s3d finetune` has written it"
            )
    network.load_state_dict(state)
    return plan, network


def _output(config: PredictConfig, plan: SegmentationPlan, name: str) -> Path:
    return config.output_dir / f"{name}{plan.file_ending}"


def _settings(config: PredictConfig, plan: SegmentationPlan) -> dict[str, Any]:
    """What the segmentations depend on, beside the images."""
    with open(config.checkpoint, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        digest = hashlib.sha256(content).hexdigest()
    return {
        "dataset": plan.dataset,
        "class_names": list(plan.class_names),
        "checkpoint_sha256": digest,
        "weights": config.weights,
        "overlap": config.overlap,
        "mirror": config.mirror,
        "precision": config.precision,
    }


def _segment(
    config: PredictConfig,
    plan: SegmentationPlan,
    network: Network,
    cases: Sequence[RawCase],
    group: Processes,
) -> PredictSummary:
    predicted: list[str] = []
    skipped: list[BadImageError] = []
    writing: Future[None] | None = None
    description = "predicting" if group.world == 1 else f"predicting (1 of {group.world} processes)"
    with (
        ThreadPoolExecutor(1) as writer,
        tqdm(total=len(cases), unit="case", desc=description, disable=not group.first) as bar,
    ):
        for case, coming in _read_ahead(cases, plan):
            try:
                prepared = coming.result()
            except BadImageError as error:
                if not config.skip_bad:
                    raise
                log.warning("case %s is skipped: %s", case.name, error)
                skipped.append(error)
                bar.update()
                continue
            logits = _logits(config, plan, network, prepared, group.device)
            if writing is not None:
                writing.result()
            target = _output(config, plan, case.name)
            writing = writer.submit(_restore_and_write, target, logits, prepared.grid, case.images[0])
            predicted.append(case.name)
            bar.update()
        if writing is not None:
            writing.result()
    return PredictSummary(tuple(predicted), tuple(skipped))


def _read_ahead(cases: Sequence[RawCase], plan: SegmentationPlan) -> Iterator[tuple[RawCase, Future[PreparedCase]]]:
    """The cases in order; the one behind is read by a thread meanwhile."""
    coming: deque[tuple[RawCase, Future[PreparedCase]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for case in cases:
            coming.append((case, reader.submit(prepare_case, case, plan)))
            if len(coming) > 1:
                yield coming.popleft()
        yield from coming


def _logits(
    config: PredictConfig,
    plan: SegmentationPlan,
    network: Network,
    prepared: PreparedCase,
    device: torch.device,
) -> Tensor:  # [K, D, H, W]
    with autocast(config.precision, device):
        logits = predict_logits(
            network,
            torch.from_numpy(prepared.voxels),
            plan.patch_size,
            overlap=config.overlap,
            mirror=config.mirror,
            device=device,
            batch=config.batch,
        )
    if not logits.isfinite().all():
        exact = config.precision == "float32"
        raise FloatingPointError(
            f"case {prepared.name}: the network's answer is not finite in {config.precision}; "
            f"{'the checkpoint is of no use' if exact else 'use --precision float32'}"
        )
    return logits


def _restore_and_write(path: Path, logits: Tensor, grid: CaseGrid, reference: Path) -> None:
    write_segmentation(path, restore(logits, grid, reference), reference)
