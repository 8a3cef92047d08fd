from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from small_dataset import CLASSES, ball, save
from torch import Tensor, nn

from s3d.checkpoint import load_checkpoint, save_checkpoint
from s3d.cli import main
from s3d.data import BadImageError
from s3d.model import build_unet, preset_shape
from s3d.segmentation import predict as module
from s3d.segmentation.plan import Normalization, SegmentationPlan
from s3d.segmentation.predict import PredictConfig, predict

AS_THEY_ARE = Normalization("ct", low=-1e9, high=1e9, mean=0.0, std=1.0)


def make_plan(**changes: Any) -> SegmentationPlan:
    settings: dict[str, Any] = {
        "dataset": "Dataset001_Balls",
        "channel_names": ("MRI",),
        "class_names": CLASSES,
        "file_ending": ".nii.gz",
        "kind": "fixed",
        "spacing_mm": (1.0, 1.0, 1.0),
        "patch_size": (8, 16, 12),
        "normalization": (Normalization("zscore"),),
        "network": preset_shape("tiny"),
    }
    return SegmentationPlan(**{**settings, **changes})


def make_checkpoint(file: Path, plan: SegmentationPlan) -> Path:
    """Of a network with random weights, in which all branches count."""
    torch.manual_seed(0)
    network = plan.build_network()
    for part in network.modules():
        if isinstance(part, nn.InstanceNorm3d):  # the last of a residual branch begins with 0
            nn.init.uniform_(part.weight, 0.5, 1.5)
    state = network.state_dict()
    ema = {name: -tensor if "seg_layers" in name else tensor for name, tensor in state.items()}
    save_checkpoint(file, {"step": 7, "config": {}, "plan": plan.plain(), "network": state, "ema": ema})
    return file


def change_checkpoint(file: Path, **changes: Any) -> None:
    """Other entries; None takes one away."""
    content = {**load_checkpoint(file), **changes}
    save_checkpoint(file, {name: value for name, value in content.items() if value is not None})


def make_images(folder: Path, cases: int = 3) -> Path:
    for number in range(cases):
        image, _ = ball((16 + number, 20, 12), number)
        save(folder / f"case_{number}_0000.nii.gz", image, np.diag([1.1, 0.9, 1.3, 1.0]))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, Any]:
    return {
        "checkpoint": make_checkpoint(tmp_path / "checkpoint.pt", make_plan()),
        "images": make_images(tmp_path / "imagesTs"),
        "output_dir": tmp_path / "predictions",
        "device": "cpu",
    }


class Bands(nn.Module):
    """Classes by intensity: background below 35, shell up to 65, core above."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Parameter(torch.tensor([35.0, 65.0]))

    def forward(self, x: Tensor) -> Tensor:  # [N, C, D, H, W]; the first channel counts
        low, high = self.cut
        brightness = x[:, 0]
        return torch.stack([low - brightness, torch.minimum(brightness - low, high - brightness), brightness - high], 1)


@pytest.mark.parametrize("codes", ["RAS", "LPI", "ASL"])
@pytest.mark.parametrize("mirror", [False, True])
def test_images_are_segmented_where_they_lie(
    codes: str, mirror: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tilted, anisotropic image of two channels on the plan's own grid: each voxel gets the class of its value."""
    monkeypatch.setattr(SegmentationPlan, "build_network", lambda self: Bands())
    plan = make_plan(
        channel_names=("MRI", "other"),
        spacing_mm=(2.5, 1.1, 0.8),
        patch_size=(8, 8, 8),
        normalization=(AS_THEY_ARE, AS_THEY_ARE),
    )
    _, label = ball((26, 17, 13))
    image = (20 + 30 * label).astype(np.int16)
    image[:3] = image[:, -2:] = 0
    expected = np.where(image > 0, label, 0)
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    affine = tilt @ np.diag([0.8, 1.1, 2.5, 1.0]) @ inv_ornt_aff(change, image.shape)
    image, expected = (nib.apply_orientation(array, change) for array in (image, expected))
    reference = save(tmp_path / "raw" / "imagesTs" / "a_0000.nii.gz", image, affine)
    save(tmp_path / "raw" / "imagesTs" / "a_0001.nii.gz", image.astype(np.float32) * 7, affine)
    checkpoint = make_checkpoint(tmp_path / "checkpoint.pt", plan)
    summary = predict(PredictConfig(checkpoint, tmp_path / "raw", tmp_path / "out", mirror=mirror, device="cpu"))
    assert summary.predicted == ("a",)
    written = nib.load(tmp_path / "out" / "a.nii.gz")
    assert written.get_data_dtype() == np.int16
    np.testing.assert_array_equal(written.affine, nib.load(reference).affine)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), expected)


