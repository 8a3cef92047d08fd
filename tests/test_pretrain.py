"""Pre-training end to end on small volumes: logs, exact resume, errors, command line."""

import csv
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from small_runs import configure, losses, stopped_at

import s3d.pretext.masked_autoencoder as masked_autoencoder_module
import s3d.pretrain as pretrain_module
import s3d.training_loop as training_loop_module
import s3d.training_step as training_step_module
from s3d.checkpoint import load_checkpoint, save_checkpoint
from s3d.cli import COMMANDS, main
from s3d.data import find_images, preprocess
from s3d.masking import MaskSampler
from s3d.model import S3D, build_unet
from s3d.optimizer_step import Training
from s3d.pretrain import PretrainResult, load_model, pretrain
from s3d.pretrain_config import MACHINES, PretrainConfig, machine_config
from s3d.training_log import COLUMNS, CsvLog, read_log

# Losses of 20 steps of `golden_config`; a change of numerics changes them. The tolerance covers other instruction sets.
GOLDEN = Path(__file__).parent / "golden_losses.json"


def test_a_run_leaves_everything_a_user_wants(finished: tuple[PretrainConfig, PretrainResult]) -> None:
    config, result = finished
    output = config.output_dir
    assert result.steps == 6
    assert result.mean_loss > 0
    names = {path.name for path in output.iterdir()}
    pictures = {f"reconstruction_{step:06d}.png" for step in (0, 3, 6)}
    assert names >= {"config.json", "checkpoint.pt", "log.csv", "loss.png", "tensorboard", "volumes"} | pictures
    rows = read_log(output / "log.csv")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 3, 6]
    assert rows[1]["learning_rate"] == pytest.approx(1e-2)
    assert next(row for row in rows if row["step"] == 4)["learning_rate"] == pytest.approx(1e-2 * 0.5**0.9)
    assert json.loads((output / "config.json").read_text())["patch_size"] == [32, 32, 32]


def test_training_lowers_the_loss_below_the_mean_guess(images: Path, tmp_path: Path) -> None:
    result = pretrain(
        configure(images, tmp_path / "run", steps=60, validate_every=60, augment=False, learning_rate=3e-2)
    )
    assert result.final_loss < 0.8 * result.initial_loss
    assert result.final_loss < result.mean_loss


