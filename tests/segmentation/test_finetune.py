"""Fine-tuning as a whole: learns, resumes to the last bit, freezes, transfers, reports, refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from small_dataset import describe, save, write_dataset

from s3d.checkpoint import load_checkpoint, save_checkpoint
from s3d.cli import main
from s3d.distributed import Processes
from s3d.export_weights import ExportConfig, export
from s3d.model import build_unet
from s3d.segmentation import finetune as finetune_module
from s3d.segmentation import planning as planning_module
from s3d.segmentation import segmentation_validation as segmentation_validation_module
from s3d.segmentation import segmentation_validation as validation_module
from s3d.segmentation.finetune import FinetuneResult, finetune
from s3d.segmentation.finetune_config import FinetuneConfig
from s3d.segmentation.loss import SegmentationLoss
from s3d.segmentation.plan import SegmentationPlan
from s3d.segmentation.segmentation_step import SegmentationStep, build_segmentation_training
from s3d.training_log import read_log


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_dataset(tmp_path_factory.mktemp("raw") / "Dataset001_Balls", cases=4)
    names = [f"case_{number}" for number in range(4)]
    (folder / "splits_final.json").write_text(json.dumps([{"train": names[:3], "val": names[3:]}]))
    return folder


def configure(dataset: Path, output: Path, **changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {
        "dataset": dataset,
        "output_dir": output,
        "preset": "tiny",
        "patch_size": (12, 16, 12),
        "steps": 6,
        "batch_size": 2,
        "momentum": 0.9,
        "validate_every": 3,
        "checkpoint_every": 100,
        "workers": 0,
        "device": "cpu",
    }
    return FinetuneConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `s3d pretrain` writes it."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pt"
    content = {
        "step": 1,
        "config": {"preset": "tiny", "patch_size": [16, 16, 16], "spacing_mm": 1.0},
        "spacing_mm": [1.0, 1.0, 1.0],
        "network": build_unet("tiny").state_dict(),
        "method": {},
    }
    save_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneConfig, FinetuneResult]:
    config = configure(dataset, tmp_path_factory.mktemp("finished") / "run")
    return config, finetune(config)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_log(folder / "log.csv") if "loss" in row]


def test_it_learns_what_the_balls_are(dataset: Path, tmp_path: Path) -> None:
    config = configure(dataset, tmp_path / "run", steps=60, learning_rate=0.05, validate_every=30, augment=False)
    result = finetune(config)
    assert result.validation_dice > 0.8
    rows = [row for row in read_log(config.output_dir / "log.csv") if "validation_dice" in row]
    assert [row["step"] for row in rows] == [30, 60]
    assert rows[-1]["validation_dice"] == pytest.approx((rows[-1]["dice_shell"] + rows[-1]["dice_core"]) / 2)


def test_a_run_leaves_what_the_documentation_says(finished: tuple[FinetuneConfig, FinetuneResult]) -> None:
    config, result = finished
    folder = config.output_dir
    files = ("config.json", "plan.json", "validation.csv", "training.png", "segmentation_000006.png", "tensorboard")
    assert all((folder / file).exists() for file in files)
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Dice of the validation cases" in report
    assert "case_3" in report
    saved = load_checkpoint(result.checkpoint)
    plan = SegmentationPlan.from_plain(saved["plan"])
    plan.build_network().load_state_dict(saved["network"])
    assert plan.plain() == json.loads((folder / "plan.json").read_text())
    with open(folder / "validation.csv", newline="") as file:
        header, *cases = csv.reader(file)
    assert header == ["case", "dice_shell", "dice_core"]
    assert [case[0] for case in cases] == ["case_3"]


def test_some_cases_are_looked_at_on_the_way_and_all_at_the_end(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    predict = validation_module.predict_logits
    monkeypatch.setattr(
        validation_module, "predict_logits", lambda *args, **options: seen.append(1) or predict(*args, **options)
    )
    monkeypatch.setattr(validation_module, "MAX_CASES", 3)
    config = configure(dataset, tmp_path / "run", fold="all", steps=2, validate_every=1)
    finetune(config)
    assert len(seen) == 3 + 4
    with open(config.output_dir / "validation.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert [row[0] for row in rows] == ["case_0", "case_1", "case_2", "case_3"]
    scores = np.array([[float(score) for score in row[1:]] for row in rows])
    last = [row for row in read_log(config.output_dir / "log.csv") if "validation_dice" in row][-1]
    assert [last[column] for column in header[1:]] == pytest.approx(scores.mean(0).tolist(), abs=1e-5)


def test_a_stopped_run_resumes_to_the_last_bit(
    finished: tuple[FinetuneConfig, FinetuneResult], dataset: Path, tmp_path: Path
) -> None:
    config = configure(dataset, tmp_path / "run")
    _stopped_at(config, 3)
    assert load_checkpoint(config.output_dir / "checkpoint.pt")["step"] == 3
    assert finetune(config).steps == 6
    assert losses(config.output_dir) == losses(finished[0].output_dir)
    ours, theirs = (load_checkpoint(run.output_dir / "checkpoint.pt") for run in (config, finished[0]))
    assert all(torch.equal(ours["network"][name], value) for name, value in theirs["network"].items())


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_sawtooth_resumes_on_either_side_of_its_change(
    stop: int, dataset: Path, pretrained: Path, tmp_path: Path
) -> None:
    """Steps 1 and 2 train the decoder alone: 2 is the last with one group in the optimiser, 3 the first with two."""
    settings = {"checkpoint": pretrained, "schedule": "sawtooth", "warmup_steps": 2}
    whole = configure(dataset, tmp_path / "whole", **settings)
    finetune(whole)
    config = configure(dataset, tmp_path / "stopped", **settings)
    _stopped_at(config, stop)
    finetune(config)
    assert losses(config.output_dir) == losses(whole.output_dir)


def _stopped_at(config: FinetuneConfig, step: int) -> None:
    original = SegmentationStep.losses

    def signalled(self: SegmentationStep, parts: list[dict[str, Any]], done: int) -> object:
        if done == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, parts, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationStep, "losses", signalled)
        assert finetune(config).steps == step


def test_parts_give_the_gradients_of_the_whole_batch(
    finished: tuple[FinetuneConfig, FinetuneResult], dataset: Path, tmp_path: Path
) -> None:
    config = configure(dataset, tmp_path / "run", accumulate=2)
    finetune(config)
    assert losses(config.output_dir) == pytest.approx(losses(finished[0].output_dir), rel=1e-5)


def test_two_processes_train_as_one(
    finished: tuple[FinetuneConfig, FinetuneResult], dataset: Path, pretrained: Path, tmp_path: Path
) -> None:
    """With a sawtooth, so that other parameters are averaged over the processes from step 3 on."""
    one = configure(dataset, tmp_path / "one", checkpoint=pretrained, warmup_steps=2)
    finetune(one)
    command = f"""--dataset {dataset} --output-dir {tmp_path / "two"} --preset tiny --patch-size 12 16 12 --steps 6
        --batch-size 2 --momentum 0.9 --validate-every 3 --checkpoint-every 100 --workers 0 --device cpu
        --checkpoint {pretrained} --warmup-steps 2""".split()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "s3d"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    line = [*launcher, "finetune", *command, "--cases", str(one.output_dir / "cases")]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one.output_dir), rel=1e-5)
    dice = [load_checkpoint(tmp_path / name / "checkpoint.pt")["validation_dice"] for name in ("one", "two")]
    assert dice[0] == pytest.approx(dice[1], abs=0.01)


def test_a_frozen_encoder_has_neither_gradient_nor_state(dataset: Path, pretrained: Path, tmp_path: Path) -> None:
    config = configure(dataset, tmp_path / "run", checkpoint=pretrained, schedule="frozen", steps=4, weight_decay=0.1)
    finetune(config)
    before, after = load_checkpoint(pretrained), load_checkpoint(config.output_dir / "checkpoint.pt")
    encoder = [name for name in after["network"] if name.startswith("encoder.")]
    assert all(torch.equal(before["network"][name], after["network"][name]) for name in encoder)
    names = [name for name in after["network"] if name.startswith("decoder.") and "encoder" not in name]
    assert any(not torch.equal(before["network"][name], after["network"][name]) for name in names if "stages" in name)
    network = SegmentationPlan.from_plain(after["plan"]).build_network()
    trained = {id(p) for p in network.decoder.parameters()} - {id(p) for p in network.encoder.parameters()}
    assert len(after["optimizer"]["param_groups"][0]["params"]) == len(trained)
    assert len(after["optimizer"]["param_groups"]) == 1
    assert len(after["optimizer"]["state"]) < len(trained)  # heads that do not count have none


def test_the_encoder_is_frozen_and_then_trained(dataset: Path, pretrained: Path, tmp_path: Path) -> None:
    config = configure(dataset, tmp_path / "run", checkpoint=pretrained, warmup_steps=2)
    plan, _ = finetune_module.make_plan(config, finetune_module.read_raw_dataset(dataset), load_checkpoint(pretrained))
    network = plan.build_network(config.deep_supervision)
    training = build_segmentation_training(config, network, 0)
    step = SegmentationStep(config, training, Processes(0, 1, torch.device("cpu")))
    batch = [{"image": torch.randn(2, 1, 12, 16, 12), "label": torch.randint(0, 3, (2, 1, 12, 16, 12))}]
    weight = network.encoder.stem.convs[0].conv.weight
    for number in range(6):
        before = weight.detach().clone()
        step(batch, number)
        assert (weight.grad is None) == (number < 2)
        assert torch.equal(before, weight) == (number < 2)
        assert (weight in training.optimizer.state) == (number >= 2)
    assert {group["lr"] for group in training.optimizer.param_groups} == {config.learning_rate_at(5)}


def test_what_is_transferred_stands_in_the_report(dataset: Path, pretrained: Path, tmp_path: Path) -> None:
    config = configure(dataset, tmp_path / "run", checkpoint=pretrained, preset=None, steps=3)
    finetune(config)
    with open(config.output_dir / "transfer.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["action"] for row in rows} == {"loaded", "initialised", "dropped"}
    assert "Transferred weights" in (config.output_dir / "report.html").read_text(encoding="utf-8")
    saved = load_checkpoint(config.output_dir / "checkpoint.pt")
    assert saved["preset"] == "tiny"  # of the checkpoint
    assert saved["config"]["schedule"] == "sawtooth"


def test_a_fine_tuned_model_can_be_fine_tuned(
    finished: tuple[FinetuneConfig, FinetuneResult], dataset: Path, tmp_path: Path
) -> None:
    config = configure(
        dataset, tmp_path / "run", checkpoint=finished[1].checkpoint, preset=None, patch_size=None, steps=3
    )
    finetune(config)
    plan = load_checkpoint(config.output_dir / "checkpoint.pt")["plan"]
    assert plan["patch_size"] == [12, 16, 12]


def test_a_fine_tuned_model_is_not_exported_as_a_pre_trained_one(
    finished: tuple[FinetuneConfig, FinetuneResult], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is a checkpoint of s3d finetune"):
        export(ExportConfig(finished[1].checkpoint, format="unet", output=tmp_path / "unet.pth"))


def test_a_dynamic_plan_trains(dataset: Path, tmp_path: Path) -> None:
    config = configure(dataset, tmp_path / "run", patch="dynamic", patch_size=None, steps=2)
    assert finetune(config).steps == 2
    assert load_checkpoint(config.output_dir / "checkpoint.pt")["plan"]["kind"] == "dynamic"


def test_a_plan_that_took_time_is_made_once(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Dataset001_Balls"
    shutil.copytree(dataset, folder)
    calls = []
    read = planning_module.read_fingerprint

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return read(*arguments, **keywords)

    monkeypatch.setattr(planning_module, "read_fingerprint", counted)
    raw = finetune_module.read_raw_dataset(folder)
    config = configure(folder, tmp_path / "run", patch="dynamic", patch_size=None)
    plan = finetune_module.make_plan(config, raw, None)
    assert finetune_module.make_plan(config, raw, None) == plan
    assert len(calls) == 1
    finetune_module.make_plan(
        configure(folder, tmp_path / "run", patch="dynamic", patch_size=None, batch_size=4), raw, None
    )
    assert len(calls) == 2
    os.utime(raw.training[0].images[0], (0, 0))
    finetune_module.make_plan(config, raw, None)
    assert len(calls) == 3


def test_cases_can_be_shared_and_prepared_alone(dataset: Path, tmp_path: Path) -> None:
    config = configure(dataset, tmp_path / "run", cases=tmp_path / "cases", prepare_only=True)
    assert finetune(config).steps == 0
    assert not (config.output_dir / "checkpoint.pt").exists()
    assert len(list((tmp_path / "cases").glob("*.b2nd"))) == 8
    assert finetune(configure(dataset, tmp_path / "run", cases=tmp_path / "cases")).steps == 6


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains(precision: str, dataset: Path, tmp_path: Path) -> None:
    assert finetune(configure(dataset, tmp_path / "run", precision=precision, steps=3)).steps == 3
    assert all(np.isfinite(losses(tmp_path / "run")))


def test_a_bad_case_is_named_or_skipped(dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "Dataset001_Balls"
    shutil.copytree(dataset, folder)
    image = folder / "imagesTr" / "case_1_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"case_1_0000\.nii\.gz: cannot be read"):
        finetune(configure(folder, tmp_path / "run"))
    assert finetune(configure(folder, tmp_path / "run", skip_bad=True, steps=2)).steps == 2
    assert any("skipped" in message and "case_1_0000" in message for message in caplog.messages)


def test_a_data_set_without_a_good_training_case_is_refused(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Dataset001_Balls"
    shutil.copytree(dataset, folder)
    image = folder / "imagesTr" / "case_0_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:200])
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_3"]}]))
    with pytest.raises(ValueError, match=r"all training cases are bad, for example .*case_0_0000"):
        finetune(configure(folder, tmp_path / "run", skip_bad=True))


def test_cases_skipped_by_whoever_prepared_them_are_refused_without_skip_bad(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes open what one has prepared; here one does, as if it were the first of two."""
    folder, cases = tmp_path / "Dataset001_Balls", tmp_path / "cases"
    shutil.copytree(dataset, folder)
    image = folder / "imagesTr" / "case_1_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:200])
    finetune(configure(folder, tmp_path / "run", cases=cases, skip_bad=True, prepare_only=True))
    monkeypatch.setattr(
        finetune_module,
        "prepare_dataset",
        lambda chosen, plan, where, **_: finetune_module.open_dataset(chosen, plan, where),
    )
    with pytest.raises(ValueError, match="case_1_0000"):
        finetune(configure(folder, tmp_path / "run", cases=cases, steps=2))
    assert finetune(configure(folder, tmp_path / "run", cases=cases, steps=2, skip_bad=True)).steps == 2


