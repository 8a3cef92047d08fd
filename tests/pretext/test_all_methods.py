"""What the trainer, checkpoints and fine-tuning ask of every method of pre-training."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import configure, losses
from torch import Tensor

from s3d.checkpoint import load_checkpoint
from s3d.data import preprocess
from s3d.distributed import Processes
from s3d.model import build_network, preset_shape
from s3d.optimizer_step import StepResult
from s3d.pretext.method import Draw
from s3d.pretext.registry import METHODS
from s3d.pretrain import load_model, pretrain
from s3d.pretrain_config import PretrainConfig
from s3d.segmentation.transfer import TensorRow, transfer
from s3d.training_step import TrainingStep, build_training

# The smallest network that each method takes; others take the first.
PRESETS = {"fcmae": "convnext-small", "swin-unetr": "swin-unetr-small"}
# Whose loss depends on which samples are computed together, as their docstrings say.
TOGETHER = {"volumefusion", "swin-unetr"}
STEPS, STOP = 3, 2


def settings(method: str, **changes: object) -> dict[str, Any]:
    return {
        "method": method,
        "preset": PRESETS.get(method, "tiny"),
        "patch_size": (16, 16, 16),
        "steps": STEPS,
        "validate_every": STEPS,
        "ema_decay": 0.5,
        **changes,
    }


@pytest.fixture(scope="module")
def volumes(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    preprocess([str(path) for path in sorted(images.iterdir())], folder, progress=False)
    return folder


@pytest.fixture(scope="module", params=METHODS)
def run(
    request: pytest.FixtureRequest, volumes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PretrainConfig]:
    """A finished run of each method."""
    threads = torch.get_num_threads()
    if request.param == "swin-unetr":  # in MONAI, torch adds up the gradient of its position tables as threads come
        torch.set_num_threads(1)
    output = tmp_path_factory.mktemp(request.param)
    config = configure(None, output / "whole", volumes=volumes, **settings(request.param))
    assert pretrain(config).steps == STEPS
    yield config
    torch.set_num_threads(threads)


def checkpoint(config: PretrainConfig) -> Path:
    return config.output_dir / "checkpoint.pt"


def same(one: Any, other: Any) -> bool:
    """Whether checkpoints, or parts of them, are equal to the last bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or one != one  # NaN


def test_a_stopped_and_resumed_run_is_the_same_run(run: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS[run.method]
    parts = dataclasses.replace(run, output_dir=run.output_dir.with_name("parts"))
    original = method.pose

    def interrupted(self: Any, image: Tensor, valid: Tensor | None, draw: Draw) -> Any:
        if draw.stream == (0, STOP - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, image, valid, draw)

    with monkeypatch.context() as patch:
        patch.setattr(method, "pose", interrupted)
        assert pretrain(parts).steps == STOP
    assert pretrain(parts).steps == STEPS
    assert losses(parts.output_dir) == losses(run.output_dir)
    whole, resumed = load_checkpoint(checkpoint(run)), load_checkpoint(checkpoint(parts))
    for part in ("network", "method", "ema", "ema_method", "optimizer", "validation_loss", "initial_loss"):
        assert same(whole[part], resumed[part]), part


def test_the_model_of_a_checkpoint_has_learned_what_the_method_trains_and_nothing_else(run: PretrainConfig) -> None:
    """Beside the trained parameters only a teacher, which follows them, is another than at the start."""
    start = build_training(run, METHODS[run.method](run), torch.device("cpu")).model
    model = load_model(checkpoint(run))
    assert type(model) is type(start)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in start.named_parameters() if p.requires_grad
    }
    for (name, old), new in zip(start.named_parameters(), model.parameters(), strict=True):
        if name.startswith("teacher."):
            continue
        # Vectors may have a gradient of zero, such as biases that a norm takes away.
        assert torch.equal(old, new) != old.requires_grad or (old.requires_grad and old.ndim == 1), name
    unet: Any = model.unet
    decoder = [p for n, p in unet.decoder.named_parameters() if not n.startswith("encoder.")]
    assert all(parameter.requires_grad for parameter in unet.encoder.parameters())
    assert any(parameter.requires_grad for parameter in decoder) == (METHODS[run.method].trained == "encoder+decoder")


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_fine_tuning_takes_over_what_was_trained(run: PretrainConfig, weights: Any) -> None:
    saved = load_checkpoint(checkpoint(run))
    trained = METHODS[run.method].trained
    assert saved["trained"] == trained
    network = build_network(preset_shape(run.preset), 1, 3, deep_supervision=True)
    before = {name: value.clone() for name, value in network.named_parameters(remove_duplicate=False)}
    rows = transfer(network, saved, "encoder+decoder", weights)
    of_network = [row for row in rows if row.target_shape is not None]
    assert {action_and_reason(row) for row in of_network if row.name.startswith("encoder.")} == {("loaded", "")}
    heads = [row for row in of_network if row.name.startswith("decoder.seg_layers.")]
    assert {action_and_reason(row) for row in heads} == {("initialised", "heads start anew")}
    decoder = [row for row in of_network if row.name.startswith("decoder.") and row not in heads]
    expected = ("initialised", "the pre-training trained the encoder alone")
    assert {action_and_reason(row) for row in decoder} == {expected if trained == "encoder" else ("loaded", "")}
    assert len(of_network) == len(list(network.parameters()))
    state = saved[{"raw": "network", "ema": "ema"}[weights]]
    for row in of_network:
        right = state[row.source] if row.action == "loaded" else before[row.name]
        assert torch.equal(network.get_parameter(row.name), right), row.name


