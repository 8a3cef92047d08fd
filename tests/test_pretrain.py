"""Pre-training end to end on small volumes: logs, exact resume, errors, command line."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import s3d.pretrain as pretrain_module
import s3d.training_step as training_step_module
from s3d.checkpoint import load_checkpoint
from s3d.cli import main
from s3d.masking import MaskSampler
from s3d.model import build_unet
from s3d.pretrain import PretrainConfig, PretrainResult, load_model, pretrain
from s3d.training_log import read_log
from s3d_kernels import BlockMask

# Losses of 20 steps of `golden_config`; a change of numerics changes them. The tolerance covers other instruction sets.
GOLDEN = Path(__file__).parent / "golden_losses.json"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three smooth volumes of 40x36x44 voxels of 1 mm."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 36, 44)), indexing="ij")
    for number in range(3):
        waves = sum(np.sin(rng.uniform(2, 6) * axis + rng.uniform(0, 6)) for axis in axes)
        head = sum(axis**2 for axis in axes) < 1.2
        volume = np.where(head, 100 + 20 * waves, 0).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / f"head{number}.nii.gz")
    return folder


def configure(images: Path, output: Path, **changes: object) -> PretrainConfig:
    settings: dict[str, object] = {
        "images": (str(images),),
        "output_dir": output,
        "preset": "tiny",
        "patch_size": (32, 32, 32),
        "mask_block": 8,
        "batch_size": 2,
        "steps": 6,
        "momentum": 0.9,
        "validate_every": 3,
        "checkpoint_every": 100,
        "workers": 0,
        "device": "cpu",
    }
    return PretrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_log(output / "log.csv") if "loss" in row]


@pytest.fixture(scope="session")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, PretrainResult]:
    """A run of six steps, left alone."""
    config = configure(images, tmp_path_factory.mktemp("run") / "a")
    return config, pretrain(config)


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
    original, calls = training_step_module.masked_mse, []

    def loss_with_signal(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), number)
        return original(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training_step_module, "masked_mse", loss_with_signal)
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

    original = pretrain_module.TrainingLog.write

    def write(self: pretrain_module.TrainingLog, step: int, **values: float) -> None:
        original(self, step, **values)
        stop(step, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_module.TrainingLog, "write", write)
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


def test_a_diverging_run_says_so(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "run", learning_rate=1e30, steps=5, gradient_clip=1e30)
    with pytest.raises(FloatingPointError, match=r"gradient norm is (nan|inf).*learning_rate"):
        pretrain(config)


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


def stopped_at(config: PretrainConfig, step: int) -> PretrainResult:
    """Run until a stop signal arrives during this step."""
    original = pretrain_module.MaskSampler.__call__

    def sample(self: MaskSampler, batch: int, *stream: int, **keywords: object) -> BlockMask:
        if stream == (0, step - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, *stream, **keywords)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_module.MaskSampler, "__call__", sample)
        return pretrain(config)


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


def test_a_signal_does_not_save_broken_weights(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "run", learning_rate=1e30, gradient_clip=1e30, log_every=1000, steps=50)
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        stopped_at(config, 6)
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
    assert (config.steps, config.batch_size, config.learning_rate) == (250_000, 6, 1e-2)
    assert (config.momentum, config.weight_decay, config.gradient_clip) == (0.99, 3e-5, 12.0)


def test_options_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    """Options are an interface: a change of this list is a change that users see."""
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    options = set(re.findall(r"--([a-z][a-z-]+)", capsys.readouterr().out))
    expected = """
        augment backend batch-size cache-dir checkpoint-every densify device gradient-clip help images learning-rate
        log-every mask-block mask-ratio mask-tokens momentum no-augment no-densify no-mask-tokens no-skip-bad
        no-sparse output-dir patch-size precision preset seed skip-bad spacing-mm sparse steps validate-every
        validation-fraction weight-decay workers
    """.split()
    assert options == set(expected)


def test_bfloat16_trains(images: Path, tmp_path: Path) -> None:
    result = pretrain(configure(images, tmp_path / "run", precision="bfloat16", steps=3))
    assert np.isfinite(result.final_loss)


def test_golden_losses(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path / "run", steps=20, learning_rate=1e-3, validate_every=20)
    pretrain(config)
    expected = json.loads(GOLDEN.read_text())
    assert losses(config.output_dir) == pytest.approx(expected, rel=2e-3)