def test_classes_that_no_case_has_do_not_count(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [0.5, float("nan")]
    monkeypatch.setattr(segmentation_validation_module, "dice", lambda *_: np.array(scores))
    assert finetune(configure(dataset, tmp_path / "one", steps=2)).validation_dice == 0.5
    scores[0] = float("nan")
    assert np.isnan(finetune(configure(dataset, tmp_path / "none", steps=2)).validation_dice)


def test_a_run_without_validation_says_nothing_of_dice(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps([{"train": ["case_0"], "val": []}]))
    options = f"--dataset {dataset} --output-dir {tmp_path / 'run'} --splits {splits} --preset tiny --steps 2"
    main(["finetune", *options.split(), "--patch-size", "12", "16", "12", "--device", "cpu", "--workers", "0"])
    assert capsys.readouterr().out == f"checkpoint: {tmp_path / 'run' / 'checkpoint.pt'}\n"


def test_a_run_can_begin_from_a_checkpoint_of_another_folder(
    finished: tuple[FinetuneConfig, FinetuneResult], dataset: Path, tmp_path: Path
) -> None:
    config = configure(dataset, tmp_path / "first")
    _stopped_at(config, 3)
    second = configure(dataset, tmp_path / "second", resume=str(tmp_path / "first" / "checkpoint.pt"))
    finetune(second)
    assert losses(second.output_dir) == losses(finished[0].output_dir)[3:]
    assert (second.output_dir / "plan.json").read_text() == (config.output_dir / "plan.json").read_text()


def test_the_table_of_a_run_that_left_no_checkpoint_is_not_that_of_the_next(
    dataset: Path, pretrained: Path, tmp_path: Path
) -> None:
    def killed(*_: object) -> object:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationStep, "losses", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(configure(dataset, tmp_path / "run", checkpoint=pretrained))
    assert (tmp_path / "run" / "transfer.csv").exists()
    finetune(configure(dataset, tmp_path / "run", steps=1))
    assert not (tmp_path / "run" / "transfer.csv").exists()
    assert "Transferred weights" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_other_data_or_settings_do_not_go_on(
    finished: tuple[FinetuneConfig, FinetuneResult], dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _stopped_at(configure(dataset, run), 3)
    with pytest.raises(ValueError, match="batch_size"):
        finetune(configure(dataset, run, batch_size=4))
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps([{"train": ["case_0"], "val": ["case_3"]}]))
    with pytest.raises(ValueError, match="training images of the run"):
        finetune(configure(dataset, run, splits=splits))
    folder = tmp_path / "Dataset001_Balls"
    shutil.copytree(dataset, folder)
    label = folder / "labelsTr" / "case_0.nii.gz"
    before = nib.load(label)
    save(label, np.minimum(np.asarray(before.dataobj), 1), before.affine)
    with pytest.raises(ValueError, match=r"training images of the run .* 1 changed \(case_0\)"):
        finetune(configure(folder, run))
    describe(folder, labels={"background": 0, "shell": 1, "kernel": 2})
    with pytest.raises(ValueError, match="class_names was"):
        finetune(configure(folder, run))


def test_a_run_of_pre_training_is_not_gone_on_with(dataset: Path, pretrained: Path, tmp_path: Path) -> None:
    content = load_checkpoint(pretrained)
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", {**content, "optimizer": {}})
    with pytest.raises(ValueError, match="holds a run of another command"):
        finetune(configure(dataset, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, "preset must be one of"),
        ({"patch": "dynamic"}, "patch_size and spacing_mm go with patch fixed"),
        ({"schedule": "sawtooth"}, "freezes the encoder, which makes sense with pre-trained weights only"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "spacing_mm must be three positive numbers"),
        ({"foreground": 2.0}, "foreground must be in"),
        ({"warmup_steps": 3}, "schedule scratch has no warm-up"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"weights": "ema"}, "weights goes with a checkpoint"),
        ({"scope": "encoder"}, "scope goes with a checkpoint"),
        ({"splits": Path("splits.json"), "fold": "all"}, "splits goes with the number of a fold"),
        ({"memory_gib": 20.0}, "memory_gib goes with patch dynamic"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        configure(tmp_path, tmp_path / "run", **changes)


def test_a_checkpoint_of_another_architecture_is_refused_before_cases_are_prepared(
    dataset: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--dataset {dataset} --output-dir {tmp_path / 'run'} --checkpoint {pretrained} --preset small"
    with pytest.raises(SystemExit) as end:
        main(["finetune", *options.split(), "--patch-size", "16", "16", "16", "--device", "cpu"])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(pretrained) in message
    assert "--preset tiny" in message
    assert not (tmp_path / "run").exists()


def test_the_loss_is_dice_and_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5, 6), torch.randint(0, 3, (2, 1, 4, 5, 6))
    labels[1][labels[1] == 2] = 0  # a class that one sample lacks
    share = logits.softmax(1)
    truth = torch.nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1)
    both, sums = (share * truth).sum((2, 3, 4)), (share + truth).sum((2, 3, 4))
    dice = ((2 * both + 1e-5) / (sums + 1e-5))[:, 1:].mean()
    expected = 1 - dice - share.log().mul(truth).sum(1).mean()
    loss = SegmentationLoss()
    assert loss(logits, labels) == pytest.approx(float(expected), rel=1e-5)
    # Two resolutions that count, and a third that does not. The nearest of two voxels is the second.
    small = torch.randn(2, 3, 2, 5, 3)
    both = loss([logits, small, torch.full((2, 3, 1, 1, 1), float("nan"))], labels)
    coarse = loss(small, labels[:, :, 1::2, :, 1::2])
    assert both == pytest.approx(float((2 * expected + coarse) / 3), rel=1e-5)
