"""s3d compare as a whole: the matrix is run, goes on where it was stopped, grows, and says what failed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from small_matrix import protocol, run, write_data

from s3d.comparison import compare, run_cell
from s3d.comparison.compare import FailedCellsError
from s3d.comparison.scheduler import Outcome
from s3d.pretext.masked_autoencoder import MaskedAutoencoder
from s3d.pretrain import PretrainResult, pretrain
from s3d.pretrain_config import PretrainConfig
from s3d.segmentation.finetune import FinetuneResult, finetune
from s3d.segmentation.finetune_config import FinetuneConfig
from s3d.segmentation.scores import read_scores
from s3d.training_log import read_log

PRETRAINING = Path("pretraining", "s3d", "seed-0")


@pytest.fixture(autouse=True, scope="module")
def plain_figures() -> Iterator[None]:
    """Figures take most of the time of such short runs, and have tests of their own: they stay empty."""
    draw = Figure.savefig

    def save(self: Figure, *given: Any, **options: Any) -> None:
        self.clear()
        self.set_layout_engine(None)
        draw(self, *given, **{**options, "dpi": 10})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that nothing has disturbed."""
    output = tmp_path_factory.mktemp("comparison") / "whole"
    run(data, output, protocol())
    return output


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders of the runs that are trained from now on."""
    trained: list[Path] = []

    def count(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def counting(config: Any) -> Any:
            trained.append(config.output_dir)
            return function(config)

        return counting

    monkeypatch.setattr(run_cell, "pretrain", count(pretrain))
    monkeypatch.setattr(run_cell, "finetune", count(finetune))
    return trained


def cells_of(output: Path) -> dict[str, Path]:
    """Record of each finished cell by its folder."""
    return {str(file.parent.relative_to(output)): file for file in output.rglob(run_cell.RECORD)}


def scores_of(output: Path) -> dict[str, Any]:
    return {
        folder: read_scores(output / folder / run_cell.SCORES).dice for folder in cells_of(output) if "fine" in folder
    }


def assert_same_results(output: Path, expected: Path, tolerance: float = 0.0) -> None:
    """The tolerance is for another number of threads."""
    found, wanted = scores_of(output), scores_of(expected)
    assert found.keys() == wanted.keys()
    for folder, dice in wanted.items():
        np.testing.assert_allclose(found[folder], dice, rtol=0, atol=tolerance)
    losses, others = ([*map(loss_of, read_log(folder / PRETRAINING / "log.csv"))] for folder in (output, expected))
    np.testing.assert_allclose(losses, others, rtol=tolerance)


def loss_of(row: dict[str, float]) -> float:
    return row.get("loss", row.get("validation_loss", float("nan")))


def test_matrix_is_run(finished: Path) -> None:
    assert set(cells_of(finished)) == {
        str(PRETRAINING),
        *(f"finetuning/balls/2/{method}/seed-{seed}" for method in ("s3d", "from-scratch") for seed in (0, 1)),
    }
    record = json.loads((finished / PRETRAINING / run_cell.RECORD).read_text())
    assert record["steps"] == 3
    rows = [row for row in read_log(finished / PRETRAINING / "log.csv") if "loss" in row]
    assert record["seconds"] == pytest.approx(sum(2 / row["samples_per_second"] for row in rows))
    assert record["step_flops"] > 1e6
    config = json.loads((finished / PRETRAINING / "config.json").read_text())
    assert config["volumes"].startswith(str(finished / "volumes"))
    for seed in (0, 1):
        folder = finished / "finetuning" / "balls" / "2" / "s3d" / f"seed-{seed}"
        config = json.loads((folder / "config.json").read_text())
        assert config["checkpoint"] == str(finished / PRETRAINING / "checkpoint.pt")
        assert config["seed"] == seed
        (split,) = json.loads((folder / "splits.json").read_text())
        assert (len(split["train"]), len(split["val"])) == (2, 1)
        assert read_scores(folder / run_cell.SCORES).cases == ("test_0", "test_1")
        assert "fine-tuning" in (folder / run_cell.OUTPUT).read_text()
    assert (finished / "comparison.html").is_file()


def test_finished_cells_are_not_done_again(copy: Path, data: Path, counted: list[Path]) -> None:
    run(data, copy, protocol())
    assert counted == []


def test_matrix_grows(copy: Path, data: Path, counted: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    methods = {"first": {"pretraining": {}, "finetuning": {"schedule": "warmup"}}, **protocol()["methods"]}
    run(data, copy, protocol(methods=methods, seeds=[0, 1, 2]))
    new = [("first", 0), ("first", 1), ("first", 2), ("from-scratch", 2), ("s3d", 2)]
    folder = copy / "finetuning" / "balls" / "2"
    assert sorted(counted) == [folder / method / f"seed-{seed}" for method, seed in new]
    with pytest.raises(ValueError, match=r"methods\.first\.finetuning\.schedule \(was 'warmup', is 'not given'\)"):
        run(data, copy, protocol(methods={**methods, "first": {"pretraining": {}}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"S3D": {"pretraining": {"steps": 4}}}}, r"methods\.S3D\.pretraining\.steps \(was 3, is 4\)"),
        (
            {"methods": {"s3D": {"pretraining": {"steps": 4}}}, "reference": "s3D"},
            r"methods\.s3D \(was called 'S3D', in the same folders\)",
        ),
        ({"seeds": [1, 0]}, r"first_seed \(was 0, is 1\)"),
        (
            {"datasets": {"balls": {"folder": "Dataset001_Balls", "labels": [2], "validation_cases": 2}}},
            r"datasets\.balls\.validation_cases \(was 1, is 2\)",
        ),
    ],
)
def test_another_protocol_is_refused(copy: Path, data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(data, copy, protocol(**changes))


def test_a_mistake_that_stops_the_first_call_can_be_corrected(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "run_cells", lambda *given: Outcome())
    wrong = {"balls": {"folder": "Dataset001_Bals", "labels": [2], "validation_cases": 1}}
    with pytest.raises(FileNotFoundError, match="Dataset001_Bals"):
        run(data, tmp_path / "begun", protocol(datasets=wrong))
    run(data, tmp_path / "begun", protocol())
    assert (tmp_path / "begun" / "protocol.json").read_text() == (finished / "protocol.json").read_text()


def test_test_images_that_pretraining_has_seen_are_named(data: Path, tmp_path: Path, capsys: Any) -> None:
    content = protocol(
        pretraining={
            **protocol()["pretraining"],
            "images": ["Dataset002_Untested/imagesTr"],
            "patch_size": [16, 16, 16],
        },
        datasets={"untested": {"folder": "Dataset002_Untested", "labels": [2]}},
        seeds=[0],
    )
    run(data, tmp_path / "seen", content)
    # Of 6 cases the first fold leaves out 2.
    assert "seen the images, not the labels, of 2 test cases of untested" in capsys.readouterr().out


def test_report_alone_and_prediction(
    copy: Path, data: Path, counted: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "finetuning" / "balls" / "2" / "s3d" / "seed-1" / run_cell.RECORD).unlink()
    run(data, copy, protocol(), report_only=True)
    assert "1 of 2 seeds" in capsys.readouterr().out
    run(data, copy, protocol(seeds=[0, 1, 2]), dry_run=True, tflops=1.0)
    printed = capsys.readouterr().out
    assert re.search(r"\| S3D: balls \| 3 \| 1 \| 3 \|", printed)
    assert "7 cells, 4 finished" in printed
    assert counted == []


def test_others_are_finished_when_a_cell_fails(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: FinetuneConfig) -> FinetuneResult:
        if config.checkpoint is None and config.seed == 0:
            raise RuntimeError("no such luck")
        return finetune(config)

    output = tmp_path / "failing"
    with monkeypatch.context() as patch:
        patch.setattr(run_cell, "finetune", fail)
        with pytest.raises(
            FailedCellsError, match=r"1 of 5 runs failed: from scratch, balls, 2 labels, seed 0 \(Runtim"
        ):
            run(data, output, protocol())
    assert "  | RuntimeError: no such luck" in capsys.readouterr().out
    assert len(cells_of(output)) == 4
    times = {folder: file.stat().st_mtime_ns for folder, file in cells_of(output).items()}
    run(data, output, protocol())
    assert {folder: cells_of(output)[folder].stat().st_mtime_ns for folder in times} == times
    assert_same_results(output, finished)


def test_what_needs_a_failed_pretraining_is_left_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: PretrainConfig) -> PretrainResult:
        raise FloatingPointError("loss is nan")

    monkeypatch.setattr(run_cell, "pretrain", fail)
    with pytest.raises(FailedCellsError, match=r"2 of 3 runs failed: S3D, pre-training.*its pre-training has failed"):
        run(data, tmp_path / "failing", protocol(seeds=[0]))
    assert len(cells_of(tmp_path / "failing")) == 1


def test_goes_on_after_a_signal(data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pose = MaskedAutoencoder.pose

    def stop(self: MaskedAutoencoder, image: Any, valid: Any, draw: Any) -> Any:
        if draw.stream == (0, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return pose(self, image, valid, draw)

    output = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(MaskedAutoencoder, "pose", stop)
        with pytest.raises(KeyboardInterrupt):
            run(data, output, protocol())
    assert [row["step"] for row in read_log(output / PRETRAINING / "log.csv") if "loss" in row] == [1, 2]
    assert not cells_of(output)
    run(data, output, protocol())
    assert "resuming at step 2 of 3" in (output / PRETRAINING / run_cell.OUTPUT).read_text()
    assert_same_results(output, finished)


def test_equal_time(data: Path, tmp_path: Path) -> None:
    content = protocol(seeds=[0], budget={"pretraining_seconds": 0.5, "finetuning_seconds": 0.5})
    for part in ("pretraining", "finetuning"):
        del content[part]["steps"]
    output = tmp_path / "timed"
    kept = output / "finetuning" / "balls" / "2" / "s3d" / run_cell.BUDGET
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"steps": 4}))
    run(data, output, content)
    budget = json.loads((output / "pretraining" / "s3d" / run_cell.BUDGET).read_text())
    assert budget["steps"] == max(1, int(0.5 / budget["seconds_per_step"]))
    config = json.loads((output / PRETRAINING / "config.json").read_text())
    assert config["steps"] == budget["steps"] == read_log(output / PRETRAINING / "log.csv")[-1]["step"]
    # What was measured before is not measured again.
    assert json.loads((kept.parent / "seed-0" / "config.json").read_text())["steps"] == 4
    assert not list(output.rglob("timing"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes where Linux lists them")
@pytest.mark.slow
def test_killed_processes(data: Path, finished: Path, tmp_path: Path) -> None:
    """Two workers; one is killed, then the whole is told to stop; the same command finishes, to the same results."""
    output, file, printed = tmp_path / "killed", tmp_path / "protocol.json", tmp_path / "printed.txt"
    file.write_text(json.dumps(protocol()))
    command = [sys.executable, "-m", "s3d", "compare", str(file), "--output-dir", str(output), "--data-dir", str(data)]
    # The pre-training waits for this file, so that there is time to kill it.
    held = output / PRETRAINING
    held.mkdir(parents=True)
    with _locked(held / run_cell.LOCK), printed.open("w") as stream:
        process = subprocess.Popen([*command, "--devices", "cpu", "cpu"], stdout=stream, stderr=stream)
        scratch = output / "finetuning" / "balls" / "2" / "from-scratch"
        _wait_for(lambda: any(scratch.glob(f"*/{run_cell.RECORD}")), process)
        busy = {int(lock.read_text() or 0) for lock in scratch.glob(f"*/{run_cell.LOCK}")}
        (waiting,) = _workers(process.pid) - busy
        os.kill(waiting, signal.SIGKILL)
        _wait_for(lambda: "failed: S3D, pre-training, seed 0" in printed.read_text(), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 130, printed.read_text()
    assert "its process was ended by signal 9 (Killed); out of memory?" in printed.read_text()
    assert "interrupted; the same command goes on" in printed.read_text()
    before = {folder: record.stat().st_mtime_ns for folder, record in cells_of(output).items()}
    assert 1 <= len(before) <= 2

    subprocess.run([*command, "--devices", "cpu"], check=True, capture_output=True, timeout=300)
    after = {folder: record.stat().st_mtime_ns for folder, record in cells_of(output).items()}
    assert {folder: after[folder] for folder in before} == before
    assert_same_results(output, finished, tolerance=0.02)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _workers(parent: int) -> set[int]:
    """Processes that work on cells."""
    children = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return {child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()}


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
