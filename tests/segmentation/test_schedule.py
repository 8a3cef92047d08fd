"""Schedules of fine-tuning: which learning rate a step has, and which weights it trains."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s3d.segmentation.schedule import SCHEDULES, Schedule, make_schedule
from s3d.segmentation.schedule_figure import drawn_data, schedule_figure, write_schedule_figure

PLOT = Path(__file__).resolve().parents[2] / "docs" / "images" / "schedules.png"


def rates(schedule: Schedule) -> list[float]:
    return [schedule.learning_rate(step) for step in range(schedule.steps)]


def poly(peak: float, steps: int) -> list[float]:
    return [peak * (1 - step / steps) ** 0.9 for step in range(steps)]


def test_scratch_and_no_warmup_decay_from_the_first_step() -> None:
    assert rates(make_schedule("scratch", 40)) == pytest.approx(poly(1e-2, 40))
    assert rates(make_schedule("no-warmup", 40)) == pytest.approx(poly(1e-3, 40))


def test_warmup_rises_to_the_peak_and_decays_to_the_end() -> None:
    schedule = make_schedule("warmup", 50, warmup_steps=4, peak=2e-3)
    assert rates(schedule) == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, *poly(2e-3, 46)])
    assert not any(schedule.encoder_frozen(step) for step in range(50))


def test_the_published_sawtooth() -> None:
    """12.5k steps of the decoder alone, 12.5k of the whole network, the rest of 250k with decay."""
    schedule = make_schedule("sawtooth", 250_000)
    assert [(phase.kind.name, phase.first, phase.last, phase.kind.encoder_frozen) for phase in schedule.phases] == [
        ("warm-up of the decoder", 0, 12_499, True),
        ("warm-up", 12_500, 24_999, False),
        ("training", 25_000, 249_999, False),
    ]
    assert schedule.learning_rate(0) == schedule.learning_rate(12_500) == pytest.approx(1e-3 / 12_500)
    for step in (12_499, 24_999, 25_000):
        assert schedule.learning_rate(step) == pytest.approx(1e-3)
    assert schedule.encoder_frozen(12_499)
    assert not schedule.encoder_frozen(12_500)
    assert schedule.learning_rate(137_500) == pytest.approx(1e-3 * 0.5**0.9)


def test_frozen_never_trains_the_encoder() -> None:
    schedule = make_schedule("frozen", 50, warmup_steps=4)
    assert rates(schedule) == pytest.approx(rates(make_schedule("warmup", 50, warmup_steps=4)))
    assert all(schedule.encoder_frozen(step) for step in range(50))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [3, 7, 100])
def test_every_step_trains_and_is_in_one_phase(name: Any, steps: int) -> None:
    schedule = make_schedule(name, steps)
    assert [step for phase in schedule.phases for step in range(phase.first, phase.last + 1)] == list(range(steps))
    assert all(0 < rate <= schedule.peak for rate in rates(schedule))
    assert max(rates(schedule)) == schedule.peak == SCHEDULES[name][0]
    for step in (-1, steps):
        with pytest.raises(ValueError, match=f"step must be within 0..{steps - 1}, got {step}"):
            schedule.learning_rate(step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cosine", "steps": 10}, r"schedule must be one of scratch, .*frozen, got 'cosine'"),
        ({"name": "scratch", "steps": 0}, "steps must be at least 1, got 0"),
        ({"name": "scratch", "steps": 10, "peak": 0.0}, "peak .* must be positive, got 0.0"),
        ({"name": "scratch", "steps": 10, "peak": float("nan")}, "peak .* must be positive, got nan"),
        ({"name": "warmup", "steps": 10, "warmup_steps": 0}, "schedules without a warm-up: scratch, no-warmup"),
        ({"name": "scratch", "steps": 10, "warmup_steps": 2}, "schedule scratch has no warm-up"),
        ({"name": "sawtooth", "steps": 10, "warmup_steps": 5}, "warmup_steps 5, 2 times .* leave nothing of steps 10"),
        ({"name": "sawtooth", "steps": 2}, "warmup_steps 1, 2 times"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(**arguments)


def test_the_plot_shows_what_trains() -> None:
    for axes in schedule_figure(steps=40, warmup_steps=4).axes:
        name: Any = axes.get_title()
        warmup_steps = None if len(SCHEDULES[name][1]) == 1 else 4
        points = np.concatenate([np.asarray(line.get_xydata()) for line in axes.get_lines()])
        expected = rates(make_schedule(name, 40, warmup_steps=warmup_steps))
        np.testing.assert_allclose(points, [(step / 1000, rate) for step, rate in enumerate(expected)])


def test_the_plot_of_the_docs_is_of_this_code(tmp_path: Path) -> None:
    """If not: python -m s3d.segmentation.schedule_figure docs/images/schedules.png"""
    assert drawn_data().encode() in PLOT.read_bytes()
    write_schedule_figure(tmp_path / "new.png")
    assert drawn_data().encode() in (tmp_path / "new.png").read_bytes()
