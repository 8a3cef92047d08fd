"""`bench/gpu_check.sh` as far as it goes without a GPU: it says so; and with one it stops at nothing."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_check.sh"
# In the order in which they begin; those of a row run side by side.
ROWS = [
    ["machine"],
    ["build"],
    ["kernels", "triton", "trainer", "segmentation", "selfcheck"],
    ["step-profile"],
    ["steps"],
    ["layers"],
    ["memcheck", "racecheck"],
    ["profile"],
    ["steps-others"],
]
PARTS = sorted(part for row in ROWS for part in row)


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), str(folder)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path / "results", PYTHON=sys.executable)
    assert done.returncode == 2
    assert done.stderr == "gpu_check: torch sees no GPU; nothing was checked\n"
    assert not (tmp_path / "results").exists()


def pretend(folder: Path, fails: str) -> dict[str, str]:
    """Programs that do nothing, one of which fails."""
    folder.mkdir()
    for name in ("python", "nvidia-smi", "compute-sanitizer"):
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "$0 $@"\ncase "$0 $@" in *{fails}*) exit 3;; esac\n')
        program.chmod(0o755)
    return {"PYTHON": str(folder / "python"), "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("fails", "failed"), [("no-such-thing", []), ("racecheck", ["racecheck"]), ("setup.py", ["build"])]
)
def test_every_part_is_run_and_reported(fails: str, failed: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "results"
    done = run(folder, **pretend(tmp_path / "programs", fails))
    assert done.returncode == (1 if failed else 0), done.stderr
    lines = [line.split(" | ") for line in (folder / "summary.md").read_text().splitlines() if line.endswith("s |")]
    verdicts = {line[0].removeprefix("| "): line[1] for line in lines}
    done_parts = iter(verdicts)
    assert [sorted(itertools.islice(done_parts, len(row))) for row in ROWS] == [sorted(row) for row in ROWS]
    assert not list(done_parts)
    assert [name for name, verdict in verdicts.items() if verdict != "ok"] == failed
    assert sorted(path.stem for path in folder.glob("*.log")) == PARTS


def test_processes_share_the_tests_where_they_can(tmp_path: Path) -> None:
    for name, fails in (("with", "no-such-thing"), ("without", "xdist")):
        folder = tmp_path / name
        assert run(folder, **pretend(tmp_path / f"programs-{name}", fails)).returncode == 0
        for part in ("kernels", "triton", "trainer", "segmentation"):
            assert (" -n " in (folder / f"{part}.log").read_text()) == (name == "with")
        assert " -n " not in (folder / "steps.log").read_text()


def collected(path: str, expression: str, folder: Path, *options: str) -> list[str]:
    """The tests that pytest selects."""
    root = SCRIPT.parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    command += ["-c", str(root / "pyproject.toml"), str(root / path), "-k", expression, *options]
    # Not in the folder of the sources, where Python would import what is not built.
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_selected_tests_exist(tmp_path: Path) -> None:
    """What the script asks of pytest by name."""
    text = SCRIPT.read_text()
    others, triton, sanitized = re.findall(r'tests/kernels/test_gpu\.py -k "(.*?)"', text)
    path = "tests/kernels/test_gpu.py"
    # Two at a time: all that pytest does here is to import.
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda words: collected(path, words, tmp_path), ("test", others, triton, sanitized)))
    every, first, second, few = found
    assert sorted(first + second) == sorted(every)
    names = [name.partition("[")[2] for name in few]
    assert names == ["conv 3-native-False-torch.bfloat16]", "instance norm-native-False-torch.bfloat16]"]
    measured = re.findall(r"--benchmark (.*?) --results", text.replace("\\\n", ""))
    assert len(measured) == 3
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda options: measured_tests(options, tmp_path), measured))


def measured_tests(options: str, folder: Path) -> list[str]:
    words = shlex.split(options)
    at = words.index("-k")
    return collected("bench", words[at + 1], folder, "--benchmark", *words[:at])
