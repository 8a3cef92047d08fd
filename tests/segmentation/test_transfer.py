"""Transfer into a segmentation network: features stay what they were, and every tensor has its row."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from small_runs import configure, write_images
from torch import Tensor, nn

from s3d.checkpoint import load_checkpoint
from s3d.export_weights import ExportConfig, export
from s3d.import_weights import ImportConfig, import_weights
from s3d.model import S3D, NetworkShape, build_network, build_unet, preset_shape
from s3d.pretrain import pretrain
from s3d.segmentation.plan import Normalization, SegmentationPlan
from s3d.segmentation.transfer import TensorRow, transfer, transfer_summary, write_transfer_table

TINY = preset_shape("tiny")
STEM = "encoder.stem.convs.0.all_modules.0.weight"
# One kernel flat in all stages; other strides than the preset's; a stage less.
FLAT = dataclasses.replace(TINY, kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)))
THIN = dataclasses.replace(TINY, kernel_sizes=((1, 3, 3),) * 3)
STRIDES = dataclasses.replace(TINY, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)))
SHALLOW = NetworkShape(*(values[:2] for values in dataclasses.astuple(TINY)))  # type: ignore[arg-type]


def stirred(network: nn.Module, seed: int = 3) -> Any:
    """With weights that all differ, those of norms and biases too, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def pretrained(network: ResidualEncoderUNet | None = None, preset: str = "tiny") -> dict[str, Any]:
    """What matters in a checkpoint of s3d pretrain."""
    model = stirred(S3D(build_unet(preset) if network is None else network))
    state = model.state_dict()
    return {
        "step": 7,
        "config": {"preset": preset},
        "network": {name.removeprefix("unet."): value for name, value in state.items() if name.startswith("unet.")},
        "method": {name: value for name, value in state.items() if not name.startswith("unet.")},
    }


def finetuned(shape: NetworkShape, channels: int = 1) -> tuple[ResidualEncoderUNet, dict[str, Any]]:
    """A segmentation network of its own plan, and its checkpoint."""
    plan = SegmentationPlan(
        dataset="Dataset001_Test",
        channel_names=tuple(f"channel {number}" for number in range(channels)),
        class_names=("background", "organ"),
        file_ending=".nii.gz",
        kind="fixed",
        spacing_mm=(1.0, 1.0, 1.0),
        patch_size=(16, 16, 16),
        normalization=(Normalization("zscore"),) * channels,
        network=shape,
    )
    network = stirred(plan.build_network())
    return network, {"step": 7, "config": {}, "plan": plan.plain(), "network": dict(network.state_dict())}


