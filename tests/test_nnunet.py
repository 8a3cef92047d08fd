"""Exported files against nnU-Net itself: its planner's networks, and its own loading of pre-trained weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s3d.checkpoint import save_checkpoint
from s3d.export_weights import ExportConfig, export
from s3d.model import PRESETS, RESENC_PRESETS, build_unet
from s3d.nnssl_plan import adaptation_plan

pytest.importorskip("nnunetv2", reason="nnU-Net is not installed: pip install '.[nnunet]'")

from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

CLASSES = 3


def architecture(preset: str) -> dict[str, Any]:
    """The entry `architecture` of a plan, as nnUNetPlannerResEncL writes it."""
    size = PRESETS[preset]
    stages = len(size.features)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(size.features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[stride] * 3 for stride in size.strides],
            "n_blocks_per_stage": list(size.blocks),
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def nnunet_network(preset: str) -> nn.Module:
    """As nnU-Net builds it for training on one channel: several classes, deep supervision."""
    network: nn.Module = get_network_from_plans(*architecture(preset).values(), 1, CLASSES, deep_supervision=True)
    return network


def exported(folder: Path, format: Any) -> tuple[nn.Module, Path]:
    """A network and the file that s3d export makes of its checkpoint."""
    unet = build_unet("tiny")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = {"preset": "tiny", "patch_size": [32, 32, 32], "spacing_mm": 1.0}
    save_checkpoint(folder / "checkpoint.pt", {"step": 1, "config": config, "network": unet.state_dict()})
    export(ExportConfig(folder / "checkpoint.pt", format, folder / "file.pth"))
    return unet, folder / "file.pth"


def features_before_heads(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of the decoder's stages, lowest resolution first."""
    outputs: list[Tensor] = []
    hooks = [stage.register_forward_hook(lambda *call: outputs.append(call[2])) for stage in network.decoder.stages]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("format", ["nnunet", "nnssl"])
def test_pretrained_weights(tmp_path: Path, format: str) -> None:
    unet, path = exported(tmp_path, format)
    network = nnunet_network("tiny")
    heads = [head.weight.clone() for head in network.decoder.seg_layers]
    load_pretrained_weights(network, str(path), verbose=True)

    x = torch.randn(2, 1, 32, 32, 32)
    ours, theirs = features_before_heads(unet, x), features_before_heads(network, x)
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)

    # Its heads stay its own; with ours in their place all is the same.
    for head, before in zip(network.decoder.seg_layers, heads, strict=True):
        assert torch.equal(head.weight, before)
        assert len(head.weight) == CLASSES
    network.decoder.seg_layers = unet.decoder.seg_layers
    with torch.no_grad():
        torch.testing.assert_close(network(x)[0], unet(x), rtol=0, atol=0)


def test_other_networks_are_refused_by_nnunet(tmp_path: Path) -> None:
    _, path = exported(tmp_path, "nnunet")
    with pytest.raises(AssertionError, match="compatible with your network"):
        load_pretrained_weights(nnunet_network("small"), str(path))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the other architectures that nnU-Net imports on its search
def test_adaptation_plan_makes_the_network(tmp_path: Path) -> None:
    unet, path = exported(tmp_path, "nnssl")
    content = torch.load(path, weights_only=True)
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    # nnU-Net finds the class by the last part of its name, with a warning.
    with pytest.warns(UserWarning, match="Network class ResidualEncoderUNet not found"):
        network = get_network_from_plans(*plan["architecture_plans"].values(), 1, CLASSES, deep_supervision=False)
    assert (network.key_to_stem, network.key_to_encoder) == (plan["key_to_stem"], plan["key_to_encoder"])
    assert list(network.keys_to_in_proj) == plan["keys_to_in_proj"]
    for key in (plan["key_to_stem"], plan["key_to_encoder"]):
        part = {name.removeprefix(f"{key}."): value for name, value in weights.items() if name.startswith(f"{key}.")}
        network.get_submodule(key).load_state_dict(part)
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        for mine, other in zip(unet.encoder(x), network.encoder(x), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_published_network_is_what_nnunet_plans_for_brains() -> None:
    """At 1 mm its planner takes patches of about 160 to 192 voxels, and from these kernels, strides and stages."""
    for side in (160, 192):
        _, strides, kernels, patch_size, _ = get_pool_and_conv_props([1.0, 1.0, 1.0], [side] * 3, 4, 999999)
        planned = architecture("resenc-l")["arch_kwargs"]
        assert [list(map(int, stride)) for stride in strides] == planned["strides"]
        assert [list(map(int, kernel)) for kernel in kernels] == planned["kernel_sizes"]
        assert list(map(int, patch_size)) == [side] * 3


@pytest.mark.parametrize("preset", sorted(RESENC_PRESETS))
def test_networks_of_all_sizes_have_the_same_names_and_shapes(preset: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_unet(preset), nnunet_network(preset)
    shapes = [
        {name: value.shape for name, value in network.state_dict().items() if ".seg_layers." not in name}
        for network in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]


def test_described_and_planned_networks_are_the_same() -> None:
    described = adaptation_plan({"preset": "small", "patch_size": [64] * 3, "spacing_mm": 1.0})["architecture_plans"]
    planned = architecture("small")["arch_kwargs"]
    same_by_default = {"nonlin", "nonlin_kwargs"}  # two paths of one class; 0.01 is its slope
    assert {name: value for name, value in described["arch_kwargs"].items() if name not in same_by_default} == {
        name: value for name, value in planned.items() if name not in same_by_default
    }
