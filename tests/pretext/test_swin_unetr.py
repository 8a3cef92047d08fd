"""Pre-training of Swin UNETR: views, the three losses by hand, and that they fall."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_dataset import write_dataset
from small_runs import configure, losses, write_images
from toy_training import losses_of_fixed_problems

from s3d import training_data
from s3d.checkpoint import NEWEST
from s3d.data import SpatialAugmentation
from s3d.distributed import processes
from s3d.pretext.method import Draw
from s3d.pretext.swin_unetr import (
    TEMPERATURE,
    SwinUNETRPretext,
    ViewsAnswer,
    ViewsProblem,
    contrast_losses,
    draw_box,
    draw_holes,
)
from s3d.pretrain import load_model, pretrain
from s3d.segmentation.finetune import finetune
from s3d.segmentation.finetune_config import FinetuneConfig
from s3d.segmentation.predict import PredictConfig, predict

SQUARE, OBLONG = (8, 16, 16), (8, 24, 16)


def method(patch: tuple[int, ...] = SQUARE) -> SwinUNETRPretext:
    return SwinUNETRPretext(configure(None, Path(), method="swin-unetr", preset="swin-unetr-small", patch_size=patch))


def images(patch: tuple[int, ...] = SQUARE, samples: int = 2) -> torch.Tensor:
    """Smooth, brighter to one side."""
    coarse = torch.randn(samples, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, patch, mode="trilinear")
    return smooth + torch.linspace(-2, 2, patch[1]).reshape(-1, 1)


def posed(
    step: int = 0, first: int = 0, wanted: int = 2, patch: tuple[int, ...] = SQUARE, valid: torch.Tensor | None = None
) -> ViewsProblem:
    image = images(patch)[first : first + wanted]
    return method(patch).pose(image, valid, Draw(0, (0, step), 2, first, wanted))


@pytest.mark.parametrize(("patch", "possible"), [(SQUARE, {0, 1, 2, 3}), (OBLONG, {0, 2})])
def test_targets_are_the_turned_images(patch: tuple[int, ...], possible: set[int]) -> None:
    found = set()
    for step in range(12):
        problem = posed(step, patch=patch)
        assert problem.seen.shape == problem.target.shape == (4, 1, *patch)
        for view, turn in enumerate(problem.turns.tolist()):
            original = images(patch)[view % 2, 0]
            if turn == 0:
                assert torch.equal(problem.target[view, 0], original)
            back = torch.stack([torch.rot90(plane, -turn) for plane in problem.target[view, 0]])
            assert torch.equal(back, original)
            found.add(turn)
    assert found == possible


def test_voxels_outside_of_the_holes_are_untouched() -> None:
    problem = posed()
    for view in range(4):
        changed = problem.seen[view] != problem.target[view]
        # Holes overlap, so that it is somewhat less than 30 %, and a last one may go beyond it by its volume.
        assert 0.15 < float(changed.float().mean()) < 0.32
    assert not torch.equal(problem.seen[0] != problem.target[0], problem.seen[2] != problem.target[2])


def test_holes_are_boxes_of_the_published_sizes() -> None:
    shape = (40, 56, 40)
    generator = np.random.default_rng(0)
    boxes = [draw_box(shape, generator) for _ in range(500)]
    for axis, side in enumerate(shape):
        along = [box[axis] for box in boxes]
        lengths = [part.stop - part.start for part in along]
        assert (min(lengths), max(lengths)) == (int(0.05 * side), int(0.25 * side))
        assert (min(part.start for part in along), max(part.stop for part in along)) == (0, side)
    assert 0.2 < np.mean([draw_holes(shape, generator) for _ in range(20)]) < 0.3
    assert draw_holes((8, 8, 8), generator).any()


def test_invalid_voxels_turn_with_the_image_and_do_not_count() -> None:
    valid = torch.ones(2, 1, *SQUARE, dtype=torch.bool)
    valid[..., :6, :] = False
    pretext, problem = method(), posed(valid=valid)
    assert problem.valid is not None
    zeros = ViewsAnswer(problem.target.clone(), torch.zeros(4, 4), torch.zeros(4, 512))
    clean = pretext.loss(zeros, problem, 2)
    zeros.filled[~problem.valid] = math.nan
    assert torch.equal(pretext.loss(zeros, problem, 2), clean)
    for view, turn in enumerate(problem.turns.tolist()):
        assert torch.equal(problem.valid[view], valid[view % 2].rot90(turn, (2, 3)))


def test_losses_by_hand() -> None:
    pretext, problem = method(), posed()
    perfect = torch.full((4, 4), -1e4)
    perfect[torch.arange(4), problem.turns] = 1e4
    # The same for both views of a sample, at right angles to those of the other.
    contrast = torch.zeros(4, 512)
    contrast[[0, 2], 0], contrast[[1, 3], 1] = 3.0, 5.0
    positive = math.exp(1 / TEMPERATURE)
    expected = -math.log(positive / (positive + 2))
    torch.testing.assert_close(contrast_losses(contrast), torch.full((4,), expected))
    best = ViewsAnswer(problem.target, perfect, contrast)
    assert float(pretext.loss(best, problem, 2)) == pytest.approx(expected)
    off = best._replace(filled=problem.target + 0.5)
    assert float(pretext.loss(off, problem, 2)) == pytest.approx(expected + 0.5)
    unsure = best._replace(turns=torch.zeros(4, 4))
    assert float(pretext.loss(unsure, problem, 2)) == pytest.approx(expected + math.log(4))


def test_impossible_turns_are_no_answers() -> None:
    problem = posed(patch=OBLONG)
    logits = torch.tensor([0.0, 1e4, 0.0, 1e4]).expand(4, -1)
    pretext = method(OBLONG)
    loss = pretext.loss(ViewsAnswer(problem.target, logits, torch.eye(4, 512)), problem, 2)
    assert float(loss) == pytest.approx(math.log(2) + math.log(3))


def test_trivial_loss_is_that_of_guesses() -> None:
    pretext, problem = method(), posed()
    guesses = ViewsAnswer(torch.zeros_like(problem.target), torch.zeros(4, 4), torch.ones(4, 512))
    assert pretext.trivial_loss(problem) == pytest.approx(float(pretext.loss(guesses, problem, 2)), rel=1e-5)


def test_one_sample_alone_has_a_finite_loss() -> None:
    pretext, problem = method(), posed(wanted=1)
    model = pretext.build_model()
    answer = pretext.answer(model, problem)
    assert torch.equal(contrast_losses(answer.contrast), torch.zeros(2))
    loss = pretext.loss(answer, problem, 1)
    loss.backward()
    assert math.isfinite(loss.item())
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


def test_problems_depend_on_seed_step_and_sample_alone() -> None:
    whole, second = posed(), posed(first=1, wanted=1)
    assert torch.equal(whole.seen, posed().seen)
    assert torch.equal(whole.seen[1::2], second.seen)
    assert torch.equal(whole.turns[1::2], second.turns)
    assert not torch.equal(whole.seen, posed(step=1).seen)


def test_only_the_encoder_and_the_heads_learn() -> None:
    pretext, problem = method(), posed()
    model = pretext.build_model()
    pretext.loss(pretext.answer(model, problem), problem, 2).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in model.unet.encoder.parameters())
    assert not any(p.requires_grad for p in model.unet.decoder.parameters())


def test_losses_fall() -> None:
    pretext, problems = method(), [posed(step) for step in range(2)]
    history = losses_of_fixed_problems(pretext, problems, 24)
    trivial = np.mean([pretext.trivial_loss(problem) for problem in problems])
    assert np.mean(history[-4:]) < 0.6 * min(np.mean(history[:4]), trivial)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="preset of method swin-unetr must be of architecture swin-unetr, got small"):
        configure(None, Path(), method="swin-unetr", preset="small")
    with pytest.raises(ValueError, match="patch_size must be larger than 8, the total stride of"):
        method((8, 8, 8))


def test_run_and_what_fine_tuning_takes_over(tmp_path: Path) -> None:
    config = configure(
        write_images(tmp_path),
        tmp_path / "run",
        method="swin-unetr",
        preset="swin-unetr-small",
        patch_size=SQUARE,
        steps=2,
        validate_every=2,
    )
    assert pretrain(config).steps == 2
    assert all(math.isfinite(loss) for loss in losses(config.output_dir))
    checkpoint = config.output_dir / NEWEST
    trained = load_model(checkpoint).unet.encoder
    assert (config.output_dir / f"reconstruction_{0:06d}.png").exists()

    dataset = write_dataset(tmp_path / "Dataset001_Balls", shape=(16, 16, 8))
    tuned = FinetuneConfig(
        dataset=dataset,
        checkpoint=checkpoint,
        output_dir=tmp_path / "tuned",
        fold="all",
        steps=3,
        validate_every=3,
        workers=0,
        device="cpu",
    )
    finetune(tuned)
    with (tuned.output_dir / "transfer.csv").open() as file:
        rows = list(csv.DictReader(file))
    loaded = {row["name"] for row in rows if row["action"] == "loaded"}
    assert loaded == {f"encoder.{name}" for name, _ in trained.named_parameters()}
    result = predict(PredictConfig(tuned.output_dir / NEWEST, dataset / "imagesTr", tmp_path / "out", device="cpu"))
    assert len(result.predicted) == 3


@pytest.mark.parametrize(("name", "probability"), [("swin-unetr", 0.0), ("voco", 0.5)])
def test_turned_patches_are_not_mirrored_for_training(
    name: str, probability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def dataset(*_: object, augmentation: SpatialAugmentation, **__: object) -> range:
        given.append(augmentation)
        return range(100)

    monkeypatch.setattr(training_data, "PatchDataset", dataset)
    config = configure(None, Path(), method=name, preset="swin-unetr-small")
    with processes("cpu") as group:
        training_data.training_batches(config, None, [], group)  # type: ignore[arg-type]
    assert given == [SpatialAugmentation(mirror_probability=probability)]
