"""Pre-training, with S3D or another method: the whole run, top to bottom.

A run is a pure function of its configuration: the patches and masks of step i depend on the seed and i alone. So a run
that was stopped resumes exactly from its checkpoint, without any state of random number generators.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from s3d_kernels import use_backend

from .checkpoint import NEWEST, load_checkpoint
from .distributed import Processes, processes
from .memory_model import choose_parts, step_memory
from .optimizer_step import joined_state
from .pretext.registry import METHODS
from .pretrain_config import PretrainConfig
from .run_report import write_run_report
from .training_data import check_same_data, data_record, prepare_volumes, training_batches, usual_spacing
from .training_log import TrainingLog
from .training_loop import Run, RunState, check_same_everywhere, run_steps, saved_state
from .training_step import TrainingStep, build_training
from .validation import Validator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainResult:
    """What a run gave.

    Attributes:
        steps: steps done; fewer than asked for if a signal stopped the run.
        initial_loss: validation loss of the untrained network.
        final_loss: of the network at its last validation, which is the end unless a signal stopped the run.
        mean_loss: of an answer without a network, which a model must beat: for S3D the mean of the visible voxels. NaN
            where the method has none.
        seconds_per_step: median over this session's steps after the first.
        checkpoint: the file.
    """

    steps: int
    initial_loss: float
    final_loss: float
    mean_loss: float
    seconds_per_step: float
    checkpoint: Path


@dataclass
class PretrainState(RunState):
    """Numbers of a run that a checkpoint keeps; see ``PretrainResult``."""

    initial_loss: float = float("nan")
    validation_loss: float = float("nan")
    mean_loss: float = float("nan")


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Pre-train, or go on with a run that was stopped.

    Under torchrun its processes share every batch. Writes to ``config.output_dir``: ``config.json``, ``checkpoint.pt``
    and the one before it, ``log.csv``, ``skipped_steps.csv``, ``report.html``, ``loss.png``,
    ``reconstruction_*.png``, ``tensorboard/`` and, where images are given, ``volumes/``.

    Raises:
        ValueError: the folder holds a run with other settings or images; names those that differ.
        BadImageError: an image cannot be used (and not ``skip_bad``).
        FloatingPointError: loss or gradient were not finite in more than ``max_skipped`` steps in a row.
        OSError: a checkpoint could not be written; the one before is untouched.
    """
    with processes(config.device) as group:
        parts = choose_parts(config, group, step_memory(config, group.device))
        return _run(config, group, parts)


def _run(config: PretrainConfig, group: Processes, parts: int) -> PretrainResult:
    output = config.output_dir
    state, saved = saved_state(config, group, PretrainState)
    pretext = METHODS[config.method](config)
    together = config.batch_size // (group.world * parts)
    if pretext.mixes_samples and together < config.batch_size and group.first:
        log.warning(
            "method %s sets samples against each other, of which %d of %d are computed at the same time: with other "
            "--accumulate or processes this is another run",
            config.method,
            together,
            config.batch_size,
        )
    if state.step >= config.steps:
        log.info("%s is complete at step %d", output, state.step)
        if group.first:
            write_run_report(config, pretext, state.mean_loss)
        return _result(config, state, float("nan"))
    store, training_cases, validation_cases = prepare_volumes(config, group)
    data = data_record(store, training_cases, validation_cases)
    check_same_everywhere(group, hashlib.sha256(json.dumps(data).encode()).hexdigest(), f"volumes in {store.folder}")
    training = build_training(config, pretext, group.device)
    if saved is not None:
        check_same_data(data, saved["data"], output)
        training.load_state(saved)
        log.info("resuming at step %d of %d", state.step, config.steps)
        del saved

    validator = Validator(config, pretext, store, validation_cases or training_cases, group)
    state.mean_loss = validator.trivial_loss

    def validate(training_log: TrainingLog | None) -> None:
        state.validation_loss = validator(training.model, training_log, state.step)
        if state.step == 0:
            state.initial_loss = state.validation_loss

    run = Run(
        config=config,
        group=group,
        name="pre-training",
        columns=("validation_loss", *pretext.columns),
        training=training,
        train=TrainingStep(config, pretext, training, group, parts),
        batches=training_batches(config, store, training_cases, group, parts, state.step),
        validate=validate,
        report=lambda: write_run_report(config, pretext, state.mean_loss),
        record={
            "data": data,
            "spacing_mm": usual_spacing(store, training_cases),
            "trained": pretext.trained,
        },
        sources={case.name: case.source for case in store.cases},
    )
    with use_backend(config.backend):
        seconds = run_steps(run, state)
    return _result(config, state, seconds)


def _result(config: PretrainConfig, state: PretrainState, seconds_per_step: float) -> PretrainResult:
    return PretrainResult(
        steps=state.step,
        initial_loss=state.initial_loss,
        final_loss=state.validation_loss,
        mean_loss=state.mean_loss,
        seconds_per_step=seconds_per_step,
        checkpoint=config.output_dir / NEWEST,
    )


def load_model(checkpoint: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The pre-trained model of a checkpoint: an `S3D`, or what another method has trained.

    Raises: as :func:`s3d.checkpoint.load_checkpoint`.
    """
    saved = load_checkpoint(checkpoint, device)
    # What the model is made from; an imported checkpoint has no more, and older ones know no method.
    names = {"method", "preset", "sparse", "mask_tokens", "densify"} & saved["config"].keys()
    config = PretrainConfig(output_dir=Path(checkpoint).parent, **{name: saved["config"][name] for name in names})
    model = METHODS[config.method](config).build_model().to(device)
    model.load_state_dict(joined_state(saved))
    return model
