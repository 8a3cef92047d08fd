"""Several processes share a batch: the same losses and gradients as one process, masks of their own, orderly stops."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_pretrain import configure, losses, stopped_at

from s3d.checkpoint import load_checkpoint
from s3d.data import find_images, preprocess
from s3d.distributed import Processes
from s3d.pretrain import _run, pretrain
from s3d.training_data import StepOrder

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def volumes(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    preprocess(find_images([images]), folder, progress=False)
    return folder


def command(volumes: Path, output: Path, *options: str) -> list[str]:
    """As a user types it; the settings of `configure`."""
    settings = f"""--volumes {volumes} --output-dir {output} --preset tiny --patch-size 32 32 32 --mask-block 8
        --batch-size 2 --steps 6 --momentum 0.9 --validate-every 3 --checkpoint-every 100 --workers 0 --device cpu"""
    return [*TORCHRUN, "-m", "s3d", "pretrain", *settings.split(), *options]


def run(line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line, capture_output=True, encoding="utf-8", cwd=folder, env=environment(), check=False, timeout=300
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_two_processes_train_as_one(volumes: Path, tmp_path: Path) -> None:
    """A run of one process, stopped behind step 3 and resumed by two, loses what it loses undisturbed."""
    settings: dict[str, object] = {"volumes": volumes, "mask_ratio": (0.3, 0.9)}  # samples with different counts
    whole = pretrain(configure(None, tmp_path / "whole", **settings))
    config = configure(None, tmp_path / "shared", **settings)
    assert stopped_at(config, 3).steps == 3
    done = run(command(volumes, config.output_dir, "--mask-ratio", "0.3", "0.9"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(config.output_dir) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    ours, theirs = load_checkpoint(config.output_dir / "checkpoint.pt"), load_checkpoint(whole.checkpoint)
    assert ours["step"] == 6
    assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-4)
    for part in ("network", "method"):
        for name, value in theirs[part].items():
            # Biases in front of a norm have no gradient but rounding.
            assert float((ours[part][name] - value).norm()) <= 1e-4 * float(value.norm()) + 1e-7, name


def test_a_signal_stops_all_processes_behind_one_step(volumes: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with open(tmp_path / "output.txt", "wb") as sink:
        process = subprocess.Popen(
            command(volumes, output, "--steps", "100000", "--validate-every", "100000"),
            stdout=sink,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=environment(),
        )
        try:
            deadline = time.monotonic() + 200
            while not (output / "log.csv").exists() or len(losses(output)) < 5:
                assert process.poll() is None, (tmp_path / "output.txt").read_text(encoding="utf-8")
                assert time.monotonic() < deadline, "no progress"
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            process.wait(100)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    text = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert "the same command goes on from here" in text, text
    assert load_checkpoint(output / "checkpoint.pt")["step"] == len(losses(output)) >= 5


@pytest.mark.slow
def test_images_and_uneven_batches_are_refused(images: Path, volumes: Path, tmp_path: Path) -> None:
    for options, message in (
        (["--batch-size", "3"], "batch_size must be a multiple of processes (2) times accumulate (1), got 3"),
        (["--volumes", "None", "--images", str(images)], "images go with one process, not with 2"),
    ):
        done = run(command(volumes, tmp_path / "run", *options), tmp_path)
        assert done.returncode != 0
        assert message in done.stderr


def test_processes_and_parts_share_the_samples_of_a_step() -> None:
    config = configure(None, Path("y"), batch_size=12, steps=3)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for rank in range(3):
        order = StepOrder(config, Processes(rank, 3, None), parts=2, start_step=1)  # type: ignore[arg-type]
        lists = list(order)
        assert len(lists) == len(order) == 4
        assert all(len(samples) == 2 for samples in lists)
        for number, samples in enumerate(lists):
            seen[1 + number // 2] += samples
    assert seen[0] == []
    assert sorted(seen[1]) == list(range(12, 24))
    assert sorted(seen[2]) == list(range(24, 36))


def test_processes_that_do_not_see_the_same_folder_are_told(volumes: Path, tmp_path: Path) -> None:
    class Elsewhere(Processes):
        def gather(self, value: object) -> list[object]:
            return [value, 40]

    config = configure(None, tmp_path / "run", volumes=volumes)
    with pytest.raises(ValueError, match=r"different checkpoints in output_dir .* got \[0, 40\]"):
        _run(config, Elsewhere(0, 2, torch.device("cpu")), parts=1)
