"""MedNeXt: the published size, its halves, and S3D on it equals the dense computation times the mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import oracle
import pytest
import torch
from monai.networks.blocks.mednext_block import MedNeXtBlock, MedNeXtDownBlock
from small_runs import configure
from torch import Tensor, nn

from s3d.checkpoint import load_checkpoint
from s3d.loss import masked_mse
from s3d.model import PRESETS, S3D, build_network, build_unet, preset_shape
from s3d.networks.mednext import mednext
from s3d.pretrain import pretrain
from s3d.segmentation.transfer import transfer
from s3d_kernels import BlockMask, BlockSparseTensor, use_backend


def tiny(*, deep_supervision: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return mednext(1, 2, (4, 6, 8), (1, 2, 1), 5, deep_supervision=deep_supervision)


def test_size_b_has_the_published_number_of_parameters() -> None:
    """11.0 million with kernels of 5^3 (table 1 of the paper)."""
    assert round(sum(p.numel() for p in build_unet("mednext-b").parameters()) / 1e6, 1) == 11.0


def test_stages_expand_as_published() -> None:
    unet = build_unet("mednext-b")
    channels = PRESETS["mednext-b"].features
    inside = [stage[-1].conv2.out_channels for stage in unet.encoder.stages]
    assert inside == [2 * channels[0], 3 * channels[1], *(4 * c for c in channels[2:])]
    assert [stage[-1].conv2.out_channels for stage in unet.decoder.stages] == inside[-2::-1]


def test_halves_fit() -> None:
    network = tiny(deep_supervision=True)
    features = network.encoder(torch.randn(1, 1, 8, 16, 8))
    assert [tuple(f.shape[1:]) for f in features] == [(4, 8, 16, 8), (6, 4, 8, 4), (8, 2, 4, 2)]
    assert [f.shape[1] for f in features] == network.encoder.output_channels
    outputs = network.decoder(features)
    assert [tuple(y.shape[1:]) for y in outputs] == [(2, 8, 16, 8), (2, 4, 8, 4)]
    network.decoder.deep_supervision = False
    assert torch.equal(network.decoder(features), outputs[0])
    assert len(network.decoder.seg_layers) == 2


def test_every_block_has_its_say() -> None:
    network = tiny()
    network(torch.randn(1, 1, 8, 8, 8)).square().mean().backward()
    silent = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    # The head of the lower resolution, and biases in front of a norm of their channel alone.
    assert silent <= {name for name, _ in network.named_parameters() if "seg_layers.0" in name or "conv1.bias" in name}


def test_build_network_passes_on_what_it_is_given() -> None:
    network = build_network(preset_shape("mednext-small"), 2, 3, deep_supervision=True)
    outputs = network(torch.randn(1, 2, 16, 16, 16))
    assert [tuple(y.shape) for y in outputs] == [(1, 3, side, side, side) for side in (16, 8, 4)]


# ---- S3D


def _norm(x: Tensor, mask: Tensor, layer: nn.GroupNorm) -> Tensor:
    return oracle.norm(x, mask, layer.weight, layer.bias, layer.eps, layer.num_groups)


def _conv(x: Tensor, mask: Tensor, layer: nn.Conv3d) -> Tensor:
    return oracle.conv3d(x, mask, layer.weight, layer.bias, layer.stride, layer.padding, layer.groups)  # type: ignore[arg-type]


def dense_encoder(encoder: nn.Module, x: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The features of each stage and their mask, computed densely and multiplied by the mask."""
    x = _conv(x, mask, encoder.stem)
    features = []
    for stage in encoder.stages:
        for block in stage:
            assert isinstance(block, MedNeXtBlock)
            inside = oracle.downsample(mask, (2, 2, 2)) if isinstance(block, MedNeXtDownBlock) else mask
            y = _norm(_conv(x, mask, block.conv1), inside, block.norm)
            y = _conv(nn.functional.gelu(_conv(y, inside, block.conv2)), inside, block.conv3)
            x = y + (_conv(x, mask, block.res_conv) if isinstance(block, MedNeXtDownBlock) else x)
            mask = inside
        features.append((x, mask))
    return features


def dense_s3d(model: S3D, x: Tensor, mask: Tensor) -> Tensor:
    """The reconstruction by section 3 of the S3D paper, written with dense operators."""
    skips = []
    for stage, (features, shown) in enumerate(dense_encoder(model.unet.encoder, x, mask)):
        token = model.mask_tokens[stage].view(1, -1, 1, 1, 1)
        filled = torch.where(shown, oracle.norm(features, shown, None, None, 1e-5, features.shape[1]), token)
        layer = model.densify[stage]
        if stage > 0:
            filled = nn.functional.conv3d(filled, layer.weight, layer.bias, padding=1)
        skips.append(filled)
    return model.unet.decoder(skips)