def periodic(network: ResidualEncoderUNet) -> ResidualEncoderUNet:
    """Without borders, so that what is constant along an axis stays so."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d) and any(module.padding):
            module.padding_mode = "circular"
    return network


def image(channels: int = 1) -> Tensor:
    return torch.randn(1, channels, 16, 16, 16, generator=torch.Generator().manual_seed(1))


def features(network: ResidualEncoderUNet, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(network.encoder(x))


def last_features(network: ResidualEncoderUNet, x: Tensor) -> Tensor:
    """What the decoder gives to the last head."""
    kept: list[Tensor] = []
    handle = network.decoder.stages[-1].register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.no_grad():
        network(x)
    handle.remove()
    return kept[0]


def assert_accounted(rows: list[TensorRow], network: ResidualEncoderUNet, saved: dict[str, Any]) -> None:
    """Every parameter of the network has one row, every tensor of the checkpoint too; ties count once."""
    targets = [row.name for row in rows if row.target_shape is not None]
    parameters = dict(network.named_parameters(remove_duplicate=False))
    assert len({id(parameters[name]) for name in targets}) == len(targets) == len(list(network.parameters()))
    assert [row.target_shape for row in rows if row.target_shape] == [parameters[name].shape for name in targets]
    sources = [row.source for row in rows if row.source_shape is not None]
    tensors = {**saved["network"], **saved.get("method", {})}
    memory = {tensor.data_ptr() for tensor in tensors.values()}
    assert {tensors[name].data_ptr() for name in sources} == memory
    assert len(sources) == len(memory)
    for row in rows:
        assert (row.source == "") == (row.action == "initialised") == (row.source_shape is None)
        assert (row.action == "dropped") == (row.target_shape is None)
        assert (row.reason == "") == (row.action == "loaded")


def test_encoder_and_decoder_compute_the_same(tmp_path: Path) -> None:
    """Of a real checkpoint; heads and what belongs to the method are not taken."""
    write_images(tmp_path)
    pretrain(configure(tmp_path, tmp_path / "run", steps=2, ema_decay=0.5))
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    old = build_unet("tiny")
    for weights in ("raw", "ema"):
        network = build_network(TINY, 1, 3, deep_supervision=True)
        heads = [head.weight.clone() for head in network.decoder.seg_layers]
        old.load_state_dict(saved[{"raw": "network", "ema": "ema"}[weights]])
        rows = transfer(network, saved, "encoder+decoder", weights)  # type: ignore[arg-type]
        assert torch.equal(last_features(network, image()), last_features(old, image()))
        assert all(torch.equal(head.weight, kept) for head, kept in zip(network.decoder.seg_layers, heads))
    assert not torch.equal(saved["network"][STEM], saved["ema"][STEM])

    network = build_network(TINY, 1, 3)
    rows = transfer(network, saved, "encoder+decoder")
    assert_accounted(rows, network, saved)
    others = {row.source or row.name: (row.action, row.reason) for row in rows if row.action != "loaded"}
    names = [f"decoder.seg_layers.{level}.{kind}" for level in range(2) for kind in ("weight", "bias")]
    assert all(others.pop(name) == ("dropped", "heads start anew") for name in names)
    assert others.keys() == saved["method"].keys()
    assert set(others.values()) == {("dropped", "of the pre-training only")}
    assert [row.name for row in rows if row.action == "initialised"] == names
    loaded = len(list(old.parameters())) - 4
    assert transfer_summary(rows) == f"{loaded} loaded, 0 adapted, 4 initialised, {4 + len(saved['method'])} dropped"


def test_scope_encoder_leaves_the_decoder_at_init() -> None:
    saved = pretrained()
    network = build_network(TINY, 1, 2)
    before = {name: value.clone() for name, value in network.decoder.named_parameters()}
    rows = transfer(network, saved, "encoder")
    assert_accounted(rows, network, saved)
    for name, value in network.encoder.state_dict().items():
        assert torch.equal(value, saved["network"][f"encoder.{name}"])
    for row in rows:
        if row.name.startswith("decoder.") and "seg_layers" not in row.name:
            assert row.reason == "scope encoder"
            assert row.action in ("initialised", "dropped")
    for name, value in network.decoder.named_parameters():
        assert name.startswith("encoder.") or torch.equal(value, before[name])


@pytest.mark.parametrize(("old_channels", "channels"), [(1, 4), (3, 2), (2, 1)])
def test_the_stem_sees_the_same_in_other_numbers_of_channels(old_channels: int, channels: int) -> None:
    old, saved = finetuned(TINY, old_channels)
    network = build_network(TINY, channels, 2)
    rows = transfer(network, saved, "encoder+decoder")
    assert_accounted(rows, network, saved)
    assert [(row.name, row.reason) for row in rows if row.action == "adapted"] == [
        (STEM, f"input channels {old_channels} -> {channels}: repeated and scaled")
    ]
    same = image()
    before = features(old, same.expand(-1, old_channels, -1, -1, -1))
    after = features(network, same.expand(-1, channels, -1, -1, -1))
    for stage_before, stage_after in zip(before, after, strict=True):
        torch.testing.assert_close(stage_after, stage_before, rtol=1e-4, atol=1e-4)


def test_flat_kernels_see_the_same_in_a_volume_that_is_constant_along_the_axis() -> None:
    old, saved = finetuned(TINY)
    network = periodic(build_network(THIN, 1, 2))
    rows = transfer(network, saved, "encoder+decoder")
    assert_accounted(rows, network, saved)
    adapted = [row for row in rows if row.action == "adapted"]
    assert {row.reason for row in adapted} == {"kernel 3 x 3 x 3 -> 1 x 3 x 3: summed or centred along these axes"}
    # The stem, two convolutions in each of three stages, one in each of two stages of the decoder.
    assert len(adapted) == 1 + 6 + 2
    constant = image()[:, :, :1].expand(-1, -1, 16, -1, -1)
    for before, after in zip(features(periodic(old), constant), features(network, constant), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(features(network, image())[0], features(old, image())[0], atol=1e-2)


def test_thicker_kernels_compute_the_same_in_any_volume() -> None:
    for shape in (FLAT, THIN):
        old, saved = finetuned(shape)
        network = build_network(TINY, 1, 2)
        assert_accounted(transfer(network, saved, "encoder+decoder"), network, saved)
        torch.testing.assert_close(last_features(network, image()), last_features(old, image()), rtol=1e-4, atol=1e-4)


def test_channels_and_kernel_at_once() -> None:
    saved = pretrained()
    network = build_network(FLAT, 2, 2)
    rows = transfer(network, saved, "encoder+decoder")
    assert_accounted(rows, network, saved)
    stem = saved["network"][STEM].sum(dim=2, keepdim=True) / 2
    torch.testing.assert_close(network.get_parameter(STEM).data, torch.cat([stem, stem], dim=1))
    assert "1 input channels 1 -> 2: repeated and scaled; kernel 3 x 3 x 3 -> 1 x 3 x 3" in transfer_summary(rows)


@pytest.mark.parametrize("flatter", [True, False])
def test_other_strides(flatter: bool) -> None:
    """A stage without the stride loses the pooling of its skip connection; upsampling is averaged or repeated."""
    shapes = (TINY, STRIDES) if flatter else (STRIDES, TINY)
    old, saved = finetuned(shapes[0])
    network = build_network(shapes[1], 1, 2)
    rows = transfer(network, saved, "encoder+decoder")
    assert_accounted(rows, network, saved)
    for name, value in network.encoder.state_dict().items():
        assert torch.equal(value, saved["network"][f"encoder.{name}"])
    adapted = [row.name for row in rows if row.action == "adapted"]
    assert adapted == ["decoder.transpconvs.1.weight"]
    x = torch.randn(1, 8, 4, 4, 4)
    with torch.no_grad():
        before, after = old.decoder.transpconvs[1](x), network.decoder.transpconvs[1](x)
    fine, coarse = (before, after) if flatter else (after, before)
    torch.testing.assert_close(nn.functional.avg_pool3d(fine, (2, 1, 1)), coarse)
    if not flatter:
        torch.testing.assert_close(fine, coarse.repeat_interleave(2, dim=2))


def test_a_skip_projection_finds_its_place_behind_a_pooling_that_is_gone() -> None:
    flat = dataclasses.replace(TINY, strides=((1, 1, 1), (1, 1, 1), (2, 2, 2)))
    _, saved = finetuned(TINY)
    network = build_network(flat, 1, 2)
    rows = {row.name: row for row in transfer(network, saved, "encoder")}
    moved = rows["encoder.stages.1.blocks.0.skip.0.all_modules.0.weight"]
    assert (moved.action, moved.source) == ("loaded", "encoder.stages.1.blocks.0.skip.1.all_modules.0.weight")
    assert torch.equal(network.get_parameter(moved.name), saved["network"][moved.source])


def test_fewer_and_more_stages_share_what_both_have() -> None:
    _, saved = finetuned(TINY)
    shallow = build_network(SHALLOW, 1, 2)
    rows = transfer(shallow, saved, "encoder+decoder")
    assert_accounted(rows, shallow, saved)
    # The stage of the decoder at full resolution has another number.
    source = "decoder.stages.1.convs.0.all_modules.0.weight"
    assert torch.equal(shallow.decoder.stages[0].convs[0].conv.weight, saved["network"][source])
    dropped = {row.source for row in rows if row.reason == "the new network has 2 stages"}
    assert {"encoder.stages.2.blocks.0.conv1.all_modules.0.weight", "decoder.transpconvs.0.weight"} <= dropped

    _, saved = finetuned(SHALLOW)
    deep = build_network(TINY, 1, 2)
    rows = transfer(deep, saved, "encoder+decoder")
    assert_accounted(rows, deep, saved)
    initialised = {row.name for row in rows if row.reason == "the network of the checkpoint has 2 stages"}
    assert {"encoder.stages.2.blocks.0.conv1.all_modules.0.weight", "decoder.transpconvs.0.weight"} <= initialised
    assert not any(name.startswith(("encoder.stages.1", "decoder.stages.1")) for name in initialised)


def test_another_architecture_is_refused_and_changes_nothing() -> None:
    wider = dataclasses.replace(TINY, features=(4, 8, 16))
    longer = dataclasses.replace(TINY, blocks=(1, 2, 1))
    larger = dataclasses.replace(TINY, kernel_sizes=((3, 3, 3), (3, 3, 3), (5, 5, 5)))
    cases: list[tuple[NetworkShape, dict[str, Any], str]] = [
        (
            preset_shape("small"),
            pretrained(),
            rf"run.pt \(preset tiny\) is of another architecture: {STEM} is 4 x 1 x 3 x 3 x 3 there and "
            "8 x 1 x 3 x 3 x 3 in the network to train; take --preset tiny, or a checkpoint of the preset to train",
        ),
        (TINY, pretrained(preset="small"), "preset small"),
        (wider, pretrained(), r"stages\.2\.\S+ is 12 x 8 x 3 x 3 x 3 there and 16 x 8 x 3 x 3 x 3"),
        (larger, pretrained(), r"stages\.2\.\S+ is 12 x 8 x 3 x 3 x 3 there and 12 x 8 x 5 x 5 x 5"),
        (longer, pretrained(), r"encoder.stages.1.blocks.1.conv1.\S+ is not in it"),
        (TINY, finetuned(longer)[1], r"fine-tuned on Dataset001_Test\).* to train has no encoder.stages.1.blocks.1"),
    ]
    for shape, saved, message in cases:
        network = build_network(shape, 1, 2)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            transfer(network, saved, "encoder+decoder", checkpoint="run.pt")
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_average_that_the_run_did_not_keep_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights ema: run.pt has none, .* accepted: raw"):
        transfer(build_network(TINY, 1, 2), pretrained(), "encoder", "ema", checkpoint="run.pt")


def test_an_imported_encoder_says_that_there_was_no_decoder(tmp_path: Path) -> None:
    write_images(tmp_path)
    pretrain(configure(tmp_path, tmp_path / "run", steps=2))
    export(ExportConfig(tmp_path / "run" / "checkpoint.pt", "encoder", tmp_path / "encoder.pth"))
    import_weights(ImportConfig(tmp_path / "encoder.pth", tmp_path / "imported.pt"))
    saved = load_checkpoint(tmp_path / "imported.pt")
    network = build_network(TINY, 1, 2)
    rows = transfer(network, saved, "encoder+decoder")
    assert_accounted(rows, network, saved)
    trained = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["network"]
    for name, value in network.encoder.state_dict().items():
        assert torch.equal(value, trained[f"encoder.{name}"])
    for row in rows:
        if row.name.startswith("decoder.") and "seg_layers" not in row.name:
            assert row.action in ("initialised", "dropped")
            assert row.reason == "the imported file had no such weight"


def test_the_table(tmp_path: Path) -> None:
    network = build_network(FLAT, 1, 2)
    rows = transfer(network, pretrained(), "encoder")
    write_transfer_table(rows, tmp_path / "transfer.csv")
    with open(tmp_path / "transfer.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [row.name for row in rows]
    assert table[0] == {
        "name": STEM,
        "action": "adapted",
        "source": STEM,
        "source_shape": "4 x 1 x 3 x 3 x 3",
        "target_shape": "4 x 1 x 1 x 3 x 3",
        "reason": "kernel 3 x 3 x 3 -> 1 x 3 x 3: summed or centred along these axes",
    }
