"""ConvNeXt V2: its two normalisations by hand, its halves, and sparse equals dense computation times the mask."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor, nn

from s3d.loss import masked_mse
from s3d.model import PRESETS, S3D, NetworkShape, build_network, build_unet
from s3d.networks.convnext import EPS, ChannelLayerNorm, ConvNeXtBlock, GlobalResponseNorm
from s3d_kernels import BlockMask, BlockSparseTensor, to_sparse, use_backend

# ---- normalisations by hand


def test_layer_norm_is_of_the_channels_of_each_voxel() -> None:
    norm = ChannelLayerNorm(2)
    x = torch.tensor([[3.0, 10.0], [5.0, 40.0]]).view(1, 2, 1, 1, 2)  # voxels (3, 5) and (10, 40)
    expected = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).view(1, 2, 1, 1, 2)
    torch.testing.assert_close(norm(x), expected)
    everything = BlockMask.from_grid(torch.ones(1, 1, 1, 1, dtype=torch.bool), (1, 1, 2))
    torch.testing.assert_close(norm(BlockSparseTensor.from_dense(x, everything)).to_dense(), expected)


def response_norm(gamma: list[float], beta: list[float]) -> GlobalResponseNorm:
    norm = GlobalResponseNorm(2)
    with torch.no_grad():
        norm.gamma.copy_(torch.tensor(gamma))
        norm.beta.copy_(torch.tensor(beta))
    return norm


def test_response_norm_by_hand() -> None:
    """Channels with norms 5 and 15: responses 1/2 and 3/2 of their mean."""
    norm = response_norm([2.0, 4.0], [0.5, -1.0])
    x = torch.tensor([[3.0, 4.0], [0.0, -15.0]]).view(1, 2, 1, 1, 2)
    expected = torch.tensor([[3 * 2 + 0.5, 4 * 2 + 0.5], [-1.0, -15 * 7 - 1]]).view(1, 2, 1, 1, 2)
    torch.testing.assert_close(norm(x), expected)


def test_response_norm_is_of_the_visible_voxels_of_each_sample() -> None:
    """Three samples: both voxels visible, the first one, none. What is masked says nothing."""
    norm = response_norm([2.0, 4.0], [0.5, -1.0])
    visible = torch.tensor([[True, True], [True, False], [False, False]]).view(3, 1, 1, 2)
    x = torch.tensor([[[3.0, 4.0], [0.0, 15.0]], [[1.0, 99.0], [3.0, 99.0]], [[99.0, 99.0], [99.0, 99.0]]])
    y = norm(BlockSparseTensor.from_dense(x.view(3, 2, 1, 1, 2), BlockMask.from_voxels(visible, (1, 1, 2)))).to_dense()
    expected = torch.tensor(
        [
            [[3 * 2 + 0.5, 4 * 2 + 0.5], [-1.0, 15 * 7 - 1]],
            [[1 * 2 + 0.5, 0.0], [3 * 7 - 1, 0.0]],  # norms 1 and 3: responses 1/2 and 3/2 again
            [[0.0, 0.0], [0.0, 0.0]],
        ]
    )
    torch.testing.assert_close(y.view(3, 2, 2), expected)


def test_response_norm_begins_as_identity() -> None:
    x = torch.randn(2, 3, 2, 2, 2)
    assert torch.equal(GlobalResponseNorm(3)(x), x)


def test_a_sample_without_visible_voxels_or_of_zeros_has_gradients() -> None:
    mask = BlockMask.from_grid(torch.tensor([True, True, False]).view(3, 1, 1, 1), 2)
    x = torch.randn(3, 2, 2, 2, 2)
    x[0] = 0
    x.requires_grad_()
    norm = response_norm([1.0, 1.0], [0.0, 0.0])
    norm(BlockSparseTensor.from_dense(x, mask)).to_dense().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert norm.gamma.grad is not None
    assert norm.gamma.grad.isfinite().all()
    x.grad = None
    norm(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("layer", [ChannelLayerNorm, GlobalResponseNorm])
def test_gradients_of_the_norms(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    norm = layer(3).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    visible = torch.rand(2, 4, 2, 2) < 0.6
    x = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, requires_grad=True)

    def sparse(x: Tensor, *parameters: Tensor) -> Tensor:
        return norm(BlockSparseTensor.from_dense(x, BlockMask.from_voxels(visible, 2))).to_dense()

    assert torch.autograd.gradcheck(sparse, (x, *norm.parameters()))


@pytest.mark.parametrize("layer", [ChannelLayerNorm, GlobalResponseNorm])
def test_what_lies_at_masked_voxels_of_stored_blocks_reaches_no_gradient(layer: type[nn.Module]) -> None:
    """Neither what the blocks hold there nor what their gradients do."""
    torch.manual_seed(0)
    mask = BlockMask.from_voxels(torch.rand(2, 4, 4, 4) < 0.5, 4)
    assert mask.voxels is not None
    shown = mask.voxels[..., None]
    values, gradient = torch.randn(2, 2, 4, 4, 4, 3)
    found = []
    for hidden in (0.0, float("nan")):
        norm = layer(3)
        blocks = torch.where(shown, values, hidden).requires_grad_()
        y = norm(BlockSparseTensor(blocks, mask)).blocks
        y.backward(torch.where(shown, gradient, 0.0 if hidden == 0 else 7.0))
        assert blocks.grad is not None
        found.append([torch.where(shown, t, 0) for t in (y.detach(), blocks.grad)])
        found[-1] += [p.grad for p in norm.parameters() if p.grad is not None]
    assert len(found[0]) == 4
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


def test_response_norm_keeps_its_precision_under_autocast() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8, 8)
    mask = BlockMask.random(2, 2, 4, 0.5, torch.Generator().manual_seed(0))
    norm = GlobalResponseNorm(4)
    nn.init.ones_(norm.gamma)
    expected = norm(BlockSparseTensor.from_dense(x, mask)).to_dense()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(BlockSparseTensor.from_dense(x, mask)).to_dense(), expected)


# ---- the network


def tiny(out_channels: int = 1, *, deep_supervision: bool = False) -> nn.Module:
    torch.manual_seed(0)
    cube, plate = (7, 7, 7), (3, 5, 5)
    shape = NetworkShape(
        (4, 6, 8), (1, 2, 1), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), (plate, cube, cube), architecture="convnext"
    )
    network = build_network(shape, 1, out_channels, deep_supervision=deep_supervision)
    for parameter in network.parameters():
        if parameter.dim() == 1:  # so that no weight of a norm is 1 and no bias or gamma 0
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    return network


def test_halves_fit() -> None:
    network = tiny(2, deep_supervision=True)
    features = network.encoder(torch.randn(1, 1, 4, 16, 8))
    assert [tuple(f.shape[1:]) for f in features] == [(4, 4, 16, 8), (6, 4, 8, 4), (8, 2, 4, 2)]
    outputs = network.decoder(features)
    assert [tuple(y.shape[1:]) for y in outputs] == [(2, 4, 16, 8), (2, 4, 8, 4)]
    network.decoder.deep_supervision = False
    assert torch.equal(network.decoder(features), outputs[0])


def test_size_t_has_the_stages_of_the_published_one() -> None:
    with torch.device("meta"):
        encoder = build_unet("convnext-t").encoder
    assert [len([b for b in stage if isinstance(b, ConvNeXtBlock)]) for stage in encoder.stages[2:]] == [3, 3, 9, 3]
    assert encoder.output_channels[2:] == [96, 192, 384, 768]
    assert math.prod(PRESETS["convnext-t"].strides) == 32
    block = encoder.stages[-1][-1]
    assert block.depthwise.weight.shape == (768, 1, 7, 7, 7)
    assert block.expand.weight.shape == (4 * 768, 768, 1, 1, 1)


# ---- sparse


def _layer_norm(x: Tensor, mask: Tensor, layer: ChannelLayerNorm) -> Tensor:
    mean = x.mean(1, keepdim=True)
    normalised = (x - mean) / (((x - mean) ** 2).mean(1, keepdim=True) + EPS).sqrt()
    shape = (1, -1, 1, 1, 1)
    return oracle.select(normalised * layer.weight.view(shape) + layer.bias.view(shape), mask)


def _response_norm(x: Tensor, mask: Tensor, layer: GlobalResponseNorm) -> Tensor:
    shape = (1, -1, 1, 1, 1)
    # A norm over no voxel is zero, and so is its gradient.
    norm = torch.linalg.vector_norm(oracle.select(x, mask), dim=(2, 3, 4), keepdim=True)
    response = norm / (norm.mean(1, keepdim=True) + EPS)
    return oracle.select(layer.gamma.view(shape) * x * response + layer.beta.view(shape) + x, mask)


def _conv(x: Tensor, mask: Tensor, layer: nn.Conv3d) -> Tensor:
    return oracle.conv3d(x, mask, layer.weight, layer.bias, layer.stride, layer.padding, layer.groups)  # type: ignore[arg-type]


def dense_encoder(encoder: nn.Module, x: Tensor, mask: Tensor) -> list[Tensor]:
    """The features of each stage, computed densely and multiplied by the mask."""
    x = _layer_norm(_conv(x, mask, encoder.stem[0]), mask, encoder.stem[1])
    features = []
    for stage in encoder.stages:
        for block in stage:
            if not isinstance(block, ConvNeXtBlock):
                norm, convolution = block
                x = _conv(_layer_norm(x, mask, norm), mask, convolution)
                mask = oracle.downsample(mask, convolution.stride)
                continue
            y = _layer_norm(_conv(x, mask, block.depthwise), mask, block.norm)
            y = nn.functional.gelu(_conv(y, mask, block.expand))
            x = x + _conv(_response_norm(y, mask, block.response), mask, block.compress)
        features.append(x)
    return features


MASKS = {
    "whole blocks": lambda: BlockMask.random(2, (2, 3, 2), (4, 8, 8), 0.6, torch.Generator().manual_seed(0)),
    "unequal samples": lambda: BlockMask.random(3, (2, 2, 2), (4, 8, 8), (0.2, 0.9), torch.Generator().manual_seed(2)),
    "one sample without anything": lambda: BlockMask.from_grid(torch.arange(16).view(2, 2, 2, 2) >= 11, 4),
    "blocks that merge": lambda: BlockMask.random(2, (2, 6, 6), (1, 2, 2), 0.7, torch.Generator().manual_seed(1)),
    "voxels": lambda: BlockMask.from_voxels(
        torch.rand(2, 4, 16, 8, generator=torch.Generator().manual_seed(3)) < 0.2, 4
    ),
}


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
@pytest.mark.parametrize("name", MASKS)
def test_sparse_encoder_equals_the_dense_oracle(name: str, backend: str) -> None:
    mask, encoder = MASKS[name](), tiny().encoder.double()
    x = torch.randn(mask.batch, 1, *mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    shown = mask.to_dense()

    def results(features: list[Tensor]) -> dict[str, Tensor]:
        encoder.zero_grad()
        # Different weights for all, so that no mistake is averaged away.
        parts = [(f * torch.linspace(-1, 1, f.numel(), dtype=f.dtype).view(f.shape)).sum() for f in features]
        torch.stack(parts).sum().backward()
        gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        return {**{f"stage {i}": f.detach() for i, f in enumerate(features)}, **gradients}

    expected = results(dense_encoder(encoder, x, shown))
    to_sparse(encoder)
    with use_backend(backend):
        hidden = torch.where(shown, x, float("nan"))
        got = results([f.to_dense() for f in encoder(BlockSparseTensor.from_dense(hidden, mask))])
    assert got.keys() == expected.keys()
    scale = max(float(values.norm()) for values in expected.values())
    for key, values in expected.items():
        error = float((got[key] - values).norm())
        assert error <= 1e-9 * float(values.norm()) + 1e-11 * scale, f"{key}: {error:.1e} of {float(values.norm()):.1e}"


def test_converted_it_computes_densely_what_it_did() -> None:
    network = tiny()
    x = torch.randn(1, 1, 8, 16, 8)
    expected = network(x)
    assert torch.equal(S3D(network).unet(x), expected)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_s3d_with_shortcuts_is_s3d_without(backend: str) -> None:
    """The decoder is nnU-Net's, so that S3D leaves out of it what is known."""
    model = S3D(tiny()).double()
    mask = BlockMask.random(2, 2, (8, 16, 16), 0.6, torch.Generator().manual_seed(0))
    x = torch.randn(2, 1, *mask.shape, dtype=torch.float64)
    found = []
    for model.shortcuts in (False, True):
        model.zero_grad()
        with use_backend(backend):
            y = model(x, mask)
            masked_mse(y, x, mask).backward()
        found.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    scale = max(float(g.abs().max()) for g in found[0])
    for plain, short in zip(*found, strict=True):
        torch.testing.assert_close(short, plain, rtol=1e-8, atol=1e-10 * scale)
