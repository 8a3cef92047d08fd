"""`pytest bench/ --benchmark` measures; without the option every benchmark runs once, tiny, as a smoke test.

A benchmark module has a function `cases(settings)`; its tests get a case, a contender and a phase each.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import Case
from contenders import AUTO, CONTENDERS, able
from machine import describe_machine, device
from pytest_benchmark.fixture import BenchmarkFixture
from report import write_folder
from results import Results
from settings import Settings, add_options, read_options
from turns import CLOCK, PHASES, Measured, Report, find, measure, record, word


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        config.option.benchmark_quiet = True  # the times of a smoke test tell nothing


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """pytest-benchmark's own files say the same of the machine as ours."""
    machine_info.update(describe_machine())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    settings = read_options(metafunc.config)
    entries = [
        pytest.param(case, name, phase, id=f"{case.id}-{word(name)}-{phase}")
        for case in metafunc.module.cases(settings)
        for name in _contenders(case, settings)
        for phase in PHASES
    ]
    metafunc.parametrize(("case", "contender", "phase"), entries)


def _contenders(case: Case, settings: Settings) -> tuple[str, ...]:
    if case.question == "curve":
        return (AUTO.name,)
    if settings.contenders is None:
        names = able(case, device())
        if case.layer or settings.full or device() != "cpu":
            return names
        # Minutes for a whole network, and on CPUs never the faster of the two dense ones (docs/performance.md).
        return tuple(name for name in names if name != "dense channels-last")
    return tuple(name for name in settings.contenders if find(name).why_not(case, device()) is None)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Who is not measured here, and why."""
    if not config.getoption("--benchmark"):
        return []
    case = Case("layer", "stage 0 conv 3", "resenc-l", 96, 1, 32, "blocks", 0.75, "float32")
    reasons = {name: contender.why_not(case, device()) for name, contender in CONTENDERS.items()}
    return [f"not measured: {name}: {reason}" for name, reason in reasons.items() if reason is not None]


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    return read_options(request.config)


@pytest.fixture(scope="session")
def _results(request: pytest.FixtureRequest) -> Iterator[Results | None]:
    """Where measured entries go; None in a smoke test."""
    if not request.config.getoption("--benchmark"):
        yield None
        return
    machine = describe_machine()
    given = request.config.getoption("--results")
    folder = Path(given) if given else Path(__file__).parent / "results" / machine["slug"]
    results = Results(folder, machine, datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
    yield results
    results.save()
    if results.written:
        reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line("\n" + "\n\n".join([*write_folder(folder).values(), f"written to {folder}"]))


@pytest.fixture(scope="session")
def _last() -> dict[Case, dict[str, Measured]]:
    """The case that was measured last; its entries follow one another."""
    return {}


@pytest.fixture
def report(
    benchmark: BenchmarkFixture,
    settings: Settings,
    request: pytest.FixtureRequest,
    _results: Results | None,
    _last: dict[Case, dict[str, Measured]],
) -> Report:
    """Gives an entry of a case to pytest-benchmark and the results; measures the case if it is the first."""

    def run(case: Case, contender: str, phase: str) -> None:
        benchmark.group = case.id
        if case not in _last:
            if _results is not None:
                _results.save()
            _last.clear()
            # Those that -k left, with a case in common.
            calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            names = dict.fromkeys(call["contender"] for call in calls if call.get("case") == case)
            whole = not case.layer
            _last[case] = measure(
                case, tuple(names), settings.rounds, settings.seconds, memory=settings.measure and whole
            )
            if request.config.getoption("--profile"):
                able_here = [name for name in names if _last[case][name].seconds["both"]]
                record(case, able_here, Path(request.config.getoption("--profile")))
        measured = _last[case][contender]
        if measured.error is not None:
            benchmark.skipped = True
            pytest.fail(f"{contender}: {measured.error}", pytrace=False)
        if measured.why_not is not None:
            benchmark.skipped = True  # otherwise pytest-benchmark warns that it was not used
            pytest.skip(f"{contender}: {measured.why_not}")
        seconds = iter(measured.seconds[phase])
        rounds = len(measured.seconds[phase])
        benchmark.pedantic(CLOCK.spend, setup=lambda: ((next(seconds),), {}), rounds=rounds)
        benchmark.extra_info.update(dataclasses.asdict(case), contender=contender, phase=phase, **measured.figures)
        if _results is not None and benchmark.stats is not None:
            _results.add(case.question, case.id, benchmark.stats.as_dict(include_data=True))

    return run
