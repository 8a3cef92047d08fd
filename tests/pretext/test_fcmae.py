"""FCMAE: what it sees, what it should produce, and that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import configure
from torch import Tensor, nn

from s3d.checkpoint import load_checkpoint
from s3d.model import build_unet
from s3d.pretext.fcmae import FCMAE, FCMAEModel, unfold_channels
from s3d.pretext.masked_autoencoder import MaskedProblem
from s3d.pretext.method import Draw
from s3d.pretrain import load_model, pretrain
from s3d.pretrain_config import PretrainConfig
from s3d.segmentation.transfer import transfer
from s3d_kernels import BlockMask


def config(output: Path = Path(), images: Path | None = None, **changes: object) -> PretrainConfig:
    settings: dict[str, object] = {"method": "fcmae", "preset": "convnext-small", "patch_size": (16, 24, 16)}
    return configure(images, output, **{**settings, **changes})


def waves(batch: int = 2) -> Tensor:
    """Images that are smooth, each another."""
    d, h, w = (torch.linspace(0, 6, side) for side in (16, 24, 16))
    phases = torch.arange(batch).view(-1, 1, 1, 1)
    image = torch.sin(d.view(-1, 1, 1) + phases) + torch.sin(h.view(-1, 1)) + torch.sin(w)
    return image[:, None]


def pose(method: FCMAE, image: Tensor, step: int = 0) -> MaskedProblem:
    return method.pose(image, None, Draw(0, (0, step), len(image), 0, len(image)))


def model_of(method: FCMAE) -> FCMAEModel:
    torch.manual_seed(0)
    model = method.build_model()
    assert isinstance(model, FCMAEModel)
    return model


def test_nothing_of_a_masked_voxel_reaches_output_or_gradients() -> None:
    method = FCMAE(config())
    model = model_of(method)
    image, noise = waves(), torch.randn(2, 1, 16, 24, 16)
    shown = pose(method, image).mask.to_dense()
    outputs, gradients = [], []
    for hidden in (torch.full_like(image, float("nan")), noise):
        problem = pose(method, torch.where(shown, image, hidden))
        output = method.answer(model, problem)
        model.zero_grad()
        output.square().mean().backward()
        outputs.append(output.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert outputs[0].shape == image.shape
    assert outputs[0].isfinite().all()
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


def test_every_visible_voxel_reaches_the_output() -> None:
    method = FCMAE(config())
    model, image = model_of(method), waves()
    for module in model.modules():  # begin as identity of their blocks, otherwise
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
    problem = pose(method, image.requires_grad_())
    method.answer(model, problem).square().sum().backward()
    assert image.grad is not None
    assert torch.equal(image.grad != 0, problem.mask.to_dense())


def test_masked_positions_hold_the_token() -> None:
    method = FCMAE(config())
    model, problem = model_of(method), pose(method, waves())
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    method.answer(model, problem)
    shown = problem.mask.downsample(8).to_dense()[:, 0]
    cells = seen[0].movedim(1, -1)
    assert torch.equal(cells[~shown], model.mask_token.expand_as(cells[~shown]))
    assert not torch.isclose(cells[shown], model.mask_token).all(1).any()


def test_blocks_may_be_larger_than_a_cell() -> None:
    method = FCMAE(config(patch_size=(32, 32, 32), mask_block=16))
    image = torch.randn(2, 1, 32, 32, 32)
    assert method.answer(model_of(method), pose(method, image)).shape == image.shape


def test_channels_become_the_voxels_of_their_cell() -> None:
    """Of two cells beside each other, with numbers 0 to 7 and 10 to 17."""
    cells = torch.stack([torch.arange(8.0), 10 + torch.arange(8.0)], dim=1).view(1, 8, 1, 1, 2)
    volume = unfold_channels(cells, 2)[0, 0]
    expected = [[[0, 1, 10, 11], [2, 3, 12, 13]], [[4, 5, 14, 15], [6, 7, 16, 17]]]
    assert volume.tolist() == expected


def test_a_cell_is_predicted_from_its_own_features() -> None:
    """With a decoder that leaves everything as it is, the prediction of each cell is its features'."""
    model = FCMAEModel(FCMAE(config()).build_model().unet, 8, (7, 7, 7))  # type: ignore[arg-type]
    mask = BlockMask.random(1, (2, 3, 2), 8, 0.5, torch.Generator().manual_seed(0))
    nn.init.zeros_(model.decoder.compress.weight)
    output = model(waves(1), mask)
    features: list[Tensor] = []
    model.project.register_forward_hook(lambda module, arguments, result: features.append(result))
    model(waves(1), mask)
    dense = features[0].to_dense(fill=model.mask_token)
    weight, bias = model.predict.weight[:, :, 0, 0, 0], model.predict.bias
    for d, h, w in ((0, 0, 0), (1, 2, 0), (0, 1, 1)):
        cell = output[0, 0, 8 * d : 8 * d + 8, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
        torch.testing.assert_close(cell.flatten(), weight @ dense[0, :, d, h, w] + bias)


def test_targets_by_hand() -> None:
    method = FCMAE(config())
    image = waves()
    problem = pose(method, image)
    assert torch.equal(problem.image, image)
    block = image[1, 0, 8:16, 16:24, :8].double()
    expected = (block - block.mean()) / torch.sqrt(((block - block.mean()) ** 2).mean() + 1e-6)
    torch.testing.assert_close(problem.target[1, 0, 8:16, 16:24, :8].double(), expected, rtol=1e-4, atol=1e-5)
    masked = ~problem.mask.to_dense()
    loss = method.loss(torch.zeros_like(image), problem, method.terms(problem))
    torch.testing.assert_close(loss, problem.target[masked].square().mean())


def test_only_encoder_and_decoder_of_the_method_are_trained() -> None:
    method = FCMAE(config())
    model = model_of(method)
    problem = pose(method, waves())
    method.loss(method.answer(model, problem), problem, method.terms(problem)).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    names = {".".join(name.split(".")[:2]) for name in trained if name.startswith("unet")}
    assert names == {"unet.encoder"}
    assert all(p.requires_grad for p in model.unet.encoder.parameters())


def test_other_architectures_are_refused() -> None:
    with pytest.raises(
        ValueError, match="preset must be of architecture convnext for method fcmae, got tiny of resenc"
    ):
        config(preset="tiny")


def test_loss_falls() -> None:
    method = FCMAE(config())
    model, image = model_of(method), waves()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for step in range(25):
        problem = pose(method, image, step)
        loss = method.loss(method.answer(model, problem), problem, method.terms(problem))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_run_trains_the_encoder_that_fine_tuning_takes_over(images: Path, tmp_path: Path) -> None:
    given = config(tmp_path, images, patch_size=(16, 16, 16), steps=2, validate_every=2)
    result = pretrain(given)
    assert result.final_loss < 1.5 * result.mean_loss
    unet = load_model(result.checkpoint).unet
    torch.manual_seed(given.seed)
    before = FCMAE(given).build_model().unet
    for name, value in unet.named_parameters():
        changed = not torch.equal(value, before.get_parameter(name))  # type: ignore[operator]
        assert changed == name.startswith("encoder."), name
    network = build_unet("convnext-small")
    rows = transfer(network, load_checkpoint(result.checkpoint), "encoder")
    actions = {row.action for row in rows if row.name.startswith("encoder.")}
    assert actions == {"loaded"}
    for name, value in network.encoder.named_parameters():
        assert torch.equal(value, unet.encoder.get_parameter(name))  # type: ignore[union-attr, operator]