@pytest.mark.parametrize("stop_at", [1, 4])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_and_resumed_run_is_the_same_run(
    stop_at: int,
    number: signal.Signals,
    finished: tuple[PretrainConfig, PretrainResult],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configure(images, tmp_path / "b")
    original, calls = masked_autoencoder_module.masked_mse, []

    def loss_with_signal(*arguments: object) -> torch.Tensor:
        calls.extend([1] * torch.is_grad_enabled())  # validation has losses too
        if len(calls) == stop_at:
            os.kill(os.getpid(), number)
        return original(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(masked_autoencoder_module, "masked_mse", loss_with_signal)
        stopped = pretrain(config)
    assert stopped.steps == stop_at
    resumed = pretrain(config)
    undisturbed, expected = finished
    assert resumed.steps == 6
    assert losses(config.output_dir) == losses(undisturbed.output_dir)
    assert resumed.final_loss == expected.final_loss
    ours, theirs = load_checkpoint(resumed.checkpoint), load_checkpoint(expected.checkpoint)
    for part in ("network", "method"):
        assert all(torch.equal(ours[part][name], value) for name, value in theirs[part].items())


def test_a_killed_process_resumes_from_its_last_checkpoint(images: Path, tmp_path: Path) -> None:
    """SIGKILL: rows after the checkpoint are dropped, and the curve goes on as if nothing had happened."""
    output = tmp_path / "run"
    options = ["--images", str(images), "--output-dir", str(output), "--preset", "tiny", "--patch-size", "32", "32"]
    options += ["32", "--mask-block", "8", "--batch-size", "1", "--steps", "4000", "--checkpoint-every", "5"]
    options += ["--validate-every", "4000", "--workers", "0", "--device", "cpu"]
    with open(tmp_path / "output.txt", "wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "s3d", "pretrain", *options], stdout=sink, stderr=subprocess.STDOUT, cwd=tmp_path
        )
        try:
            deadline = time.monotonic() + 120
            while not (output / "checkpoint.pt").exists() or len(losses(output)) < 8:
                assert process.poll() is None, (tmp_path / "output.txt").read_text()
                assert time.monotonic() < deadline, "no progress"
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    killed = losses(output)
    saved = load_checkpoint(output / "checkpoint.pt")["step"]
    assert saved >= 5
    config = configure(images, output, batch_size=1, steps=4000, momentum=0.99, validate_every=4000, checkpoint_every=5)
    stop_after = saved + 4

    class Enough(Exception):
        pass

    def stop(step: int, **values: float) -> None:
        if step == stop_after and "loss" in values:
            raise Enough

    original = training_loop_module.TrainingLog.write

    def write(self: training_loop_module.TrainingLog, step: int, **values: float) -> None:
        original(self, step, **values)
        stop(step, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop_module.TrainingLog, "write", write)
        with pytest.raises(Enough):
            pretrain(config)
    rows = [row["step"] for row in read_log(output / "log.csv") if "loss" in row]
    assert rows == list(range(1, stop_after + 1))
    common = min(len(killed), stop_after)
    assert losses(output)[:common] == killed[:common]
    assert common > saved


def test_a_finished_run_is_not_trained_again(finished: tuple[PretrainConfig, PretrainResult]) -> None:
    config, result = finished
    before = losses(config.output_dir)
    again = pretrain(config)
    assert (again.steps, again.final_loss, again.mean_loss) == (6, result.final_loss, result.mean_loss)
    assert losses(config.output_dir) == before


def test_other_settings_in_the_same_folder_are_refused(finished: tuple[PretrainConfig, PretrainResult]) -> None:
    config, _ = finished
    with pytest.raises(ValueError, match=r"other settings: learning_rate \(was 0.01, is 0.5\)"):
        pretrain(dataclasses.replace(config, learning_rate=0.5))


def test_checkpoint_serves_plain_networks(finished: tuple[PretrainConfig, PretrainResult]) -> None:
    _, result = finished
    build_unet("tiny").load_state_dict(load_checkpoint(result.checkpoint)["network"])
    model = load_model(result.checkpoint)
    assert model.mask_tokens is not None


def test_a_damaged_checkpoint_is_named(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "run")
    config.output_dir.mkdir()
    (config.output_dir / "checkpoint.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a readable s3d checkpoint"):
        pretrain(config)


def test_a_diverging_run_names_its_images(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "run", learning_rate=1e30, steps=8, gradient_clip=1e30, max_skipped=2)
    with pytest.raises(FloatingPointError, match=r"gradient norm is (nan|inf), in 3 steps in a row.*head\d.nii.gz"):
        pretrain(config)
    with open(config.output_dir / "skipped_steps.csv", newline="") as file:
        skipped = list(csv.DictReader(file))
    assert [int(row["step"]) for row in skipped] == [2, 3, 4]
    assert all("head" in row["images"] and ";" in row["images"] for row in skipped)


def test_a_step_that_is_not_finite_is_skipped(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, momentum and averages stay; the next steps go on."""
    original, calls = masked_autoencoder_module.masked_mse, []

    def loss(*arguments: object) -> torch.Tensor:
        value = original(*arguments)  # type: ignore[arg-type]
        if not torch.is_grad_enabled():  # validation
            return value
        calls.append(1)
        return value * float("nan") if len(calls) == 3 else value

    monkeypatch.setattr(masked_autoencoder_module, "masked_mse", loss)
    saved = []
    check = training_loop_module.SkippedSteps.check

    def watch(self: training_loop_module.SkippedSteps, *arguments: object) -> None:
        saved.append({name: value.clone() for name, value in training[0].model.state_dict().items()})
        check(self, *arguments)  # type: ignore[arg-type]

    training: list[Training[S3D]] = []
    build = pretrain_module.build_training

    def built(*arguments: object) -> Training[S3D]:
        training.append(build(*arguments))  # type: ignore[arg-type]
        return training[0]

    monkeypatch.setattr(training_loop_module.SkippedSteps, "check", watch)
    monkeypatch.setattr(pretrain_module, "build_training", built)
    result = pretrain(configure(images, tmp_path / "run", max_skipped=1))
    assert result.steps == 6
    assert all(torch.equal(saved[1][name], saved[2][name]) for name in saved[0])
    assert not all(torch.equal(saved[2][name], saved[3][name]) for name in saved[0])
    rows = read_log(tmp_path / "run" / "log.csv")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 4, 5, 6]


def test_bad_images_are_named_or_skipped(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for image in images.iterdir():
        (folder / image.name).write_bytes(image.read_bytes())
    (folder / "broken.nii.gz").write_bytes(b"not a volume")
    arguments = ["pretrain", "--images", str(folder), "--output-dir", str(tmp_path / "run"), "--preset", "tiny"]
    arguments += ["--patch-size", "32", "32", "32", "--mask-block", "8", "--steps", "1", "--batch-size", "1"]
    arguments += ["--workers", "0", "--device", "cpu"]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert re.search(r"s3d: .*broken\.nii\.gz", capsys.readouterr().err)
    main([*arguments, "--skip-bad"])
    assert "validation loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "huge"}, "preset must be one of"),
        ({"mask_block": 6}, "mask_block must be a multiple of 4"),
        ({"patch_size": (32, 30, 32)}, "patch_size must be a multiple of mask_block=8"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \(0, 1\)"),
        ({"mask_ratio": 0.0}, r"mask_ratio must be in \(0, 1\)"),
        ({"patch_size": (8, 8, 8)}, "of the 1 blocks .* masks none"),
        ({"mask_block": 0}, "mask_block must be a multiple of 4"),
        ({"mask_block": -4}, "mask_block must be a multiple of 4"),
        ({"sparse": False}, "mask_tokens needs sparse"),
        ({"backend": "foo"}, "backend must be 'auto' or one of"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"validation_fraction": 1.5}, r"validation_fraction must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"mask_ratio": (0.9, 0.6)}, "increasing pair"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"accumulate": 4}, "accumulate must divide batch_size=2, got 4"),
        ({"warmup_steps": 6}, r"warmup_steps must be in \[0, steps=6\)"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"foreground": 2.0}, r"foreground must be in \[0, 1\]"),
        ({"machine": "mainframe"}, "machine must be one of published"),
        ({"volumes": Path("x")}, "give volumes or images, not both"),
        (
            {"preset": "swin-unetr-small"},
            "a transformer; take another preset, or sparse, mask_tokens and densify False",
        ),
        ({"preset": "swin-unetr-small", "method": "spark"}, "encoder of method spark, got swin-unetr-small, a transf"),
        ({"method": "models-genesis", "patch_size": (4, 4, 4)}, "patch_size must be larger than 4"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        configure(tmp_path, tmp_path / "run", **change)


def test_a_device_that_is_not_there_is_named_before_any_work(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device must be auto, cpu or a device of this machine, got 'foo'"):
        pretrain(configure(images, tmp_path / "run", device="foo"))
    assert not (tmp_path / "run").exists()


def test_momentum_may_be_zero(images: Path, tmp_path: Path) -> None:
    assert pretrain(configure(images, tmp_path / "run", momentum=0.0, steps=1)).steps == 1


def test_other_images_are_another_run(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    config = configure(folder, tmp_path / "run")
    assert stopped_at(config, 2).steps == 2
    shutil.copy(folder / "head0.nii.gz", folder / "more.nii.gz")
    with pytest.raises(ValueError, match=r"images of the run in .* not the same as before: 1 added \(more\)"):
        pretrain(config)
    (folder / "more.nii.gz").unlink()
    assert pretrain(config).steps == 6


def test_resume_knows_the_last_validation(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "run", validate_every=2)
    first = stopped_at(config, 3)
    assert first.final_loss != first.initial_loss
    assert stopped_at(config, 4).final_loss != first.initial_loss
    rows = read_log(config.output_dir / "log.csv")
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 2, 4]


def test_a_signal_does_not_save_broken_weights(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(images, tmp_path / "run")
    original = training_step_module.TrainingStep.__call__

    def poison(self: training_step_module.TrainingStep, *arguments: object) -> object:
        result = original(self, *arguments)  # type: ignore[arg-type]
        next(self.training.model.parameters()).data.fill_(float("nan"))
        return result

    monkeypatch.setattr(training_step_module.TrainingStep, "__call__", poison)
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        stopped_at(config, 2)
    assert not (config.output_dir / "checkpoint.pt").exists()


def test_a_restart_without_checkpoint_logs_each_step_once(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "run", steps=2)
    config.output_dir.mkdir()
    (config.output_dir / "log.csv").write_text(
        "step,loss,validation_loss,learning_rate,gradient_norm,samples_per_second\n0,,9.9,,,\n1,9.9,,,,\n"
    )
    pretrain(config)
    rows = read_log(config.output_dir / "log.csv")
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert all(row.get("loss", 0) < 9 for row in rows)


def test_a_signal_to_all_processes_of_a_job_saves_a_checkpoint(images: Path, tmp_path: Path) -> None:
    """As schedulers do it; the processes that read patches must not take the run down with them."""
    output = tmp_path / "run"
    options = ["--images", str(images), "--output-dir", str(output), "--preset", "tiny", "--patch-size", "32", "32"]
    options += ["32", "--mask-block", "8", "--batch-size", "1", "--steps", "4000", "--checkpoint-every", "100000"]
    options += ["--validate-every", "4000", "--workers", "2", "--device", "cpu"]
    with open(tmp_path / "output.txt", "wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "s3d", "pretrain", *options],
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=tmp_path,
        )
        try:
            deadline = time.monotonic() + 120
            while not (output / "log.csv").exists() or len(losses(output)) < 5:
                assert process.poll() is None, (tmp_path / "output.txt").read_text()
                assert time.monotonic() < deadline, "no progress"
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(300) == 0, (tmp_path / "output.txt").read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert load_checkpoint(output / "checkpoint.pt")["step"] >= 5


def test_no_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing_here"):
        pretrain(configure(tmp_path / "nothing_here", tmp_path / "run"))


def test_published_defaults() -> None:
    config = PretrainConfig(images=("x",), output_dir=Path("y"))
    assert (config.preset, config.patch_size, config.mask_block) == ("resenc-l", (160, 160, 160), 32)
    assert (config.steps, config.batch_size, config.peak_learning_rate) == (250_000, 6, 1e-2)
    assert (config.momentum, config.decay, config.gradient_clip) == (0.99, 3e-5, 12.0)


def test_published_values_of_the_optimisers() -> None:
    sgd = PretrainConfig(output_dir=Path("y"))
    adamw = PretrainConfig(output_dir=Path("y"), optimizer="adamw")
    assert (sgd.peak_learning_rate, sgd.decay) == (1e-2, 3e-5)
    assert (adamw.peak_learning_rate, adamw.decay) == (1e-4, 0.05)


def test_learning_rate() -> None:
    config = PretrainConfig(output_dir=Path("y"), steps=110, warmup_steps=10, learning_rate=1.0)
    rates = [config.learning_rate_at(step) for step in range(110)]
    assert rates[:2] == pytest.approx([1 / 11, 2 / 11])
    assert max(rates) == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5**0.9)
    assert 0 < rates[-1] < 0.02


@pytest.mark.parametrize("machine", list(MACHINES))
def test_machines_differ_from_the_published_settings_only_where_they_say(machine: str) -> None:
    config = machine_config(machine, output_dir=Path("y"), seed=3)
    published = PretrainConfig(output_dir=Path("y"), seed=3)
    different = {
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(published, field.name)
    }
    assert different - {"machine"} == set(MACHINES[machine])


def test_the_command_line_takes_a_machine(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[PretrainConfig] = []
    monkeypatch.setitem(COMMANDS, "pretrain", (PretrainConfig, configs.append))
    main(["pretrain", "--machine", "laptop", "--images", "x", "--output-dir", str(tmp_path), "--steps", "7"])
    assert (configs[0].preset, configs[0].steps, configs[0].machine) == ("small", 7, "laptop")
    with pytest.raises(SystemExit) as exit_:
        main(["pretrain", "--machine", "mainframe", "--images", "x", "--output-dir", str(tmp_path)])
    assert exit_.value.code == 2


def test_options_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    """Options are an interface: a change of this list is a change that users see."""
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    options = set(re.findall(r"--([a-z][a-z-]+)", capsys.readouterr().out))
    expected = """
        accumulate augment backend batch-size checkpoint-activations checkpoint-every compile densify device ema-decay
        foreground gradient-clip help images learning-rate log-every machine mask-block mask-ratio mask-tokens
        max-skipped method momentum no-augment no-checkpoint-activations no-compile no-densify no-mask-tokens
        no-shortcuts no-skip-bad no-sparse optimizer output-dir patch-size precision preset ratio-per resume seed
        shortcuts skip-bad spacing-mm sparse steps validate-every validation-fraction volumes warmup-steps
        weight-decay workers
    """.split()
    assert options == set(expected)


def test_bfloat16_trains(images: Path, tmp_path: Path) -> None:
    result = pretrain(configure(images, tmp_path / "run", precision="bfloat16", steps=3))
    assert np.isfinite(result.final_loss)


@pytest.mark.parametrize(
    "change",
    [
        {"accumulate": 2},
        {"checkpoint_activations": True},
        {"shortcuts": False},
        {"workers": 1},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_saves_memory_or_time_changes_nothing(
    change: dict[str, object], finished: tuple[PretrainConfig, PretrainResult], images: Path, tmp_path: Path
) -> None:
    config, expected = finished
    result = pretrain(configure(images, tmp_path / "run", **change))
    assert losses(tmp_path / "run") == pytest.approx(losses(config.output_dir), rel=1e-5)
    assert result.final_loss == pytest.approx(expected.final_loss, rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "float16"},
        {"optimizer": "adamw", "warmup_steps": 2},
        {"mask_ratio": (0.6, 0.9), "ratio_per": "batch"},
    ],
    ids=str,
)
def test_a_run_with_other_settings_resumes_exactly(change: dict[str, object], images: Path, tmp_path: Path) -> None:
    whole = pretrain(configure(images, tmp_path / "whole", **change))
    config = configure(images, tmp_path / "stopped", **change)
    assert stopped_at(config, 3).steps == 3
    resumed = pretrain(config)
    assert losses(config.output_dir) == losses(tmp_path / "whole")
    ours, theirs = load_checkpoint(resumed.checkpoint), load_checkpoint(whole.checkpoint)
    for part in ("network", "method"):
        assert all(torch.equal(ours[part][name], value) for name, value in theirs[part].items())


def test_the_average_is_that_of_the_weights(images: Path, tmp_path: Path) -> None:
    """After one step it is the weights; then 0.75 of it and 0.25 of the new weights."""
    weights = []
    for steps in (1, 2):
        config = configure(images, tmp_path / f"run{steps}", steps=2, ema_decay=0.75)
        result = stopped_at(config, 1) if steps == 1 else pretrain(config)
        weights.append(load_checkpoint(result.checkpoint))
    name = "encoder.stem.convs.0.conv.weight"
    assert torch.equal(weights[0]["ema"][name], weights[0]["network"][name])
    expected = 0.75 * weights[0]["network"][name] + 0.25 * weights[1]["network"][name]
    torch.testing.assert_close(weights[1]["ema"][name], expected)


def test_mask_ratio_of_a_batch(images: Path, tmp_path: Path) -> None:
    sampler = MaskSampler((32, 32, 32), 8, (0.3, 0.9), 0, "batch")
    for step in range(5):
        visible = sampler(4, 0, step).tables.grid.flatten(1).sum(1)
        assert len(set(visible.tolist())) == 1
    part = sampler(4, 0, 2, samples=slice(1, 3)).tables.grid
    assert torch.equal(part, sampler(4, 0, 2).tables.grid[1:3])


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    finished: tuple[PretrainConfig, PretrainResult],
    images: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = configure(images, tmp_path / "run", checkpoint_every=2)
    assert stopped_at(config, 5).steps == 5
    whole = (config.output_dir / "checkpoint.pt").read_bytes()
    (config.output_dir / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert pretrain(config).steps == 6
    assert re.search(r"checkpoint\.pt is not a readable.*going on from .*checkpoint_previous\.pt, step 4", caplog.text)
    assert losses(config.output_dir) == losses(finished[0].output_dir)
    assert (config.output_dir / "checkpoint_damaged.pt").stat().st_size == len(whole) // 2
    assert [
        load_checkpoint(config.output_dir / name)["step"] for name in ("checkpoint_previous.pt", "checkpoint.pt")
    ] == [4, 6]


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(images, tmp_path / "run", checkpoint_every=2)
    stopped_at(config, 5)

    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match="Input/output error"):
        pretrain(config)


def test_half_a_row_of_the_log_is_dropped(
    finished: tuple[PretrainConfig, PretrainResult], images: Path, tmp_path: Path
) -> None:
    config = configure(images, tmp_path / "run")
    stopped_at(config, 4)
    for torn in ("1", "\0\0\0"):
        with open(config.output_dir / "log.csv", "a") as file:
            file.write(torn)
        CsvLog(config.output_dir / "log.csv", (*COLUMNS, "validation_loss", "mask_ratio"), 4).close()
    assert pretrain(config).steps == 6
    assert losses(config.output_dir) == losses(finished[0].output_dir)


def test_weights_alone_are_not_resumed(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "run")
    save_checkpoint(config.output_dir / "checkpoint.pt", {"step": 0, "config": config.plain(), "network": {}})
    with pytest.raises(ValueError, match="holds weights only and cannot be resumed"):
        pretrain(config)


def test_a_loss_that_is_infinite_is_skipped(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = masked_autoencoder_module.masked_mse
    monkeypatch.setattr(masked_autoencoder_module, "masked_mse", lambda *arguments: original(*arguments) + float("inf"))
    with pytest.raises(FloatingPointError, match="loss is inf"):
        pretrain(configure(images, tmp_path / "run", max_skipped=1))


def test_resume_from_a_path_or_never(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "run", checkpoint_every=2)
    pretrain(config)
    with pytest.raises(ValueError, match="holds a run and resume is 'never'"):
        pretrain(dataclasses.replace(config, resume="never"))
    other = dataclasses.replace(
        config, output_dir=tmp_path / "other", resume=str(config.output_dir / "checkpoint_previous.pt")
    )
    assert pretrain(other).steps == 6
    assert losses(other.output_dir) == losses(config.output_dir)[4:]
    # The same command again goes on from the folder's own checkpoint.
    assert pretrain(other).steps == 6
    assert losses(other.output_dir) == losses(config.output_dir)[4:]


def test_a_full_disk_keeps_the_checkpoint(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(images, tmp_path / "run", checkpoint_every=2)
    save, saved = torch.save, []

    def fill(content: object, file: object) -> None:
        saved.append(1)
        if len(saved) == 2:
            file.write(b"half")  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        with pytest.raises(OSError, match=r"checkpoint\.pt could not be written .*No space left.*untouched"):
            pretrain(config)
    assert load_checkpoint(config.output_dir / "checkpoint.pt")["step"] == 2
    assert not list(config.output_dir.glob("*.partial"))
    assert pretrain(config).steps == 6


def test_slow_data_are_named(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("s3d.progress.WATCHED_STEPS", 3)
    monkeypatch.setattr("s3d.progress.FIRST_STEPS", 1)
    read = training_step_module.TrainingStep.read

    def slow(*arguments: object) -> object:
        time.sleep(1)
        return read(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(training_step_module.TrainingStep, "read", slow)
        pretrain(configure(images, tmp_path / "run", steps=4))
    assert "the data are the bottleneck" in caplog.text
    rows = [row for row in read_log(tmp_path / "run" / "log.csv") if "loss" in row]
    assert all(row["data_share"] > 0.5 for row in rows[1:])


def test_a_report_shows_curves_settings_and_a_picture(finished: tuple[PretrainConfig, PretrainResult]) -> None:
    page = (finished[0].output_dir / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "&quot;mask_ratio&quot;: 0.75" in page
    assert "6 of 6" in page


def test_golden_losses(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "run", steps=20, learning_rate=1e-3, validate_every=20)
    pretrain(config)
    expected = json.loads(GOLDEN.read_text())
    assert losses(config.output_dir) == pytest.approx(expected, rel=2e-3)


def test_anonymised_voxels_are_no_part_of_the_loss(tmp_path: Path) -> None:
    """Half of the volume is anonymised: the loss is taken over the masked voxels of the other half."""
    shape = (40, 36, 44)
    rng = np.random.default_rng(0)
    first = rng.normal(100, 20, shape).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[:20] = 1
    results = {}
    for name, patches in (("masks", True), ("none", False)):
        folder = tmp_path / name
        folder.mkdir()
        nibabel.save(nibabel.Nifti1Image(first, np.eye(4)), folder / "a.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folder / "mask.nii.gz")
        rows = [{"image": "a.nii.gz", **({"anonymisation_mask": "mask.nii.gz"} if patches else {})}]
        (folder / "list.json").write_text(json.dumps(rows))
        config = configure(folder / "list.json", folder / "run", augment=False, steps=2)
        pretrain(config)
        results[name] = [row["mask_ratio"] for row in read_log(config.output_dir / "log.csv") if "loss" in row]
    assert results["none"] == [0.75, 0.75]
    assert all(0.2 < ratio < 0.6 for ratio in results["masks"])


def test_a_checkpoint_tells_the_voxel_size_of_the_volumes(images: Path, tmp_path: Path) -> None:
    for spacing, expected in ((2.0, [2.0, 2.0, 2.0]), (None, [1.0, 1.0, 1.0])):
        volumes = tmp_path / f"volumes{spacing}"
        preprocess(find_images([images]), volumes, spacing_mm=spacing, progress=False)
        config = configure(None, tmp_path / f"run{spacing}", volumes=volumes, steps=1, patch_size=(16, 16, 16))
        assert load_checkpoint(pretrain(config).checkpoint)["spacing_mm"] == expected


def test_neither_volumes_nor_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give volumes .* or images"):
        pretrain(configure(None, tmp_path / "run"))


def test_a_method_that_mixes_samples_warns_of_parts(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, object] = {"method": "volumefusion", "steps": 1, "batch_size": 2}
    for parts, warned in ((1, False), (2, True)):
        caplog.clear()
        pretrain(configure(images, tmp_path / str(parts), accumulate=parts, **settings))
        assert ("1 of 2 are computed at the same time" in caplog.text) == warned


def test_validation_shares_no_random_numbers_with_training(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pose, streams = masked_autoencoder_module.MaskedAutoencoder.pose, {False: set(), True: set()}

    def watched(self: Any, image: torch.Tensor, valid: torch.Tensor | None, draw: Any) -> Any:
        streams[draw.batch == 2].add(draw.stream)  # validation has one patch at a time
        return pose(self, image, valid, draw)

    monkeypatch.setattr(masked_autoencoder_module.MaskedAutoencoder, "pose", watched)
    pretrain(configure(images, tmp_path / "run", steps=2))
    assert len(streams[True]) == 2
    assert len(streams[False]) == 1
    assert not streams[True] & streams[False]
