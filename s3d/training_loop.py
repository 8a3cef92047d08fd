"""The loop of a run, whatever it trains: resume, steps, logs, validation, checkpoints, signals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .checkpoint import NEWEST, PREVIOUS, find_checkpoint, load_checkpoint, put_damaged_aside, save_checkpoint
from .data.store import write_atomically
from .distributed import Processes
from .optimizer_step import OptimizerStep, StepResult, Training
from .progress import Progress
from .run_settings import RunSettings
from .stop_signals import stop_signals
from .training_log import TrainingLog

log = logging.getLogger(__name__)


@dataclass
class RunState:
    """Numbers of a run that a checkpoint keeps.

    Attributes:
        step: steps done.
    """

    step: int = 0


State = TypeVar("State", bound=RunState)


@dataclass(frozen=True)
class Run:
    """What a loop trains, and what it calls.

    Attributes:
        config: settings.
        group: processes that share every batch.
        name: of what is done, for the progress bar.
        columns: of the log beside those that every run has.
        training: model and optimiser.
        train: a step.
        batches: the parts of the remaining steps' batches of this process.
        validate: called with the log (of the first process, None in others); writes to it and to the state.
        report: writes what a user looks at; called in the first process.
        record: what checkpoints hold beside state, settings and weights.
        sources: file of each case that batches name.
    """

    config: RunSettings
    group: Processes
    name: str
    columns: Sequence[str]
    training: Training[Any]
    train: OptimizerStep[Any, Any]
    batches: Iterator[dict[str, Any]]
    validate: Callable[[TrainingLog | None], None]
    report: Callable[[], None]
    record: dict[str, Any]
    sources: dict[str, str]


def saved_state(config: RunSettings, group: Processes, state: type[State]) -> tuple[State, dict[str, Any] | None]:
    """Where a run begins: its state and the checkpoint to go on from, as ``config.resume`` wants it.

    Returns: the state, and the content of the checkpoint on the CPU, or None for a new run.
    Raises:
        ValueError: the folder holds a run that this one cannot go on with; or the processes see different folders.
    """
    path, saved = _find_saved(config)
    output, found = config.output_dir, state()
    if saved is not None:
        missing = sorted({"optimizer", *(field.name for field in dataclasses.fields(state))} - saved.keys())
        if "optimizer" in missing:
            raise ValueError(f"the checkpoint in output_dir {output} holds weights only and cannot be resumed")
        if missing:
            raise ValueError(f"output_dir {output} holds a run of another command; give another output_dir")
        config.check_same_run(saved["config"])
        found = state(**{field.name: saved[field.name] for field in dataclasses.fields(state)})
    check_same_everywhere(group, found.step, f"checkpoints in output_dir {output}")
    if group.first and path == output / PREVIOUS:
        put_damaged_aside(output)
    return found, saved


def _find_saved(config: RunSettings) -> tuple[Path | None, dict[str, Any] | None]:
    found = find_checkpoint(config.output_dir)
    if found is None:
        return (None, None) if config.resume in ("auto", "never") else (None, load_checkpoint(config.resume))
    if config.resume == "never":
        raise ValueError(f"output_dir {config.output_dir} holds a run and resume is 'never'; give another output_dir")
    return found


def check_same_everywhere(group: Processes, value: object, what: str) -> None:
    """Processes that do not see the same files would silently train something else."""
    values = group.gather(value)
    if len(set(values)) > 1:
        raise ValueError(f"the processes find different {what}: it must be a folder that all of them see; got {values}")


def run_steps(run: Run, state: RunState) -> float:
    """Train until the last step or a signal.

    Args:
        run: what to train.
        state: of the run; is changed.
    Returns: median seconds of a step, over this session's steps after the first.
    Raises:
        FloatingPointError: loss or gradient were not finite in more than ``max_skipped`` steps in a row.
        OSError: a checkpoint could not be written; the one before is untouched.
    """
    config, group, output = run.config, run.group, run.config.output_dir
    step_seconds: list[float] = []
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        training_log = None
        if group.first:
            output.mkdir(parents=True, exist_ok=True)
            write_atomically(output / "config.json", (json.dumps(config.plain(), indent=2) + "\n").encode())
            training_log = TrainingLog(output, state.step, run.columns)
            stack.enter_context(contextlib.closing(training_log))
        skipped = SkippedSteps(config, group, training_log)

        def save() -> None:
            _check_weights(run.training, state.step, config)
            if group.first:
                content = {**dataclasses.asdict(state), "config": config.plain(), **run.record}
                save_checkpoint(output / NEWEST, {**content, **run.training.state()})

        if state.step == 0:
            run.validate(training_log)
        progress = stack.enter_context(contextlib.closing(Progress(config, group, state.step, run.name)))
        # Signals reach the processes at different moments, but they stop behind the same step.
        while state.step < config.steps and not group.total(len(stop))[0]:
            progress.begin()
            try:
                patches = run.train.read(run.batches)
            except RuntimeError:
                # A signal that stops all processes of a job may end the workers before this one has read it.
                if stop and group.world == 1:
                    break
                raise
            progress.data_ready()
            result = run.train(patches, state.step)
            state.step += 1
            skipped.check(result, state.step, [run.sources[name] for part in patches for name in part["case"]])
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
                        **result.figures,
                        **figures,
                    )
            if last:
                break
            if state.step % config.validate_every == 0:
                run.validate(training_log)
                if group.first:
                    run.report()
            if state.step % config.checkpoint_every == 0:
                save()
        if state.step < config.steps:
            save()
            log.warning(
                "stopped by a signal at step %d of %d; the same command goes on from here", state.step, config.steps
            )
        else:
            run.validate(training_log)
            save()
    if group.first:
        run.report()
    # The first step also waits for the first patches.
    return statistics.median(step_seconds[1:] or step_seconds or [float("nan")])


class SkippedSteps:
    """Records steps whose loss or gradient is not finite, and stops the run after too many in a row.

    Args:
        config: of the run.
        group: its processes.
        training_log: of the first of them.
    """

    def __init__(self, config: RunSettings, group: Processes, training_log: TrainingLog | None) -> None:
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


def _check_weights(training: Training[Any], step: int, config: RunSettings) -> None:
    """Before every checkpoint, so that none replaces a good one with NaN."""
    if not all(bool(parameter.isfinite().all()) for parameter in training.model.parameters()):
        raise FloatingPointError(
            f"step {step}: weights are not finite. The last checkpoint is untouched; "
            f"a smaller learning_rate than {config.peak_learning_rate} may help, in a new output_dir."
        )
