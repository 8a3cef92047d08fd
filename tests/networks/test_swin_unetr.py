"""Swin UNETR in two halves against MONAI's own."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from monai.networks.nets import SwinUNETR

from s3d.model import build_network, build_unet, preset_shape
from s3d.networks import swin_unetr
from s3d.segmentation.transfer import transfer

# Of MONAI's network, in the order of `SwinDecoder.skips`; it has nothing for the last resolution but one.
SKIPS = {0: "encoder1", 1: "encoder2", 2: "encoder3", 3: "encoder4", 5: "encoder10"}


def monai_name(name: str) -> str | None:
    """The same parameter in MONAI's network; None: of a head of deep supervision."""
    name = name.replace("encoder.stem.", "swinViT.patch_embed.")
    name = re.sub(r"^encoder\.stages\.(\d)", lambda found: f"swinViT.layers{int(found[1]) + 1}.0", name)
    name = re.sub(r"^decoder\.skips\.(\d)", lambda found: SKIPS[int(found[1])], name)
    name = re.sub(r"^decoder\.stages\.(\d)", lambda found: f"decoder{5 - int(found[1])}", name)
    if name.startswith("decoder.seg_layers."):
        return name.replace("decoder.seg_layers.4", "out") if ".4." in name else None
    return name


def test_full_depth_equals_monai(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # A quarter of the width, with as many heads as MONAI's has.
    monkeypatch.setattr(swin_unetr, "HEAD_CHANNELS", 4)
    published = preset_shape("swin-unetr")
    ours = build_network(replace(published, features=tuple(width // 4 for width in published.features)), 2, 3)
    theirs = SwinUNETR(in_channels=2, out_channels=3, feature_size=12)
    state = {monai_name(name): value for name, value in ours.state_dict().items()}
    state.pop(None)
    assert set(state) == set(theirs.state_dict())
    theirs.load_state_dict(state)
    x = torch.randn(1, 2, 64, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = build_unet("swin-unetr", 1, 14)
    unused = sum(parameter.numel() for parameter in network.decoder.seg_layers[:-1].parameters())
    # Of MONAI's SwinUNETR(in_channels=1, out_channels=14, feature_size=48).
    assert sum(parameter.numel() for parameter in network.parameters()) - unused == 62_187_296


def test_halves() -> None:
    network = build_network(preset_shape("swin-unetr-small"), 2, 3, deep_supervision=True)
    x = torch.randn(1, 2, 16, 24, 32)
    features = network.encoder(x)
    assert [feature.shape[1] for feature in features] == list(network.encoder.output_channels)
    assert [tuple(feature.shape[2:]) for feature in features] == [(16, 24, 32), (8, 12, 16), (4, 6, 8), (2, 3, 4)]
    outputs = network(x)
    assert [tuple(output.shape[1:]) for output in outputs] == [(3, 16, 24, 32), (3, 8, 12, 16), (3, 4, 6, 8)]
    assert len(network.decoder.seg_layers) == 3
    network.decoder.deep_supervision = False
    assert torch.equal(network(x), outputs[0])


def test_all_of_the_encoder_makes_its_deepest_features() -> None:
    encoder = build_unet("swin-unetr-small").encoder
    # Its squared mean is the same whatever the weights: it is normalised.
    encoder(torch.randn(1, 1, 16, 16, 24))[-1].pow(3).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_transfer_to_several_channels_keeps_the_features() -> None:
    torch.manual_seed(0)
    old = build_unet("swin-unetr-small")
    saved = {"config": {"preset": "swin-unetr-small"}, "network": old.state_dict(), "method": {}}
    new = build_unet("swin-unetr-small", 2, 3)
    rows = transfer(new, saved, "encoder+decoder")
    adapted = {row.name for row in rows if row.action == "adapted"}
    block = "decoder.skips.0.layer"
    assert adapted == {"encoder.stem.proj.weight", *(f"{block}.{name}.conv.weight" for name in ("conv1", "conv3"))}
    new.decoder.seg_layers = old.decoder.seg_layers  # heads start anew
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(new(x.expand(-1, 2, -1, -1, -1)), old(x), rtol=1e-4, atol=1e-4)


def test_odd_sides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 8, .* got \(16, 20, 16\)"):
        build_unet("swin-unetr-small")(torch.zeros(1, 1, 16, 20, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": (16, 32, 64, 128)}, "features"),
        ({"features": (24, 24, 48, 96)}, "multiple of 16"),
        ({"blocks": (1, 2, 2, 0)}, "blocks"),
        ({"blocks": (0, 2, 0, 0)}, "blocks"),
        ({"blocks": (0, 2, 0)}, "one length"),
        ({"strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))}, "strides"),
    ],
)
def test_impossible_shapes_are_refused(change: dict, message: str) -> None:
    shape = preset_shape("swin-unetr-small")
    with pytest.raises(ValueError, match=message):
        build_network(replace(shape, **change), 1, 1)