def test_finished_cases_stay_and_missing_ones_are_made_the_same(setting: dict[str, Any]) -> None:
    config = PredictConfig(**setting)
    assert predict(config).predicted == ("case_0", "case_1", "case_2")
    before = contents(config.output_dir)
    assert list(before) == ["case_0.nii.gz", "case_1.nii.gz", "case_2.nii.gz", "prediction.json"]
    classes = [np.asanyarray(nib.load(config.output_dir / f"case_{number}.nii.gz").dataobj) for number in range(3)]
    assert all(len(np.unique(values)) > 1 for values in classes)
    times = {path: path.stat().st_mtime_ns for path in config.output_dir.iterdir()}
    (config.output_dir / "case_1.nii.gz").unlink()
    assert predict(config).predicted == ("case_1",)
    assert contents(config.output_dir) == before
    for number in (0, 2):
        path = config.output_dir / f"case_{number}.nii.gz"
        assert path.stat().st_mtime_ns == times[path]


def test_the_record_says_what_the_folder_holds(setting: dict[str, Any]) -> None:
    config = PredictConfig(**setting)
    predict(config)
    record = json.loads((config.output_dir / "prediction.json").read_text())
    assert record["class_names"] == list(CLASSES)
    assert record["mirror"] is False
    with pytest.raises(ValueError, match=r"predictions was begun with mirror False \(now True\); .*--overwrite"):
        predict(PredictConfig(**setting, mirror=True))
    make_checkpoint(setting["checkpoint"], make_plan(patch_size=(8, 8, 8)))
    with pytest.raises(ValueError, match="was begun with checkpoint_sha256"):
        predict(config)
    assert json.loads((config.output_dir / "prediction.json").read_text()) == record


