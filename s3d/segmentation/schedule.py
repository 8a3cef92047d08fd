"""Learning rate and frozen encoder of each step of a fine-tuning, as data: a schedule is a list of phases.

Source: Wald et al. (CVPR 2025), fine-tuning of section 4; "sawtooth" is the schedule that they chose. The formulas are
those of nnU-Net: linear increase, and polynomial decay with exponent 0.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ScheduleName = Literal["scratch", "no-warmup", "warmup", "sawtooth", "frozen"]

DECAY_EXPONENT = 0.9
WARMUP_SHARE = 0.05  # of a run, each warm-up: the published 12.5k of 250k steps


@dataclass(frozen=True)
class PhaseKind:
    """What a phase does, whatever its length.

    Attributes:
        name: in logs and plots.
        rises: the learning rate rises linearly to its peak; otherwise it decays from the peak to the end of the run.
        encoder_frozen: only the decoder and its heads are trained.
    """

    name: str
    rises: bool
    encoder_frozen: bool


WARM_DECODER = PhaseKind("warm-up of the decoder", rises=True, encoder_frozen=True)
WARM_ALL = PhaseKind("warm-up", rises=True, encoder_frozen=False)
TRAIN_DECODER = PhaseKind("training of the decoder", rises=False, encoder_frozen=True)
TRAIN_ALL = PhaseKind("training", rises=False, encoder_frozen=False)

# Peak of the learning rate, and the phases. The last phase fills the run, those before it are of one length.
SCHEDULES: dict[ScheduleName, tuple[float, tuple[PhaseKind, ...]]] = {
    "scratch": (1e-2, (TRAIN_ALL,)),
    "no-warmup": (1e-3, (TRAIN_ALL,)),
    "warmup": (1e-3, (WARM_ALL, TRAIN_ALL)),
    "sawtooth": (1e-3, (WARM_DECODER, WARM_ALL, TRAIN_ALL)),
    "frozen": (1e-3, (WARM_DECODER, TRAIN_DECODER)),
}


@dataclass(frozen=True)
class Phase:
    """Steps in a row that are trained alike.

    Attributes:
        kind: what they do.
        first: the first of these steps; the first of the run is 0.
        last: the last of these steps, included.
    """

    kind: PhaseKind
    first: int
    last: int

    @property
    def steps(self) -> int:
        """How many there are."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Schedule:
    """A schedule of a run of known length, see :func:`make_schedule`.

    Attributes:
        name: one of `SCHEDULES`.
        peak: highest learning rate.
        phases: in order; every step of the run is in one.
    """

    name: ScheduleName
    peak: float
    phases: tuple[Phase, ...]

    @property
    def steps(self) -> int:
        """Of the run."""
        return self.phases[-1].last + 1

    def phase(self, step: int) -> Phase:
        """The phase of a step.

        Raises:
            ValueError: the run has no such step.
        """
        for phase in self.phases:
            if phase.first <= step <= phase.last:
                return phase
        raise ValueError(f"step must be within 0..{self.steps - 1}, got {step}")

    def learning_rate(self, step: int) -> float:
        """Of a step; never 0.

        Raises:
            ValueError: the run has no such step.
        """
        phase = self.phase(step)
        done = step - phase.first
        if phase.kind.rises:
            return self.peak * (done + 1) / phase.steps
        return float(self.peak * (1 - done / phase.steps) ** DECAY_EXPONENT)

    def encoder_frozen(self, step: int) -> bool:
        """Whether a step trains the decoder and its heads only.

        Raises:
            ValueError: the run has no such step.
        """
        return self.phase(step).kind.encoder_frozen


def make_schedule(
    name: ScheduleName, steps: int, *, warmup_steps: int | None = None, peak: float | None = None
) -> Schedule:
    """The schedule of a run.

    Args:
        name: one of `SCHEDULES`.
        steps: of the run.
        warmup_steps: of each warm-up of the schedule, 5 % of the run if None.
        peak: highest learning rate; that of `SCHEDULES` if None.
    Raises:
        ValueError: no such schedule; a warm-up for a schedule without one; no step left after the warm-ups; a number
            that is not positive.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(get_args(ScheduleName))}, got {name!r}")
    usual_peak, kinds = SCHEDULES[name]
    peak = usual_peak if peak is None else peak
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < peak < float("inf"):
        raise ValueError(f"peak of the learning rate must be positive, got {peak}")
    warmups = len(kinds) - 1
    if warmup_steps is None:
        warmup_steps = max(1, round(WARMUP_SHARE * steps))
    elif warmup_steps < 1:
        raise ValueError(
            f"warmup_steps must be at least 1, got {warmup_steps}; schedules without a warm-up: {_without_warmup()}"
        )
    elif warmups == 0:
        raise ValueError(f"warmup_steps {warmup_steps}: schedule {name} has no warm-up; leave the option out")
    if warmups * warmup_steps >= steps:
        raise ValueError(
            f"warmup_steps {warmup_steps}, {warmups} times in schedule {name}, leave nothing of steps {steps}; "
            "take fewer warmup_steps or more steps"
        )
    starts = [index * warmup_steps for index in range(len(kinds))]
    phases = [Phase(kind, first, following - 1) for kind, first, following in zip(kinds, starts, [*starts[1:], steps])]
    return Schedule(name, peak, tuple(phases))


def _without_warmup() -> str:
    return ", ".join(name for name, (_, kinds) in SCHEDULES.items() if len(kinds) == 1)
