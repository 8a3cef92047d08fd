"""s3d import: weights of nnssl and nnU-Net become a checkpoint of ours, and nothing is lost without a word."""

import copy
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from s3d.checkpoint import load_checkpoint
from s3d.cli import main
from s3d.export_weights import ExportConfig, export
from s3d.import_weights import ImportConfig, import_weights
from s3d.model import PRESETS, build_unet
from s3d.pretrain import load_model
from s3d_kernels import BlockMask

FEATURES = PRESETS["tiny"].features
PLAN = {"pretrain_plan": {"configurations": {"onemmiso": {"patch_size": [32, 32, 32], "spacing": [1, 1, 1]}}}}


def stir(module: nn.Module) -> None:
    """Make all weights different, dead ones too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def untie(module: nn.Module) -> nn.Module:
    """What nnssl's sparse conversion does to ties: every module without children is replaced wherever it stands."""
    children = dict(module.named_children())
    for name, child in children.items():
        module.add_module(name, untie(child))
    return module if children else copy.deepcopy(module)


class SparK(nn.Module):
    """The names in nnssl's SparK3D: the network, its halves again, and the parts between them."""

    def __init__(self, affine: bool = False) -> None:
        super().__init__()
        self.architecture = build_unet("tiny")
        self.architecture.encoder = untie(self.architecture.encoder)
        self.encoder = self.architecture.encoder
        self.decoder = self.architecture.decoder
        self.densify_norms = nn.ModuleList(nn.InstanceNorm3d(width, affine=affine) for width in FEATURES)
        self.densify_projs = nn.ModuleList(
            nn.Conv3d(width, width, 3, padding=1) if stage else nn.Identity() for stage, width in enumerate(FEATURES)
        )
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, width, 1, 1, 1)) for width in FEATURES)
        stir(self)

    def forward(self, x: Tensor) -> Tensor:
        """With every voxel visible."""
        skips = self.encoder(x)
        normalised = [norm(skip) for norm, skip in zip(self.densify_norms, skips, strict=True)]
        return self.decoder([projection(skip) for projection, skip in zip(self.densify_projs, normalised, strict=True)])


def spark_file(spark: SparK) -> dict[str, Any]:
    """What nnssl's SparkMAETrainer saves, without its other entries."""
    return {
        "network_weights": dict(spark.architecture.state_dict()),
        "spark_weights": dict(spark.state_dict()),
        "trainer_name": "SparkMAETrainer",
        "current_epoch": 1000,
    }


