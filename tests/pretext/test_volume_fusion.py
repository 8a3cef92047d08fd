"""VolumeFusion: what is fused with what, by which coefficient, and how the answer is judged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import configure
from torch import Tensor
from toy_training import SHAPE, draw, losses_before_and_after, smooth_volumes

from s3d.pretext import volume_fusion
from s3d.pretext.volume_fusion import COEFFICIENTS, VolumeFusion, draw_boxes, foreground_of, fuse, paint_classes

CPU = torch.device("cpu")


@pytest.fixture
def pretext(tmp_path: Path) -> VolumeFusion:
    return VolumeFusion(configure(None, tmp_path, method="volumefusion", patch_size=SHAPE))


def test_without_boxes_the_fused_volume_is_the_background(
    pretext: VolumeFusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_fusion, "draw_boxes", lambda shape, rng: np.zeros((0, 7), np.int64))
    volumes = smooth_volumes(2)
    problem = pretext.pose(volumes, None, draw(0))
    assert torch.equal(problem.fused, volumes)
    assert not problem.classes.any()


def test_the_largest_coefficient_shows_the_foreground(pretext: VolumeFusion, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = np.array([[0, 0, 0, *SHAPE, COEFFICIENTS]])
    monkeypatch.setattr(volume_fusion, "draw_boxes", lambda shape, rng: boxes)
    volumes = smooth_volumes(3)
    assert torch.equal(pretext.pose(volumes, None, draw(0, batch=3)).fused, volumes[[2, 0, 1]])
    mirrored = pretext.pose(volumes[:1], None, draw(0, batch=3, wanted=1)).fused
    assert torch.equal(mirrored[0, 0], volumes[0, 0].flip((0, 1, 2)))


def test_classes_are_coefficients(pretext: VolumeFusion) -> None:
    volumes = smooth_volumes(2)
    problem = pretext.pose(volumes, None, draw(0))
    background, foreground = volumes.double(), volumes[[1, 0]].double()
    told = (problem.fused.double() - background) / (foreground - background) * 4
    clear = (foreground - background).abs() > 0.1
    np.testing.assert_allclose(told[clear], problem.classes[clear].double(), atol=1e-4)
    assert problem.classes[clear].unique().tolist() == [0, 1, 2, 3, 4]


def test_fusion_by_hand() -> None:
    background, foreground = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0]), torch.tensor([4.0, 5.0, 6.0, 0.0, -8.0])
    classes = torch.tensor([0, 1, 2, 3, 4], dtype=torch.uint8)
    assert fuse(background, foreground, classes).tolist() == [0.0, 2.0, 4.0, 1.0, -8.0]


def test_the_last_box_wins() -> None:
    boxes = np.array([[0, 0, 0, 2, 2, 1, 3], [1, 1, 0, 2, 3, 1, 1]])
    assert paint_classes((2, 3, 1), boxes, CPU)[..., 0].tolist() == [[3, 3, 0], [3, 1, 1]]


@pytest.mark.parametrize("shape", [(64, 128, 128), (40, 56, 40), (9, 8, 3)])
def test_boxes_are_as_published(shape: tuple[int, int, int]) -> None:
    many = [draw_boxes(shape, np.random.default_rng(seed)) for seed in range(100)]
    counts = [len(boxes) for boxes in many]
    assert (min(counts), max(counts)) == (10, 40)
    boxes = np.concatenate(many)
    starts, ends, classes = boxes[:, :3], boxes[:, 3:6], boxes[:, 6]
    assert (starts >= 0).all()
    assert (ends <= shape).all()
    most = [int(0.625 * side) for side in shape]
    assert (ends - starts).min(0).tolist() == [min(8, side) for side in most]
    assert (ends - starts).max(0).tolist() == most
    assert np.unique(classes).tolist() == [1, 2, 3, 4]
    assert (ends == shape).any(0).all()


def test_problem_depends_on_seed_step_and_sample(pretext: VolumeFusion) -> None:
    volumes = smooth_volumes(2)
    whole = pretext.pose(volumes, None, draw(3))
    again = pretext.pose(volumes, None, draw(3))
    assert torch.equal(whole.fused, again.fused)
    assert torch.equal(whole.classes, again.classes)
    assert not torch.equal(whole.classes, pretext.pose(volumes, None, draw(4)).classes)
    assert not torch.equal(whole.classes, pretext.pose(volumes, None, draw(3, seed=1)).classes)
    # Alone it is fused with another volume, but by the same boxes and coefficients.
    alone = pretext.pose(volumes[1:], None, draw(3, first=1, wanted=1))
    assert torch.equal(whole.classes[1:], alone.classes)
    assert not torch.equal(whole.fused[1:], alone.fused)


def loss_by_hand(logits: Tensor, classes: Tensor) -> float:
    """Of one sample, [classes, voxels] and [voxels]."""
    x = logits.detach().double().numpy()
    p = np.exp(x) / np.exp(x).sum(0)
    one_hot = np.eye(len(x))[classes.numpy()].T
    dice = 1 - (2 * (p * one_hot).sum(1) + 1e-5) / ((p + one_hot).sum(1) + 1e-5)
    return float(dice.mean() - np.log((p * one_hot).sum(0)).mean())


def test_loss_by_hand(pretext: VolumeFusion) -> None:
    volumes = smooth_volumes(2)
    problem = pretext.pose(volumes, None, draw(0))
    logits = torch.randn(2, COEFFICIENTS + 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    expected = [loss_by_hand(logits[i].flatten(1), problem.classes[i].flatten()) for i in range(2)]
    assert pretext.terms(problem) == 2
    assert float(pretext.loss(logits, problem, 2)) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(pretext.loss(logits, problem, 4)) == pytest.approx(np.mean(expected) / 2, rel=1e-5)
    parts = [
        pretext.loss(logits[[i]], replace(problem, fused=problem.fused[[i]], classes=problem.classes[[i]]), 2)
        for i in range(2)
    ]
    assert float(sum(parts)) == pytest.approx(np.mean(expected), rel=1e-5)
    alike = [loss_by_hand(torch.zeros(5, len(c)), c) for c in problem.classes.flatten(1)]
    assert pretext.trivial_loss(problem) == pytest.approx(np.mean(alike), rel=1e-5)


def test_loss_counts_voxels_where_both_volumes_are_valid(pretext: VolumeFusion) -> None:
    volumes = smooth_volumes(2)
    valid = torch.ones_like(volumes, dtype=torch.bool)
    valid[0, :, :4] = False
    valid[1, :, :, :, 12:] = False
    problem = pretext.pose(volumes, valid, draw(0))
    counted = torch.ones(SHAPE, dtype=torch.bool)
    counted[:4] = False
    counted[:, :, 12:] = False
    logits = torch.randn(2, COEFFICIENTS + 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    logits[:, :, ~counted] = float("nan")
    logits.requires_grad_()
    expected = [loss_by_hand(logits[i][:, counted], problem.classes[i, 0][counted]) for i in range(2)]
    loss = pretext.loss(logits, problem, 2)
    assert float(loss.detach()) == pytest.approx(np.mean(expected), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[:, :, ~counted] == 0).all()


def test_sample_without_a_valid_voxel_has_no_loss(pretext: VolumeFusion) -> None:
    volumes = smooth_volumes(1)
    problem = pretext.pose(volumes, torch.zeros_like(volumes, dtype=torch.bool), draw(0, batch=1))
    logits = torch.randn(1, COEFFICIENTS + 1, *SHAPE).requires_grad_()
    loss = pretext.loss(logits, problem, 1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_foreground_is_another_volume() -> None:
    volumes = smooth_volumes(3)
    for batch in (volumes, volumes[:2], volumes[:1]):
        for sample, foreground in zip(batch, foreground_of(batch), strict=True):
            assert not torch.equal(sample, foreground)


def test_coefficients_are_learned(pretext: VolumeFusion) -> None:
    before, after = losses_before_and_after(pretext, steps=60, learning_rate=1e-2)
    trivial = pretext.trivial_loss(pretext.pose(smooth_volumes(2), None, draw(1000)))
    assert after < 0.95 * min(before, trivial)


def test_figure_shows_how_many_are_right(pretext: VolumeFusion) -> None:
    problem = pretext.pose(smooth_volumes(2), None, draw(0))
    logits = torch.nn.functional.one_hot(problem.classes[:, 0].long(), COEFFICIENTS + 1).movedim(-1, 1).float()
    figure = pretext.figure(problem, logits, "title")
    assert [axis.get_title() for axis in figure.axes[:3]] == ["fused input", "true class", "predicted (100% right)"]
