"""s3d export: files that plain PyTorch, nnU-Net and the fine-tuning of nnssl checkpoints load."""

import pydoc
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

from s3d.checkpoint import load_checkpoint, save_checkpoint
from s3d.cli import main
from s3d.export_weights import FORMATS, ExportConfig, export
from s3d.model import PRESETS, RESENC_PRESETS, S3D, build_unet
from s3d.nnssl_plan import adaptation_plan
from s3d.pretrain import load_model

CONFIG = {
    "preset": "tiny",
    "sparse": True,
    "mask_tokens": True,
    "densify": True,
    "patch_size": [32, 32, 32],
    "mask_block": 8,
    "spacing_mm": 1.0,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As s3d pretrain writes it, with weights that are all different, and an average of them."""
    torch.manual_seed(0)
    model = S3D(build_unet("tiny"))
    states = []
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    networks = [
        {name.removeprefix("unet."): value for name, value in state.items() if name.startswith("unet.")}
        for state in states
    ]
    method = {name: value for name, value in states[0].items() if not name.startswith("unet.")}
    path = tmp_path / "run" / "checkpoint.pt"
    content = {"step": 7, "config": CONFIG, "network": networks[0], "method": method, "ema": networks[1]}
    save_checkpoint(path, content)
    return path


def exported(checkpoint: Path, format: Any, **options: Any) -> Any:
    path = checkpoint.with_name(f"{format}.pth")
    export(ExportConfig(checkpoint, format, path, **options))
    return torch.load(path, weights_only=True)


def volume() -> torch.Tensor:
    return torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))


def plain_parts(content: Any) -> bool:
    """Whether content is made of tensors on the CPU and plain types."""
    if type(content) is dict:
        return all(type(key) is str and plain_parts(value) for key, value in content.items())
    if type(content) is list:
        return all(map(plain_parts, content))
    if isinstance(content, torch.Tensor):
        return content.device.type == "cpu" and not content.requires_grad
    return content is None or type(content) in (str, int, float, bool)


@pytest.mark.parametrize("format", FORMATS)
def test_files_hold_plain_types_and_each_weight_once(checkpoint: Path, format: str) -> None:
    assert plain_parts(exported(checkpoint, format))
    weights = sum(parameter.numel() for parameter in build_unet("tiny").parameters())
    entries = len(build_unet("tiny").state_dict())
    size = checkpoint.with_name(f"{format}.pth").stat().st_size
    assert size < 4 * weights + 600 * entries, "tied modules are stored twice"


def test_unet_loads_strictly_and_computes_the_same(checkpoint: Path) -> None:
    unet = build_unet("tiny")
    unet.load_state_dict(exported(checkpoint, "unet"))
    with torch.no_grad():
        torch.testing.assert_close(unet(volume()), load_model(checkpoint).unet(volume()))


def test_encoder_loads_strictly_and_computes_the_same(checkpoint: Path) -> None:
    unet = build_unet("tiny")
    unet.encoder.load_state_dict(exported(checkpoint, "encoder"))
    with torch.no_grad():
        for ours, theirs in zip(load_model(checkpoint).unet.encoder(volume()), unet.encoder(volume()), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("format", ["nnunet", "nnssl"])
def test_network_weights_have_every_name_of_the_plain_network(checkpoint: Path, format: str) -> None:
    weights = exported(checkpoint, format)["network_weights"]
    assert list(weights) == list(build_unet("tiny").state_dict())
    names = ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0")
    for name in [*names, *(f"decoder.{name}" for name in names)]:
        torch.testing.assert_close(
            weights[f"{name}.weight"], load_checkpoint(checkpoint)["network"][f"{names[0]}.weight"], rtol=0, atol=0
        )


def test_nnunet_holds_weights_only(checkpoint: Path) -> None:
    assert set(exported(checkpoint, "nnunet")) == {"network_weights"}


def test_plan_of_the_published_network() -> None:
    plan = adaptation_plan({"preset": "resenc-l", "patch_size": [160, 160, 160], "spacing_mm": 1.0})
    configuration = plan["pretrain_plan"]["configurations"].pop("onemmiso")
    assert plan == {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {
            "dataset_name": "s3d",
            "plans_name": "s3d",
            "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
            "image_reader_writer": "NibabelIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {},
            "experiment_planner_used": "s3d",
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [160, 160, 160],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }
    # The fields of nnssl's ConfigurationPlan: its constructor takes these and no others.
    assert set(configuration) == {
        "data_identifier",
        "preprocessor_name",
        "spacing_style",
        "normalization_schemes",
        "use_mask_for_norm",
        "resampling_fn_data",
        "resampling_fn_data_kwargs",
        "resampling_fn_mask",
        "resampling_fn_mask_kwargs",
        "spacing",
        "patch_size",
    }
    assert configuration["spacing"] == [1.0, 1.0, 1.0]
    assert configuration["patch_size"] == [160, 160, 160]


def test_resenc_l_means_the_same_network_as_there() -> None:
    # nnssl and nnU-Net write these numbers into their code under the name ResEncL.
    size = PRESETS["resenc-l"]
    assert size.features == (32, 64, 128, 256, 320, 320)
    assert size.blocks == (1, 3, 4, 6, 6, 6)
    assert size.strides == (1, 2, 2, 2, 2, 2)
    assert size.kernel_size == 3


@pytest.mark.parametrize("preset", sorted({*RESENC_PRESETS} - {"resenc-l"}))
def test_other_sizes_are_described_by_their_arguments(preset: str) -> None:
    plan = adaptation_plan({"preset": preset, "patch_size": [64, 64, 64], "spacing_mm": 1.0})["architecture_plans"]
    assert plan["arch_class_name"] == "ResidualEncoderUNet"
    # The fields of nnssl's DynamicArchitecturePlans.
    assert set(plan["arch_kwargs"]) == {
        "n_stages",
        "features_per_stage",
        "conv_op",
        "kernel_sizes",
        "strides",
        "n_blocks_per_stage",
        "n_conv_per_stage_decoder",
        "conv_bias",
        "norm_op",
        "norm_op_kwargs",
        "dropout_op",
        "dropout_op_kwargs",
        "nonlin",
        "nonlin_kwargs",
    }
    arguments = dict(plan["arch_kwargs"])
    for name in plan["arch_kwargs_requiring_import"]:
        arguments[name] = pydoc.locate(arguments[name])
    with torch.device("meta"):
        theirs = ResidualEncoderUNet(input_channels=1, num_classes=1, deep_supervision=False, **arguments)
        ours = build_unet(preset)
    assert str(theirs) == str(ours)


def test_other_voxel_sizes_are_not_called_one_millimetre() -> None:
    plan = adaptation_plan({"preset": "tiny", "patch_size": [32, 32, 32], "spacing_mm": 1.5})
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["spacing"] == [1.5, 1.5, 1.5]
    assert "onemm" not in str(plan)


def test_stem_and_stages_load_as_the_fine_tuning_does_it(checkpoint: Path) -> None:
    content = exported(checkpoint, "nnssl")
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    unet = build_unet("tiny", out_channels=3)
    for key in (plan["key_to_stem"], plan["key_to_encoder"]):
        part = {name.removeprefix(f"{key}."): value for name, value in weights.items() if name.startswith(f"{key}.")}
        unet.get_submodule(key).load_state_dict(part)
    for name in plan["keys_to_in_proj"]:
        assert weights[f"{name}.weight"].shape[1] == plan["pretrain_num_input_channels"] == 1
    with torch.no_grad():
        for ours, theirs in zip(load_model(checkpoint).unet.encoder(volume()), unet.encoder(volume()), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert {"type", "name", "apa_citations"} == set(content["citations"][0])
    assert content["trainer_name"] == "S3D"


def test_averaged_weights(checkpoint: Path) -> None:
    saved = load_checkpoint(checkpoint)
    exports = exported(checkpoint, "unet", weights="ema")
    assert all(torch.equal(exports[name], value) for name, value in saved["ema"].items())
    assert not torch.equal(exports["decoder.seg_layers.1.weight"], saved["network"]["decoder.seg_layers.1.weight"])


def test_averaged_weights_that_are_not_there(checkpoint: Path) -> None:
    saved = load_checkpoint(checkpoint)
    del saved["ema"], saved["format_version"]
    save_checkpoint(checkpoint, saved)
    with pytest.raises(ValueError, match=r"weights ema: the checkpoint has none.*accepted: raw"):
        exported(checkpoint, "unet", weights="ema")


def test_existing_files_stay(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=r"output .* exists"):
        export(ExportConfig(checkpoint, "unet", checkpoint))
    assert checkpoint.read_bytes() == before


def test_plan_of_a_checkpoint_that_does_not_tell_its_patch_size(checkpoint: Path) -> None:
    saved = load_checkpoint(checkpoint)
    del saved["config"]["patch_size"], saved["format_version"]
    save_checkpoint(checkpoint, saved)
    with pytest.raises(ValueError, match="needs patch_size, which the checkpoint does not tell"):
        exported(checkpoint, "nnssl")


def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(checkpoint), "--format", "nnssl", "--output", str(tmp_path / "new" / "s3d.pth")]
    main(arguments)
    assert "nnssl_adaptation_plan" in torch.load(tmp_path / "new" / "s3d.pth", weights_only=True)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint), "--format", "onnx", "--output", str(tmp_path / "x")])
    assert "nnssl" in capsys.readouterr().err


def test_a_decoder_that_was_not_trained_is_named(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({**saved, "trained": "encoder"}, tmp_path / "encoder.pt")
    exported(tmp_path / "encoder.pt", "encoder")
    assert "first weights" not in caplog.text
    exported(tmp_path / "encoder.pt", "nnunet")
    assert "trained the encoder alone" in caplog.text