def imported(content: Any, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The checkpoint and its table, key -> row."""
    torch.save(content, folder / "file.pth")
    output = folder / "imported" / "checkpoint.pt"
    import_weights(ImportConfig(folder / "file.pth", output, **options))
    with open(f"{output}.keys.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    keys = [row["key"] for row in rows if row["action"] != "initialised"]
    assert len(keys) == len(set(keys)), "a key has two rows"
    return load_checkpoint(output), {row["key"] or row["target"]: row for row in rows}


def volume() -> Tensor:
    return torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))


def everything() -> BlockMask:
    return BlockMask.from_grid(torch.ones(1, 4, 4, 4, dtype=torch.bool), (4, 4, 4))


def test_sparse_checkpoint_of_nnssl(tmp_path: Path) -> None:
    spark = SparK()
    content = spark_file(spark)
    saved, rows = imported(content, tmp_path)
    assert saved["config"] == {"preset": "tiny", "sparse": True, "mask_tokens": True, "densify": True}
    assert saved["imported"] == {"file": "file.pth", "trainer_name": "SparkMAETrainer", "initialised": []}
    assert set(saved["method"]) == set(load_model(tmp_path / "imported" / "checkpoint.pt").state_dict()) - {
        f"unet.{name}" for name in saved["network"]
    }
    with torch.no_grad():
        model = load_model(tmp_path / "imported" / "checkpoint.pt")
        torch.testing.assert_close(model(volume(), everything()), spark(volume()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.unet(volume()), spark.architecture(volume()), rtol=1e-4, atol=1e-4)

    expected = {*content["network_weights"], *(f"spark_weights/{name}" for name in content["spark_weights"])}
    assert rows.keys() == expected | {"trainer_name", "current_epoch"}
    assert rows["trainer_name"]["target"] == "imported"
    assert rows["current_epoch"]["action"] == "dropped"
    assert rows["encoder.stem.convs.0.all_modules.0.weight"]["action"] == "used"
    assert rows["encoder.stem.convs.0.conv.weight"]["action"] == "dropped"
    assert "does not compute" in rows["encoder.stem.convs.0.conv.weight"]["reason"]
    assert rows["spark_weights/mask_tokens.1"]["target"] == "mask_tokens.1"
    assert rows["spark_weights/densify_projs.2.bias"]["target"] == "densify.2.bias"
    assert rows["spark_weights/densify_projs.2.bias"]["action"] == "converted"


def test_published_sparse_checkpoint_has_lost_its_mask_tokens(tmp_path: Path) -> None:
    spark = SparK()
    content = {"network_weights": spark_file(spark)["network_weights"], "nnssl_adaptation_plan": PLAN}
    saved, _ = imported(content, tmp_path)
    switches = {"sparse": True, "mask_tokens": False, "densify": False}
    assert saved["config"] == {"preset": "tiny", **switches, "patch_size": [32, 32, 32], "spacing_mm": 1.0}
    assert saved["method"] == {}
    with torch.no_grad():
        unet = load_model(tmp_path / "imported" / "checkpoint.pt").unet
        torch.testing.assert_close(unet(volume()), spark.architecture(volume()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("affine", "reason"), [(True, "reconstructions differ"), (False, None)])
def test_norms_before_mask_tokens(tmp_path: Path, affine: bool, reason: str | None) -> None:
    _, rows = imported(spark_file(SparK(affine)), tmp_path)
    found = {key: row for key, row in rows.items() if "densify_norms" in key}
    assert len(found) == (2 * len(FEATURES) if affine else 0)
    assert all(row["action"] == "dropped" and reason is not None and reason in row["reason"] for row in found.values())


def test_norms_that_did_nothing(tmp_path: Path) -> None:
    spark = SparK(affine=True)
    for norm in spark.densify_norms:
        norm.reset_parameters()
    _, rows = imported(spark_file(spark), tmp_path)
    assert all("did nothing" in row["reason"] for key, row in rows.items() if "densify_norms" in key)


def test_mask_tokens_without_densification(tmp_path: Path) -> None:
    content = spark_file(SparK())
    for name in [name for name in content["spark_weights"] if name.startswith("densify_projs")]:
        del content["spark_weights"][name]
    saved, rows = imported(content, tmp_path)
    assert saved["config"]["sparse"]
    assert not saved["config"]["mask_tokens"]
    assert "missing: densify.1.bias" in rows["spark_weights/mask_tokens.0"]["reason"]


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod.architecture."])
def test_dense_checkpoint_and_its_wrappers(tmp_path: Path, wrapper: str) -> None:
    unet = build_unet("tiny")
    stir(unet)
    content = {"network_weights": {f"{wrapper}{name}": value for name, value in unet.state_dict().items()}}
    saved, rows = imported(content, tmp_path)
    assert saved["config"] == {"preset": "tiny", "sparse": False, "mask_tokens": False, "densify": False}
    assert all(torch.equal(saved["network"][name], value) for name, value in unet.state_dict().items())
    assert {row["action"] for row in rows.values()} == {"converted" if wrapper else "used"}
    load_model(tmp_path / "imported" / "checkpoint.pt")


def test_segmentation_network_keeps_its_body(tmp_path: Path) -> None:
    unet = build_unet("tiny", out_channels=3)
    saved, rows = imported({"network_weights": dict(unet.state_dict())}, tmp_path)
    heads = {name for name in unet.state_dict() if "seg_layers" in name}
    assert {key for key, row in rows.items() if row["action"] == "initialised"} == heads
    assert torch.equal(
        saved["network"]["decoder.stages.0.convs.0.conv.bias"], unet.decoder.stages[0].convs[0].conv.bias
    )


def test_other_parts_are_dropped_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet = build_unet("tiny")
    content = {**unet.encoder.state_dict(prefix="encoder."), "projector.weight": torch.ones(3)}
    with caplog.at_level("INFO"):
        _, rows = imported(content, tmp_path)
    assert rows["projector.weight"]["action"] == "dropped"
    assert "projector.weight" in caplog.text
    assert "initialised, the file has no such weight: decoder." in caplog.text
    assert "not resumable" in caplog.text


@pytest.mark.parametrize("format", ["encoder", "unet", "nnunet", "nnssl"])
def test_what_was_exported_comes_back(tmp_path: Path, format: Any) -> None:
    unet = build_unet("tiny")
    stir(unet)
    content = {"network_weights": dict(unet.state_dict()), "nnssl_adaptation_plan": PLAN}
    first, _ = imported(content, tmp_path)
    export(ExportConfig(tmp_path / "imported" / "checkpoint.pt", format, tmp_path / "out.pth"))
    again = tmp_path / "again.pt"
    import_weights(ImportConfig(tmp_path / "out.pth", again))
    second = load_checkpoint(again)
    for name, value in first["network"].items():
        if name.startswith("encoder.") or format != "encoder":
            assert torch.equal(second["network"][name], value)
    assert (second["config"] == first["config"]) == (format == "nnssl")


def test_pickled_objects_need_trust(tmp_path: Path) -> None:
    content = {"network_weights": dict(build_unet("tiny").state_dict()), "logging": np.float64(0.5)}
    with pytest.raises(ValueError, match=r"--trust-pickle reads it, which runs the code"):
        imported(content, tmp_path)
    assert not (tmp_path / "imported").exists()
    _, rows = imported(content, tmp_path, trust_pickle=True)
    assert rows["logging"]["action"] == "dropped"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list; accepted: a checkpoint or a state dict"),
        ({"format_version": 1, "network": {}}, "is a checkpoint of s3d already"),
        ({"model": {"conv.weight": torch.ones(2)}}, r"no weight is named encoder\.\*"),
        ({"network_weights": dict(build_unet("tiny", in_channels=2).state_dict())}, "one input channel"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imported(content, tmp_path)


def test_deeper_network_is_not_taken_for_a_part_of_it(tmp_path: Path) -> None:
    weights = dict(build_unet("tiny").state_dict())
    weights["encoder.stages.3.blocks.0.conv1.conv.weight"] = torch.ones(16, 12, 3, 3, 3)
    with pytest.raises(ValueError, match=r"in a size of s3d \(resenc-l"):
        imported({"network_weights": weights}, tmp_path)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(dict(build_unet("tiny").state_dict()), tmp_path / "file.pth")
    arguments = ["import", str(tmp_path / "file.pth"), "--output", str(tmp_path / "checkpoint.pt")]
    main(arguments)
    load_model(tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "exists" in capsys.readouterr().err
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    for name in ("broken.pth", "absent.pth"):
        with pytest.raises(SystemExit):
            main(["import", str(tmp_path / name), "--output", str(tmp_path / "other.pt")])
        assert name in capsys.readouterr().err
