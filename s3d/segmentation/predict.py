"""s3d predict: segment images with a fine-tuned network, on their own grids (docs/inference.md)."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import Tensor
from tqdm import tqdm

from s3d.checkpoint import load_checkpoint
from s3d.data.reading import BadImageError
from s3d.data.store import write_atomically
from s3d.distributed import Processes, processes
from s3d.segmentation.plan import SegmentationPlan
from s3d.segmentation.prepared_case import CaseGrid, PreparedCase, prepare_case
from s3d.segmentation.raw_dataset import RawCase, find_cases
from s3d.segmentation.restoring import restore, write_segmentation
from s3d.segmentation.windows import check_windows, predict_logits

log = logging.getLogger(__name__)

RECORD = "prediction.json"


@dataclass(frozen=True)
class PredictConfig:
    """Segment images with a fine-tuned network; the result lies on the grid of each image."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint of s3d finetune."""
    images: Path
    """Folder of images named case_0000.nii.gz, case_0001.nii.gz (second channel), or of a data set with imagesTs."""
    output_dir: Path
    """Folder of the segmentations, case.nii.gz. Cases that are there already are not done again."""
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
    plan, network = load_segmentation(config.checkpoint)
    folder = config.images / "imagesTs" if (config.images / "imagesTs").is_dir() else config.images
    if folder.resolve() == config.output_dir.resolve():
        raise ValueError(f"output_dir {config.output_dir} is the folder of the images; give another folder")
    cases = find_cases(folder, len(plan.channel_names), plan.file_ending)
    log.info("%s: %d cases, %d classes of %s", folder, len(cases), len(plan.class_names), plan.dataset)
    with processes(config.device) as group:
        if group.first:
            _begin(config, plan, cases)
        left = [case.name for case in cases if not _output(config, plan, case.name).exists()]
        # Of the first process, when the folder is as it should be and before any case is done.
        left = group.gather(left)[0]
        if len(left) < len(cases) and group.first:
            log.info("%d of %d cases are in %s already", len(cases) - len(left), len(cases), config.output_dir)
        own = group.share([case for case in cases if case.name in set(left)])
        summary = _segment(config, plan, network.to(group.device).eval(), own, group)
    return summary


def load_segmentation(path: Path) -> tuple[SegmentationPlan, ResidualEncoderUNet]:
    """Plan and network of a checkpoint of `s3d finetune`, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or a checkpoint of something else.
    """
    saved = load_checkpoint(path)
    if "plan" not in saved:
        raise ValueError(
            f"checkpoint {path} is one of pre-training, which knows no classes; train it on labelled images first, "
            "with `s3d finetune`, and give the checkpoint of that"
        )
    plan = SegmentationPlan.from_plain(saved["plan"])
    network = plan.build_network()
    network.load_state_dict(saved["network"])
    return plan, network


def _output(config: PredictConfig, plan: SegmentationPlan, name: str) -> Path:
    return config.output_dir / f"{name}{plan.file_ending}"


def _begin(config: PredictConfig, plan: SegmentationPlan, cases: Sequence[RawCase]) -> None:
    """Make the output folder, or make sure that what it has is what would be made again."""
    with open(config.checkpoint, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        digest = hashlib.sha256(content).hexdigest()
    record = {
        "dataset": plan.dataset,
        "class_names": list(plan.class_names),
        "checkpoint_sha256": digest,
        "overlap": config.overlap,
        "mirror": config.mirror,
        "precision": config.precision,
    }
    there = [path for path in (_output(config, plan, case.name) for case in cases) if path.exists()]
    file_of_record = config.output_dir / RECORD
    if there and not file_of_record.exists():
        raise ValueError(
            f"output_dir {config.output_dir} holds {there[0].name} but no {RECORD}, so `s3d predict` did not write it; "
            "give another folder, or remove the file"
        )
    if file_of_record.exists() and not config.overwrite:
        before = json.loads(file_of_record.read_text(encoding="utf-8"))
        differing = [name for name, value in record.items() if before.get(name) != value]
        if differing:
            named = ", ".join(f"{name} {before.get(name)!r} (now {record[name]!r})" for name in differing)
            raise ValueError(
                f"output_dir {config.output_dir} was begun with {named}; give another folder, or --overwrite to do "
                "all of it again"
            )
    if config.overwrite:
        for path in there:
            path.unlink()
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(file_of_record, json.dumps(record, indent=2).encode())


def _segment(
    config: PredictConfig,
    plan: SegmentationPlan,
    network: ResidualEncoderUNet,
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
    network: ResidualEncoderUNet,
    prepared: PreparedCase,
    device: torch.device,
) -> Tensor:  # [K, D, H, W]
    exact = config.precision == "float32"
    with nullcontext() if exact else torch.autocast(device.type, dtype=getattr(torch, config.precision)):
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
        raise FloatingPointError(
            f"case {prepared.name}: the network's answer is not finite in {config.precision}; "
            f"{'the checkpoint is of no use' if exact else 'use --precision float32'}"
        )
    return logits


def _restore_and_write(path: Path, logits: Tensor, grid: CaseGrid, reference: Path) -> None:
    write_segmentation(path, restore(logits, grid, reference), reference)
