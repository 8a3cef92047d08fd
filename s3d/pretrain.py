"""S3D pre-training: the whole method, top to bottom.

A run is a pure function of its configuration: the patches and masks of step i depend on the seed and i alone. So a run
that was stopped resumes exactly from its checkpoint, without any state of random number generators.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s3d_kernels import use_backend

from .checkpoint import NEWEST, PREVIOUS, find_checkpoint, load_checkpoint, put_damaged_aside, save_checkpoint
from .data.store import write_atomically
from .distributed import Processes, processes
from .memory_model import fewest_parts, free_memory, step_memory
from .model import S3D, build_unet
from .pretrain_config import PretrainConfig
from .progress import Progress
from .run_report import write_run_report
from .stop_signals import stop_signals
from .training_data import check_same_data, data_record, prepare_volumes, training_batches, usual_spacing
from .training_log import TrainingLog
from .training_step import StepResult, Training, TrainingStep, build_training, joined_state
from .validation import Validator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainResult:
    """What a run gave.

    Attributes:
        steps: steps done; fewer than asked for if a signal stopped the run.
        initial_loss: validation loss of the untrained network.
        final_loss: of the network at its last validation, which is the end unless a signal stopped the run.
        mean_loss: of predicting the mean of the visible voxels: what a model must beat.
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
class RunState:
    """Numbers of a run that a checkpoint keeps; see ``PretrainResult``."""

    step: int = 0
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
        if config.batch_size % (group.world * (config.accumulate or 1)):
            raise ValueError(
                f"batch_size must be a multiple of processes ({group.world}) times accumulate "
                f"({config.accumulate or 1}), got {config.batch_size}"
            )
        return _run(config, group, _parts(config, group))


