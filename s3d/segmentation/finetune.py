"""s3d finetune: train a segmentation model, from pre-trained weights or from scratch.

As in pre-training, a run is a pure function of its configuration: the patches of step i depend on the seed and i alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s3d.checkpoint import NEWEST, load_checkpoint
from s3d.data.store import write_atomically
from s3d.distributed import Processes, processes
from s3d.memory_model import choose_parts, dense_step_memory
from s3d.model import Network
from s3d.training_data import check_same_data, step_batches
from s3d.training_log import TrainingLog
from s3d.training_loop import Run, RunState, check_same_everywhere, run_steps, saved_state

from .case_store import open_dataset, prepare_dataset
from .finetune_config import FinetuneConfig
from .finetune_report import TRANSFER, write_finetune_report
from .patches import SegmentationPatches
from .plan import SegmentationPlan
from .planning import dynamic_plan, fixed_plan, kept_plan
from .raw_dataset import RawDataset, choose_split, read_raw_dataset
from .segmentation_step import SegmentationStep, build_segmentation_training
from .segmentation_validation import SegmentationValidator, dice_column
from .transfer import TensorRow, transfer, transfer_summary, write_transfer_table

log = logging.getLogger(__name__)

PLAN = "plan.json"


@dataclass(frozen=True)
class FinetuneResult:
    """What a run gave.

    Attributes:
        steps: steps done; fewer than asked for if a signal stopped the run.
        validation_dice: mean over foreground classes and cases at the last validation; NaN before the first, or without
            validation cases.
        seconds_per_step: median over this session's steps after the first.
        checkpoint: the file; there is none after `prepare_only`.
    """

    steps: int
    validation_dice: float
    seconds_per_step: float
    checkpoint: Path


@dataclass
class FinetuneState(RunState):
    """Numbers of a run that a checkpoint keeps; see ``FinetuneResult``."""

    validation_dice: float = float("nan")


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Fine-tune, or go on with a run that was stopped.

    Under torchrun its processes share every batch. Writes to ``config.output_dir``: ``config.json``, ``plan.json``,
    ``transfer.csv``, ``checkpoint.pt`` and the one before it, ``log.csv``, ``skipped_steps.csv``, ``validation.csv``,
    ``report.html``, ``training.png``, ``segmentation_*.png``, ``tensorboard/`` and, unless given, ``cases/``.

    Raises:
        ValueError: data set, checkpoint and settings do not fit together; or the folder holds a run with others.
        BadImageError: a case cannot be used (and not ``skip_bad``).
        FloatingPointError: loss or gradient were not finite in more than ``max_skipped`` steps in a row.
        OSError: a file is missing; or a checkpoint could not be written: the one before is untouched.
    """
    with processes(config.device) as group:
        return _run(config, group)


def _run(config: FinetuneConfig, group: Processes) -> FinetuneResult:
    output = config.output_dir
    state, saved = saved_state(config, group, FinetuneState)
    dataset = read_raw_dataset(config.dataset)
    training_cases, validation_cases = choose_split(dataset, config.fold, config.splits)
    if saved is None:
        network, plan, rows, preset = _begin(config, dataset)
    else:
        plan, rows, preset = _saved_plan(saved, dataset), [], saved["preset"]
        network = plan.build_network(config.deep_supervision)
    if state.step >= config.steps:
        log.info("%s is complete at step %d", output, state.step)
        if group.first:
            write_finetune_report(config, plan)
        return _result(config, state, float("nan"))
    # Once each: with fold "all" a case is on both sides.
    cases = list({case.name: case for case in (*training_cases, *validation_cases)}.values())
    folder = config.case_folder
    if group.world > 1:
        store = open_dataset(cases, plan, folder)
    else:
        store = prepare_dataset(cases, plan, folder, skip_bad=config.skip_bad, workers=config.workers)
    for error in store.skipped:
        if not config.skip_bad:  # whoever prepared the cases skipped it
            raise error
        if group.first:
            log.warning("skipped %s", error)
    if config.prepare_only:
        log.info("%d cases are prepared in %s", len(store), store.folder)
        return _result(config, state, float("nan"))
    prepared = {case.name for case in store.cases}
    training, validation = (
        [case.name for case in chosen if case.name in prepared] for chosen in (training_cases, validation_cases)
    )
    if not training:
        raise ValueError(f"all training cases are bad, for example {store.skipped[0]}")
    data = {"training": store.describe(training), "validation": store.describe(validation)}
    check_same_everywhere(group, hashlib.sha256(json.dumps(data).encode()).hexdigest(), f"cases in {folder}")
    parts = choose_parts(config, group, dense_step_memory(config, network, plan.network, plan.patch_size))
    fitted = build_segmentation_training(config, network.to(group.device), state.step)
    if group.first:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / PLAN, (json.dumps(plan.plain(), indent=2) + "\n").encode())
    if saved is not None:
        check_same_data(data, saved["data"], output)
        fitted.load_state(saved)
        log.info("resuming at step %d of %d", state.step, config.steps)
        del saved
    elif group.first:
        (output / TRANSFER).unlink(missing_ok=True)  # of a run that was stopped before its first checkpoint
        if rows:
            write_transfer_table(rows, output / TRANSFER)
            log.info("%s: %s; every tensor is in %s", config.checkpoint, transfer_summary(rows), output / TRANSFER)
    validator = SegmentationValidator(config, plan, store, validation, group)

    def validate(training_log: TrainingLog | None) -> None:
        if state.step:
            state.validation_dice = validator(fitted.model, training_log, state.step)

    patches = SegmentationPatches(
        store,
        training,
        plan.patch_size,
        seed=config.seed,
        length=config.steps * config.batch_size,
        augmentation=config.augment,
        foreground_share=config.foreground,
    )
    run = Run(
        config=config,
        group=group,
        name="fine-tuning",
        columns=("validation_dice", *map(dice_column, plan.class_names[1:])),
        training=fitted,
        train=SegmentationStep(config, fitted, group, parts),
        batches=step_batches(config, patches, group, parts, state.step),
        validate=validate,
        report=lambda: write_finetune_report(config, plan),
        record={"plan": plan.plain(), "data": data, "preset": preset},
        sources={case.name: str(case.images[0]) for case in training_cases},
    )
    seconds = run_steps(run, state)
    return _result(config, state, seconds)


