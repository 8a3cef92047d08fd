"""`bench/gpu_check.sh` as far as it goes without a GPU: it says so; and with one it stops at nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "gpu_check.sh"
PARTS = [
    "machine",
    "build",
    "selfcheck",
    "tests",
    "trainer",
    "segmentation",
    "memcheck",
    "racecheck",
    "layers",
    "steps",
    "profile",
]


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
    rows = [line.split(" | ") for line in (folder / "summary.md").read_text().splitlines() if line.endswith("s |")]
    assert [row[0].removeprefix("| ") for row in rows] == PARTS
    assert [row[0].removeprefix("| ") for row in rows if row[1] != "ok"] == failed
    assert sorted(path.stem for path in folder.glob("*.log")) == sorted(PARTS)


def test_selected_tests_exist(tmp_path: Path) -> None:
    """What the script asks of pytest by name."""
    root, text = SCRIPT.parents[1], SCRIPT.read_text()
    expression = text.partition('test_gpu.py -k "')[2].partition('"')[0]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    command += ["-c", str(root / "pyproject.toml"), str(root / "tests/kernels/test_gpu.py"), "-k", expression]
    # Not in the folder of the sources, where Python would import what is not built.
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "conv 3-native-False-torch.bfloat16" in done.stdout
    for part in ("-k test_layer", '-k "test_encoder or test_step"', "-m s3d profile"):
        assert part in text