MASKS = {
    "whole blocks": lambda: BlockMask.random(2, (2, 3, 2), 8, 0.6, torch.Generator().manual_seed(0)),
    "unequal samples": lambda: BlockMask.random(3, (2, 2, 2), 8, (0.2, 0.9), torch.Generator().manual_seed(2)),
    "large blocks": lambda: BlockMask.random(1, (2, 1, 2), 16, 0.6, torch.Generator().manual_seed(3)),
    "one sample without anything": lambda: BlockMask.from_grid(torch.arange(16).view(2, 2, 2, 2) >= 11, 8),
    "voxels": lambda: BlockMask.from_voxels(
        torch.rand(1, 16, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.3, 8
    ),
}


def s3d() -> S3D:
    torch.manual_seed(0)
    model = S3D(mednext(1, 1, (4, 6, 8), (1, 2, 1), 5)).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # so that no weight of a norm is 1 and no bias 0
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


def results(model: S3D, reconstruct: object, x: Tensor, mask: BlockMask) -> dict[str, Tensor]:
    model.zero_grad()
    y = reconstruct(x)  # type: ignore[operator]
    masked_mse(y, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape), mask).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"reconstruction": y.detach(), **gradients}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    # Biases in front of a norm have a zero gradient in exact arithmetic: an absolute floor.
    scale = max(float(values.norm()) for values in expected.values())
    for name, values in expected.items():
        error = float((got[name] - values).norm())
        assert error <= 1e-9 * float(values.norm()) + 1e-11 * scale, (
            f"{name}: {error:.1e} of {float(values.norm()):.1e}"
        )


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
@pytest.mark.parametrize("name", MASKS)
def test_s3d_equals_the_dense_oracle(name: str, backend: str) -> None:
    mask, model = MASKS[name](), s3d()
    x = torch.randn(mask.batch, 1, *mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    shown = mask.to_dense()
    expected = results(model, lambda x: dense_s3d(model, x, shown), x, mask)
    hidden = torch.where(shown, x, float("nan"))  # of which nothing may reach output or gradients
    with use_backend(backend):
        for model.shortcuts in (False, True):
            assert_close(results(model, lambda x: model(x, mask), hidden, mask), expected)


def test_without_sparse_it_is_the_network_on_zero_filled_input() -> None:
    torch.manual_seed(0)
    model = S3D(build_unet("mednext-small"), sparse=False, mask_tokens=False, densify=False)
    mask = MASKS["whole blocks"]()
    x = torch.randn(2, 1, *mask.shape)
    # Memory formats of the two inputs may differ, and with them the order of sums.
    torch.testing.assert_close(model(x, mask), model.unet(torch.where(mask.to_dense(), x, 0)), rtol=1e-5, atol=1e-5)


def test_converted_it_computes_densely_what_it_did() -> None:
    network = build_unet("mednext-small")
    x = torch.randn(1, 1, 16, 16, 8)
    expected = network(x)
    model = S3D(network)
    assert torch.equal(model.unet(x), expected)
    mask = BlockMask.random(1, (2, 2, 1), 8, 0.5)
    assert isinstance(model.unet.encoder(BlockSparseTensor.from_dense(x, mask))[-1], BlockSparseTensor)
    build_unet("mednext-small").load_state_dict(model.unet.state_dict())


def test_a_run_is_handed_over_to_fine_tuning(images: Path, tmp_path: Path) -> None:
    """Encoder and decoder, into a network of two channels."""
    given = configure(images, tmp_path, preset="mednext-small", patch_size=(16, 16, 16), steps=2, validate_every=2)
    trained = load_checkpoint(pretrain(given).checkpoint)
    network = build_unet("mednext-small", in_channels=2)
    rows = [row for row in transfer(network, trained, "encoder+decoder") if row.target_shape is not None]
    assert {row.name for row in rows if row.action == "adapted"} == {"encoder.stem.weight"}
    assert all(row.name.startswith("decoder.seg_layers.") for row in rows if row.action == "initialised")
    weights = network.state_dict()
    loaded = [row.name for row in rows if row.action == "loaded"]
    assert len(loaded) > 100
    assert all(torch.equal(weights[name], trained["network"][name]) for name in loaded)


def test_a_few_steps_of_pretraining() -> None:
    """The reconstruction of waves from a third of their blocks gets better."""
    torch.manual_seed(0)
    model = S3D(build_unet("mednext-small"))
    model.unet.decoder.seg_layers[:-1].requires_grad_(False)
    axis = torch.linspace(0, 9, 24).sin()
    x = (axis.view(-1, 1, 1) + axis.view(1, -1, 1) + axis.view(1, 1, -1))[None, None]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(12):
        mask = BlockMask.random(1, 3, 8, 0.6, torch.Generator().manual_seed(step))
        loss = masked_mse(model(x, mask, masked_only=True), x, mask)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert mean(losses[-3:]) < 0.7 * mean(losses[:3])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
