"""What a benchmark run was asked for: the options of the command line, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pytest
from cases import MASK_KINDS
from contenders import CONTENDERS

from s3d.model import PRESETS

Value = TypeVar("Value")

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """Settings of a run. Tuples are combined in all ways.

    Attributes:
        measure: False: run once, tiny, to see that it works.
        full: everything that this project asks of its benchmarks; hours.
        preset: of the network, see ``s3d.model.PRESETS``.
        patch_sizes: voxels along each axis.
        batch_sizes: patches of a step.
        blocks: sides of a masked block in voxels at full resolution.
        mask_kinds: "blocks", or "voxels" where each voxel is masked by itself.
        mask_ratios: to measure at; None: each benchmark has its own.
        dtypes: names of torch's.
        contenders: names from ``contenders.CONTENDERS``; None: each benchmark's default.
        rounds: timed rounds of each case at most, after one that is not counted.
        seconds: after which a case has no further round; it has at least two.
    """

    measure: bool
    full: bool
    preset: str
    patch_sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    mask_kinds: tuple[str, ...]
    mask_ratios: tuple[float, ...] | None
    dtypes: tuple[str, ...]
    contenders: tuple[str, ...] | None
    rounds: int
    seconds: float

    def ratios(self, default: tuple[float, ...]) -> tuple[float, ...]:
        """The mask ratios that were asked for, or those of a benchmark."""
        return default if self.mask_ratios is None else self.mask_ratios


SMOKE = Settings(False, False, "tiny", (16,), (1,), (8,), ("blocks",), (0.75,), ("float32",), None, 1, 0.0)
ROUNDS, SECONDS = 7, 3.0
_OPTIONS = """
    --full --preset --patch-size --batch-sizes --mask-blocks --mask-kinds --mask-ratios --dtypes --contenders
    --rounds --seconds --results --profile
""".split()
ALL_RATIOS = (0.0, 0.3, 0.6, 0.75, 0.9, 0.95)


def add_options(parser: pytest.Parser) -> None:
    """Declare the options; the values of several are separated by commas."""
    group = parser.getgroup("s3d benchmarks")
    group.addoption("--benchmark", action="store_true", help="measure (without it: run once, tiny)")
    group.addoption("--full", action="store_true", help="all sizes, ratios, kinds and dtypes; hours")
    group.addoption("--preset", default=None, help=f"of the network: {', '.join(PRESETS)}; default resenc-l")
    group.addoption(
        "--patch-size", default=None, help="voxels along each axis; default 96, with --full 160 (published)"
    )
    group.addoption("--batch-sizes", default=None, help="default 1, with --full 1,2,6")
    group.addoption("--mask-blocks", default=None, help="sides of a block in voxels; default 32, with --full 32,16")
    group.addoption("--mask-kinds", default=None, help="blocks, voxels; default blocks, with --full both")
    group.addoption("--mask-ratios", default=None, help="in [0, 1); default: of each benchmark")
    group.addoption("--dtypes", default=None, help=f"{', '.join(DTYPES)}; default float32, with --full all")
    group.addoption(
        "--contenders", default=None, help=f"of {', '.join(CONTENDERS)}; default: all that can compute but reference"
    )
    group.addoption("--rounds", type=int, default=None, help=f"timed rounds of a case, at most (default {ROUNDS})")
    group.addoption("--seconds", type=float, default=None, help=f"no further round after so long (default {SECONDS})")
    group.addoption("--results", default=None, help="folder; default: bench/results/<machine>")
    group.addoption("--profile", default=None, metavar="FOLDER", help="also record a trace of a step of each contender")


def read_options(config: pytest.Config) -> Settings:
    """The settings of a run.

    Raises:
        pytest.UsageError: names the option, what was given and what is accepted.
    """
    if not config.getoption("--benchmark"):
        given = [option for option in _OPTIONS if config.getoption(option) not in (None, False)]
        if given:
            raise pytest.UsageError(f"{', '.join(given)} go with --benchmark, which is not given")
        return SMOKE
    if config.getoption("benchmark_disable", False) or config.getoption("numprocesses", None):
        raise pytest.UsageError(
            "--benchmark measures one thing after another, in one process: not with -n or --benchmark-disable"
        )
    full = bool(config.getoption("--full"))

    def values(option: str, read: Callable[[str], Value], usual: str, in_full: str, accepted: str) -> tuple[Value, ...]:
        text = config.getoption(option)
        try:
            return tuple(read(word.strip()) for word in (text or (in_full if full else usual)).split(","))
        except (ValueError, KeyError) as error:
            raise pytest.UsageError(f"{option} must be {accepted}, got {text!r}") from error

    def positive(word: str) -> int:
        if int(word) < 1:
            raise ValueError
        return int(word)

    def ratio(word: str) -> float:
        if not 0.0 <= float(word) < 1.0:
            raise ValueError
        return float(word)

    def one_of(names: tuple[str, ...]) -> Callable[[str], str]:
        return lambda word: names[names.index(word)]

    preset = config.getoption("--preset") or "resenc-l"
    if preset not in PRESETS:
        raise pytest.UsageError(f"--preset must be of {', '.join(PRESETS)}, got {preset!r}")
    rounds = ROUNDS if config.getoption("--rounds") is None else config.getoption("--rounds")
    if rounds < 1:
        raise pytest.UsageError(f"--rounds must be at least 1, got {rounds}")
    seconds = SECONDS if config.getoption("--seconds") is None else config.getoption("--seconds")
    if not seconds >= 0:
        raise pytest.UsageError(f"--seconds must be at least 0, got {seconds}")
    ratios = None
    if full or config.getoption("--mask-ratios") is not None:
        ratios = values("--mask-ratios", ratio, "", ",".join(map(str, ALL_RATIOS)), "numbers in [0, 1)")
    contenders = None
    if config.getoption("--contenders") is not None:
        names = tuple(CONTENDERS)
        contenders = values("--contenders", one_of(names), "", "", f"of {', '.join(names)}")
    settings = Settings(
        measure=True,
        full=full,
        preset=preset,
        patch_sizes=values("--patch-size", positive, "96", "160", "positive integers"),
        batch_sizes=values("--batch-sizes", positive, "1", "1,2,6", "positive integers"),
        blocks=values("--mask-blocks", positive, "32", "32,16", "positive integers"),
        mask_kinds=values("--mask-kinds", one_of(MASK_KINDS), "blocks", "blocks,voxels", "of blocks, voxels"),
        mask_ratios=ratios,
        dtypes=values("--dtypes", one_of(DTYPES), "float32", ",".join(DTYPES), f"of {', '.join(DTYPES)}"),
        contenders=contenders,
        rounds=rounds,
        seconds=seconds,
    )
    if any(patch % block for patch in settings.patch_sizes for block in settings.blocks):
        raise pytest.UsageError(
            f"--patch-size must be multiples of --mask-blocks {settings.blocks}, got {settings.patch_sizes}"
        )
    return settings