def _parts(config: PretrainConfig, group: Processes) -> int:
    """Into how many parts each process cuts its patches of a step; says how much memory that is expected to take."""
    memory, free = step_memory(config, group.device), free_memory(group.device)
    patches = config.batch_size // group.world
    free = min(group.gather(free))  # all must do the same
    parts = config.accumulate or fewest_parts(memory, patches, free)
    expected = memory.total(patches // parts)
    if group.first:
        log.log(
            logging.WARNING if expected > free else logging.INFO,
            "expected memory: %.2f GiB for weights, gradients and optimiser, %.2f GiB for %d patch(es) at once "
            "(accumulate %d); %.1f GiB are there",
            memory.weights / 2**30,
            memory.patch * (patches // parts) / 2**30,
            patches // parts,
            parts,
            free / 2**30,
        )
    return parts


def _run(config: PretrainConfig, group: Processes, parts: int) -> PretrainResult:
    output, state = config.output_dir, RunState()
    path, saved = _find_saved(config)
    if saved is not None:
        if "optimizer" not in saved:
            raise ValueError(f"the checkpoint in output_dir {output} holds weights only and cannot be resumed")
        config.check_same_run(saved["config"], output)
        state = RunState(**{field.name: saved[field.name] for field in dataclasses.fields(RunState)})
    _check_same_everywhere(group, state.step, f"checkpoints in output_dir {output}")
    if group.first and path == output / PREVIOUS:
        put_damaged_aside(output)
    if state.step >= config.steps:
        log.info("%s is complete at step %d", output, state.step)
        if group.first:
            write_run_report(config, state.mean_loss)
        return _result(config, state, [])
    store, training_cases, validation_cases = prepare_volumes(config, group)
    data = data_record(store, training_cases, validation_cases)
    _check_same_everywhere(group, hashlib.sha256(json.dumps(data).encode()).hexdigest(), f"volumes in {store.folder}")
    training = build_training(config, group.device)
    if saved is not None:
        check_same_data(data, saved["data"], output)
        training.load_state(saved)
        log.info("resuming at step %d of %d", state.step, config.steps)
        del saved

    spacing_mm = usual_spacing(store, training_cases)
    sources = {case.name: case.source for case in store.cases}
    batches = training_batches(config, store, training_cases, group, parts, state.step)
    train = TrainingStep(config, training, group, parts)
    validate = Validator(config, store, validation_cases or training_cases, group)
    state.mean_loss = validate.mean_loss
    step_seconds: list[float] = []

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        stack.enter_context(use_backend(config.backend))
        training_log = None
        if group.first:
            output.mkdir(parents=True, exist_ok=True)
            write_atomically(output / "config.json", (json.dumps(config.plain(), indent=2) + "\n").encode())
            training_log = TrainingLog(output, state.step)
            stack.enter_context(contextlib.closing(training_log))
        skipped = SkippedSteps(config, group, training_log)

        def save() -> None:
            _check_weights(training, state.step, config)
            if group.first:
                content = {
                    **dataclasses.asdict(state),
                    "config": config.plain(),
                    "data": data,
                    "spacing_mm": spacing_mm,
                }
                save_checkpoint(output / NEWEST, {**content, **training.state()})

        if state.step == 0:
            state.initial_loss = state.validation_loss = validate(training.model, training_log, 0)
        progress = stack.enter_context(contextlib.closing(Progress(config, group, state.step)))
        # Signals reach the processes at different moments, but they stop behind the same step.
        while state.step < config.steps and not group.total(len(stop))[0]:
            progress.begin()
            try:
                patches = train.read(batches)
            except RuntimeError:
                # A signal that stops all processes of a job may end the workers before this one has read it.
                if stop and group.world == 1:
                    break
                raise
            progress.data_ready()
            result = train(patches, state.step)
            state.step += 1
            skipped.check(result, state.step, [sources[name] for part in patches for name in part["case"]])
            progress.done()
            last = state.step == config.steps
            if result.finite and (state.step % config.log_every == 0 or last):
                figures = progress.figures(result.loss)
                step_seconds.append(config.batch_size / figures["samples_per_second"])
                if training_log is not None:
                    training_log.write(
                        state.step,
                        loss=result.loss,
                        learning_rate=config.learning_rate_at(state.step - 1),
                        gradient_norm=result.gradient_norm,
                        mask_ratio=result.mask_ratio,
                        **figures,
                    )
            if last:
                break
            if state.step % config.validate_every == 0:
                state.validation_loss = validate(training.model, training_log, state.step)
                if group.first:
                    write_run_report(config, state.mean_loss)
            if state.step % config.checkpoint_every == 0:
                save()
        if state.step < config.steps:
            save()
            log.warning(
                "stopped by a signal at step %d of %d; the same command goes on from here", state.step, config.steps
            )
        else:
            state.validation_loss = validate(training.model, training_log, state.step)
            save()
    if group.first:
        write_run_report(config, state.mean_loss)
    return _result(config, state, step_seconds)


def _find_saved(config: PretrainConfig) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to go on from, as ``config.resume`` wants it; on the CPU, from where it is copied."""
    found = find_checkpoint(config.output_dir)
    if found is None:
        return (None, None) if config.resume in ("auto", "never") else (None, load_checkpoint(config.resume))
    if config.resume == "never":
        raise ValueError(f"output_dir {config.output_dir} holds a run and resume is 'never'; give another output_dir")
    return found


def _check_same_everywhere(group: Processes, value: object, what: str) -> None:
    """Processes that do not see the same files would silently train something else."""
    values = group.gather(value)
    if len(set(values)) > 1:
        raise ValueError(f"the processes find different {what}: it must be a folder that all of them see; got {values}")


def _result(config: PretrainConfig, state: RunState, step_seconds: Sequence[float]) -> PretrainResult:
    return PretrainResult(
        steps=state.step,
        initial_loss=state.initial_loss,
        final_loss=state.validation_loss,
        mean_loss=state.mean_loss,
        # The first step also waits for the first patches.
        seconds_per_step=statistics.median(step_seconds[1:] or step_seconds or [float("nan")]),
        checkpoint=config.output_dir / NEWEST,
    )


class SkippedSteps:
    """Records steps whose loss or gradient is not finite, and stops the run after too many in a row.

    Args:
        config: of the run.
        group: its processes.
        training_log: of the first of them.
    """

    def __init__(self, config: PretrainConfig, group: Processes, training_log: TrainingLog | None) -> None:
        self.config = config
        self.group = group
        self.training_log = training_log
        self.in_a_row = 0

    def check(self, result: StepResult, step: int, images: list[str]) -> None:
        """Look at a step of all processes.

        Args:
            result: of the step.
            step: number, from 1.
            images: files that this process's patches are from.
        Raises:
            FloatingPointError: too many in a row.
        """
        if result.finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        images = [image for images in self.group.gather(images) for image in images]
        what = f"the loss is {result.loss}, the gradient norm is {result.gradient_norm}"
        if self.training_log is not None:
            self.training_log.write_skipped(step, result.loss, result.gradient_norm, images)
            log.warning("step %d skipped: %s (skipped_steps.csv names the images)", step, what)
        if self.in_a_row > self.config.max_skipped:
            raise FloatingPointError(
                f"step {step}: {what}, in {self.in_a_row} steps in a row, the last on {', '.join(images)}; all are in "
                f"{self.config.output_dir / 'skipped_steps.csv'}. The last checkpoint is untouched; a smaller "
                f"learning_rate than {self.config.peak_learning_rate} or another precision than "
                f"{self.config.precision} may help, in a new output_dir."
            )


def _check_weights(training: Training, step: int, config: PretrainConfig) -> None:
    """Before every checkpoint, so that none replaces a good one with NaN."""
    if not all(bool(parameter.isfinite().all()) for parameter in training.model.parameters()):
        raise FloatingPointError(
            f"step {step}: weights are not finite. The last checkpoint is untouched; "
            f"a smaller learning_rate than {config.peak_learning_rate} may help, in a new output_dir."
        )


def load_model(checkpoint: str | Path, device: torch.device | str = "cpu") -> S3D:
    """The pre-trained model of a checkpoint.

    Raises: as :func:`s3d.checkpoint.load_checkpoint`.
    """
    saved = load_checkpoint(checkpoint, device)
    config = saved["config"]
    switches = {name: config[name] for name in ("sparse", "mask_tokens", "densify")}
    model = S3D(build_unet(config["preset"]), **switches).to(device)
    model.load_state_dict(joined_state(saved))
    return model