def action_and_reason(row: TensorRow) -> tuple[str, str]:
    return row.action, row.reason


def test_the_average_follows_the_weights(run: PretrainConfig) -> None:
    saved = load_checkpoint(checkpoint(run))
    assert saved["ema_updates"] == STEPS
    for network, average in (("network", "ema"), ("method", "ema_method")):
        assert saved[network].keys() == saved[average].keys()
    name = next(name for name, value in saved["network"].items() if name.startswith("encoder.") and value.ndim == 5)
    assert not torch.equal(saved["network"][name], saved["ema"][name])


@dataclass(frozen=True)
class FirstSteps:
    """What steps of a new model found, and the gradients of each, by their parameters."""

    method: str
    results: list[StepResult]
    gradients: list[dict[str, Tensor]]
    model: Any


def first_steps(method: str, steps: int = 1, parts: int = 1, **changes: object) -> FirstSteps:
    """On a batch of four patches that hold more than noise, cut into parts."""
    config = configure(None, Path(), **settings(method, batch_size=4, gradient_clip=1e6, **changes))
    pretext = METHODS[method](config)
    training = build_training(config, pretext, torch.device("cpu"))
    coarse = torch.randn(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    image = torch.nn.functional.interpolate(coarse, config.patch_size, mode="trilinear")
    train = TrainingStep(config, pretext, training, Processes(0, 1, torch.device("cpu")), parts)
    found = FirstSteps(method, [], [], training.model)
    for step in range(steps):
        found.results.append(train([{"image": part} for part in image.chunk(parts)], step))
        named = training.model.named_parameters()
        found.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
    return found


@pytest.fixture(scope="module", params=METHODS)
def whole_batch(request: pytest.FixtureRequest) -> FirstSteps:
    return first_steps(request.param, steps=2)


def test_all_that_is_trained_has_gradients_and_nothing_else(whole_batch: FirstSteps) -> None:
    trained = {name for name, parameter in whole_batch.model.named_parameters() if parameter.requires_grad}
    assert all(gradients.keys() == trained for gradients in whole_batch.gradients)
    # In the second step: residual branches begin with a factor of zero.
    for name, gradient in whole_batch.gradients[1].items():
        assert bool(gradient.isfinite().all()), name
        assert gradient.ndim == 1 or bool(gradient.any()), name


def test_parts_have_the_loss_and_the_gradients_of_the_whole_batch(whole_batch: FirstSteps) -> None:
    """Of methods that do not promise it, the loss is another: their docstrings are right."""
    in_parts = first_steps(whole_batch.method, parts=2)
    loss, expected = in_parts.results[0].loss, whole_batch.results[0].loss
    if whole_batch.method in TOGETHER:
        assert abs(loss - expected) > 1e-4 * expected
        return
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in whole_batch.gradients[0].items():
        error = (in_parts.gradients[0][name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-6 * whole_batch.results[0].gradient_norm, name


def test_bfloat16_computes_nearly_the_same(whole_batch: FirstSteps) -> None:
    rounded = first_steps(whole_batch.method, precision="bfloat16")
    assert rounded.results[0].loss == pytest.approx(whole_batch.results[0].loss, rel=0.02)
    assert rounded.results[0].gradient_norm == pytest.approx(whole_batch.results[0].gradient_norm, rel=0.2)
    assert rounded.results[0].loss != whole_batch.results[0].loss
    assert {parameter.dtype for parameter in rounded.model.parameters()} == {torch.float32}