def _begin(config: FinetuneConfig, dataset: RawDataset) -> tuple[Network, SegmentationPlan, list[TensorRow], str]:
    """Network, plan, what became of the checkpoint's tensors, and preset of a new run.

    A checkpoint that does not fit is refused here, before any case is prepared.
    """
    pretrained = None if config.checkpoint is None else load_checkpoint(config.checkpoint)
    plan, preset = make_plan(config, dataset, pretrained)
    torch.manual_seed(config.seed)
    network = plan.build_network(config.deep_supervision)
    rows: list[TensorRow] = []
    if pretrained is not None:
        rows = transfer(network, pretrained, config.scope, config.weights, checkpoint=str(config.checkpoint))
    return network, plan, rows, preset


def make_plan(
    config: FinetuneConfig, dataset: RawDataset, pretrained: dict[str, Any] | None
) -> tuple[SegmentationPlan, str]:
    """The plan and preset that the settings ask for; what they leave open is that of the checkpoint.

    Args:
        config: of the run.
        dataset: to train on.
        pretrained: content of the checkpoint, if there is one.
    Raises:
        ValueError: the settings do not fit the network or the data.
    """
    old: dict[str, Any] = {}
    if pretrained is not None:
        # Of s3d finetune, s3d pretrain or, with less in it, s3d import.
        old = {**pretrained["config"], **pretrained.get("plan", {})}
        old |= {name: pretrained[name] for name in ("spacing_mm", "preset") if name in pretrained}
    preset = config.preset or old.get("preset") or "resenc-l"
    wanted: dict[str, Any] = {"preset": preset}
    if config.patch == "dynamic":
        # A plan counts memory in half precision.
        memory_gib = config.memory_gib / (2 if config.precision == "float32" else 1)
        wanted |= {"memory_gib": memory_gib, "batch_size": config.batch_size}
    else:
        wanted["spacing_mm"] = config.spacing_mm or old.get("spacing_mm") or 1.0
        wanted["patch_size"] = config.patch_size or old.get("patch_size") or (160, 160, 160)
    wanted["skip_bad"] = config.skip_bad
    plan = functools.partial(dynamic_plan if config.patch == "dynamic" else fixed_plan, dataset, **wanted)
    return kept_plan(plan, config.patch, dataset, wanted, config.case_folder, config.workers), preset


def _saved_plan(saved: dict[str, Any], dataset: RawDataset) -> SegmentationPlan:
    """That of a run to go on with.

    Raises:
        ValueError: the data set has other channels or classes now.
    """
    plan = SegmentationPlan.from_plain(saved["plan"])
    for name in ("channel_names", "class_names", "file_ending"):
        before, now = getattr(plan, name), getattr(dataset, name)
        if before != now:
            raise ValueError(
                f"{dataset.folder / 'dataset.json'}: {name} was {before} when the run began and is {now}; restore it "
                "to go on, or give another output_dir"
            )
    return plan


def _result(config: FinetuneConfig, state: FinetuneState, seconds_per_step: float) -> FinetuneResult:
    return FinetuneResult(
        steps=state.step,
        validation_dice=state.validation_dice,
        seconds_per_step=seconds_per_step,
        checkpoint=config.output_dir / NEWEST,
    )