def test_a_damaged_record_is_named(setting: dict[str, Any]) -> None:
    setting["output_dir"].mkdir()
    for content in (b"{", b"[]", b"\xff", b'{"image_bytes": 3}'):
        (setting["output_dir"] / "prediction.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"predictions/prediction\.json: is damaged, .*; remove it with them, or"):
            predict(PredictConfig(**setting))


def test_other_images_of_the_same_name_are_noticed(setting: dict[str, Any], tmp_path: Path) -> None:
    predict(PredictConfig(**setting))
    copied = shutil.copytree(setting["images"], tmp_path / "copied")
    make_images(copied, 4)  # the same and one more
    assert predict(PredictConfig(**{**setting, "images": copied})).predicted == ("case_3",)
    save(copied / "case_1_0000.nii.gz", ball((20, 20, 20))[0], np.eye(4))
    with pytest.raises(ValueError, match=r"case_1\.nii\.gz was not made from .*copied/case_1_0000.* as it is now"):
        predict(PredictConfig(**{**setting, "images": copied}))


def test_overwrite_leaves_no_mixture(setting: dict[str, Any], tmp_path: Path) -> None:
    predict(PredictConfig(**setting))
    (setting["images"] / "case_1_0000.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"holds case_1\.nii\.gz too, .* was made with another overlap"):
        predict(PredictConfig(**setting, overlap=0.25, overwrite=True))
    assert len(contents(setting["output_dir"])) == 4
    assert predict(PredictConfig(**setting, overwrite=True)).predicted == ("case_0", "case_2")


def test_moving_averages_are_used_where_asked_for(setting: dict[str, Any], tmp_path: Path) -> None:
    saved = load_checkpoint(setting["checkpoint"])
    for number in (1, 2):
        (setting["images"] / f"case_{number}_0000.nii.gz").unlink()
    predict(PredictConfig(**setting))
    predict(PredictConfig(**{**setting, "output_dir": tmp_path / "ema"}, weights="ema"))
    change_checkpoint(setting["checkpoint"], network=saved["ema"], ema=None)
    predict(PredictConfig(**{**setting, "output_dir": tmp_path / "as network"}))
    raw, ema, as_network = (
        contents(folder)["case_0.nii.gz"]
        for folder in (setting["output_dir"], tmp_path / "ema", tmp_path / "as network")
    )
    assert ema == as_network != raw
    with pytest.raises(ValueError, match=r"weights ema: .*checkpoint\.pt has none, because its run kept no average"):
        predict(PredictConfig(**setting, weights="ema", overwrite=True))


def test_a_checkpoint_that_contradicts_itself_is_refused(setting: dict[str, Any]) -> None:
    saved = load_checkpoint(setting["checkpoint"])
    less = {name: tensor for name, tensor in saved["network"].items() if name != "decoder.seg_layers.0.bias"}
    for changes, message in (
        (
            {"plan": make_plan(class_names=CLASSES[:2]).plain()},
            r"seg_layers\.0\.weight is 3 x .* and 2 x .* of the plan",
        ),
        (
            {"network": less},
            r"weights contradict its plan: decoder\.seg_layers\.0\.bias is missing in the weights and 3",
        ),
        (
            {"network": {**saved["network"], "more": torch.zeros(2)}},
            "more is 2 in the weights and missing in the network",
        ),
        ({"plan": {}}, r"checkpoint\.pt: its plan cannot be read \(KeyError: 'normalization'\)"),
        ({"plan": {**saved["plan"], "more": 1}}, r"its plan cannot be read \(TypeError: .* 'more'\)"),
    ):
        change_checkpoint(setting["checkpoint"], **{**saved, **changes})
        with pytest.raises(ValueError, match=message) as caught:
            predict(PredictConfig(**setting))
        assert "\n" not in str(caught.value)
    assert not setting["output_dir"].exists()


@pytest.mark.parametrize("change", [{"overlap": 0.25}, {"mirror": True}])
def test_overwrite_makes_all_of_it_again(change: dict[str, Any], setting: dict[str, Any]) -> None:
    predict(PredictConfig(**setting))
    before = contents(setting["output_dir"])
    summary = predict(PredictConfig(**setting, **change, overwrite=True))
    assert summary.predicted == ("case_0", "case_1", "case_2")
    assert contents(setting["output_dir"])["case_1.nii.gz"] != before["case_1.nii.gz"]
    predict(PredictConfig(**setting, overwrite=True))
    assert contents(setting["output_dir"]) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_left_alone(overwrite: bool, setting: dict[str, Any]) -> None:
    truth = setting["output_dir"] / "case_1.nii.gz"
    truth.parent.mkdir()
    truth.write_bytes(b"drawn by hand")
    with pytest.raises(ValueError, match=r"holds case_1\.nii\.gz but no prediction\.json"):
        predict(PredictConfig(**setting, overwrite=overwrite))
    assert contents(truth.parent) == {"case_1.nii.gz": b"drawn by hand"}


def test_two_processes_write_what_one_writes(setting: dict[str, Any], tmp_path: Path) -> None:
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2"
    command = f"{torchrun} -m s3d predict {setting['checkpoint']} --images {setting['images']} --output-dir two"
    done = subprocess.run(
        [sys.executable, *command.split(), "--device", "cpu"],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        predict(PredictConfig(**{**setting, "output_dir": tmp_path / "one"}))
    finally:
        torch.set_num_threads(threads)
    assert "2 cases segmented by the first process" in done.stdout
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert len(one) == 4
    assert one == two


def test_a_bad_case_is_named_and_stops_or_is_skipped(setting: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    bad = setting["images"] / "case_1_0000.nii.gz"
    bad.write_bytes(b"nothing")
    with pytest.raises(BadImageError, match=r"case_1_0000\.nii\.gz"):
        predict(PredictConfig(**setting))
    with caplog.at_level(logging.WARNING):
        summary = predict(PredictConfig(**setting, skip_bad=True))
    assert "case case_1 is skipped" in caplog.text
    assert [error.path for error in summary.skipped] == [bad]
    assert sorted(contents(setting["output_dir"])) == ["case_0.nii.gz", "case_2.nii.gz", "prediction.json"]


def test_what_is_no_segmentation_is_refused(
    setting: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained = tmp_path / "pretrained.pt"
    state = build_unet("tiny").state_dict()
    save_checkpoint(pretrained, {"step": 1, "config": {"preset": "tiny"}, "network": state})
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(pretrained), "--images", str(setting["images"]), "--output-dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"checkpoint {pretrained} is one of pre-training" in message
    assert "s3d finetune" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": Path("nowhere.pt")}, r"nowhere\.pt"),
        ({"images": Path("nowhere")}, "nowhere: no such folder"),
        ({"device": "abacus"}, "device must be auto, cpu or a device of this machine, got 'abacus'"),
    ],
)
def test_wrong_names_are_refused(change: dict[str, Any], message: str, setting: dict[str, Any]) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        predict(PredictConfig(**{**setting, **change}))
    assert not setting["output_dir"].exists()


def test_nonsense_is_refused_before_anything_is_read(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"overlap must be at least 0 and below 1, got 1\.5"):
        PredictConfig(**setting, overlap=1.5)
    with pytest.raises(ValueError, match="is the folder of the images"):
        predict(PredictConfig(**{**setting, "output_dir": setting["images"]}))


def test_missing_channels_are_refused(setting: dict[str, Any]) -> None:
    make_checkpoint(
        setting["checkpoint"],
        make_plan(channel_names=("T1", "T2"), normalization=(Normalization("zscore"),) * 2),
    )
    with pytest.raises(FileNotFoundError, match=r"case_0_0001\.nii\.gz: no such file"):
        predict(PredictConfig(**setting))
    assert not setting["output_dir"].exists()


def test_answers_that_are_not_finite_are_no_background(
    setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "predict_logits", lambda *_, **__: torch.full((3, 2, 2, 2), torch.nan))
    with pytest.raises(FloatingPointError, match=r"case case_0: the network's answer is not finite in bfloat16"):
        predict(PredictConfig(**setting, precision="bfloat16"))
    assert not (setting["output_dir"] / "case_0.nii.gz").exists()


@pytest.mark.parametrize("failing", ["case_0", "case_2"])  # the last one is waited for elsewhere
def test_a_segmentation_that_cannot_be_written_stops_the_run(
    failing: str, setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, *_: object) -> None:
        if path.name.startswith(failing):
            raise OSError("cannot write")

    monkeypatch.setattr(module, "write_segmentation", write)
    with pytest.raises(OSError, match="cannot write"):
        predict(PredictConfig(**setting))


def test_half_precision_is_nearly_the_same(setting: dict[str, Any], tmp_path: Path) -> None:
    predict(PredictConfig(**setting))
    predict(PredictConfig(**{**setting, "output_dir": tmp_path / "half", "precision": "bfloat16", "batch": 4}))
    exact, half = (
        np.asanyarray(nib.load(folder / "case_0.nii.gz").dataobj)
        for folder in (setting["output_dir"], tmp_path / "half")
    )
    assert 0.9 < np.mean(exact == half) < 1
