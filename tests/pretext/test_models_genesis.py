"""Models Genesis: each transformation by hand, what the loss counts, and that it can be learned."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import configure
from toy_training import SHAPE, draw, losses_before_and_after, smooth_volumes

from s3d.pretext import models_genesis
from s3d.pretext.models_genesis import (
    ModelsGenesis,
    WindowGroup,
    distort,
    draw_curve,
    draw_flips,
    draw_inner_boxes,
    draw_outer_boxes,
    draw_windows,
    scaled,
    shuffle_windows,
    transform,
)


@pytest.fixture
def pretext(tmp_path: Path) -> ModelsGenesis:
    return ModelsGenesis(configure(None, tmp_path, method="models-genesis", patch_size=SHAPE))


def test_scaled_per_volume() -> None:
    volumes = torch.tensor([[[[[-3.0, 1.0, 5.0]]]], [[[[7.0, 7.0, 7.0]]]]])
    assert scaled(volumes).tolist() == [[[[[0.0, 0.5, 1.0]]]], [[[[0.0, 0.0, 0.0]]]]]


def test_one_window_by_hand() -> None:
    volume = torch.arange(24.0).reshape(2, 3, 4)
    group = WindowGroup((1, 2, 2), np.array([[1, 0, 1]]), np.array([3, 0, 1, 2]))
    shuffled = shuffle_windows(volume, [group])
    expected = volume.clone()
    expected[1, 0, 1:3] = torch.tensor([18.0, 13.0])  # of 13, 14, 17, 18
    expected[1, 1, 1:3] = torch.tensor([14.0, 17.0])
    assert torch.equal(shuffled, expected)


def test_windows_are_those_of_a_loop_over_them() -> None:
    shape = (40, 20, 30)
    volume = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    groups = draw_windows(shape, np.random.default_rng(0))
    original = volume.numpy()
    expected = original.copy()
    for group in groups:
        for d, h, w in group.corners:
            window = tuple(slice(start, start + side) for start, side in zip((d, h, w), group.sides))
            values = original[window].reshape(-1)
            expected[window] = values[group.order].reshape(group.sides)
            assert np.array_equal(np.sort(values), np.sort(expected[window], axis=None))  # its histogram
    assert np.array_equal(shuffle_windows(volume, groups).numpy(), expected)
    assert (expected != original).mean() > 0.5


def test_as_many_windows_as_published() -> None:
    shape = (64, 64, 32)
    groups = draw_windows(shape, np.random.default_rng(0))
    assert sum(len(group.corners) for group in groups) == pytest.approx(10_000, abs=64)
    sides = np.array([group.sides for group in groups])
    assert sides.min(0).tolist() == [1, 1, 1]
    assert sides.max(0).tolist() == [6, 6, 3]
    for group in groups:
        assert (group.corners >= 0).all()
        assert (group.corners + group.sides <= shape).all()


def test_curves_are_monotone_maps_of_the_unit_interval() -> None:
    falling = 0
    for seed in range(100):
        curve = draw_curve(np.random.default_rng(seed))
        direction = np.sign(curve[-1] - curve[0])
        assert (np.diff(curve) * direction >= 0).all()
        assert sorted((float(curve[0]), float(curve[-1]))) == pytest.approx([0, 1], abs=1e-6)
        falling += direction < 0
    assert 35 < falling < 65


def test_curve_goes_through_points_of_its_bezier_curve() -> None:
    seed = next(seed for seed in range(100) if draw_curve(np.random.default_rng(seed))[0] == 0)
    (x1, y1), (x2, y2) = np.random.default_rng(seed).random((2, 2))
    curve = draw_curve(np.random.default_rng(seed))
    for t in (0.1, 0.5, 0.8):
        weights = 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
        x, y = (float(np.dot(weights, (a, b, 1))) for a, b in ((x1, x2), (y1, y2)))
        assert np.interp(x, np.linspace(0, 1, len(curve)), curve) == pytest.approx(y, abs=1e-3)


def test_distortion_is_linear_between_knots() -> None:
    curve = np.array([1.0, 0.8, 0.1, 0.0], np.float32)
    volume = torch.tensor([0.0, 1 / 6, 1 / 3, 0.5, 0.9, 1.0]).reshape(1, 2, 3)
    expected = np.interp(volume.numpy(), np.linspace(0, 1, 4), curve)
    np.testing.assert_allclose(distort(volume, curve).numpy(), expected, atol=1e-6)


def only(monkeypatch: pytest.MonkeyPatch, **probabilities: float) -> None:
    for name in ("SHUFFLE", "DISTORT", "PAINT", "INPAINT", "FLIP"):
        monkeypatch.setattr(models_genesis, name, probabilities.get(name, 0.0))


@pytest.mark.parametrize("inpaint", [0.0, 1.0])
def test_painting_by_hand(inpaint: float, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, PAINT=1.0, INPAINT=inpaint)
    boxes = [((1, 3), (2, 5), (0, 4)), ((2, 4), (4, 6), (3, 5))]
    for name in ("draw_inner_boxes", "draw_outer_boxes"):
        monkeypatch.setattr(models_genesis, name, lambda shape, rng: boxes)
    volume = torch.full((6, 7, 8), 0.25)
    painted = transform(volume, np.random.default_rng(0))
    inside = torch.zeros(6, 7, 8, dtype=torch.bool)
    inside[1:3, 2:5, 0:4] = inside[2:4, 4:6, 3:5] = True
    noisy = inside if inpaint else ~inside
    assert (painted[~noisy] == 0.25).all()
    assert len(painted[noisy].unique()) == noisy.sum()
    assert ((painted[noisy] >= 0) & (painted[noisy] < 1)).all()


@pytest.mark.parametrize("shape", [(64, 64, 32), (40, 56, 40), (8, 9, 16), (2, 1, 3)])
def test_boxes_lie_in_the_volume(shape: tuple[int, int, int]) -> None:
    for seed in range(50):
        for boxes, low, high in (
            (draw_inner_boxes(shape, np.random.default_rng(seed)), 1 / 6, 1 / 3),
            (draw_outer_boxes(shape, np.random.default_rng(seed)), 3 / 7, 4 / 7),
        ):
            assert len(boxes) <= 5
            for box in boxes:
                for (start, end), side in zip(box, shape):
                    assert 0 <= start < end <= side
                    assert max(1, low * side - 1) <= end - start <= max(1, high * side + 1)
    assert draw_outer_boxes(shape, np.random.default_rng(0))


def test_transformations_are_as_frequent_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    for name in ("shuffle_windows", "distort", "draw_inner_boxes", "draw_outer_boxes"):
        original = getattr(models_genesis, name)

        def counted(*arguments, name=name, original=original):  # type: ignore[no-untyped-def]
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(models_genesis, name, counted)
    monkeypatch.setattr(models_genesis, "SHUFFLE_GROUPS", 1)
    volume = torch.zeros(4, 4, 4)
    trials = 1000
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        counts["flips"] += bool(draw_flips(rng))
        transform(volume, rng)
    for name, expected in {
        "shuffle_windows": 0.5,
        "distort": 0.9,
        "draw_inner_boxes": 0.9 * 0.2,
        "draw_outer_boxes": 0.9 * 0.8,
        # 0.4 for one; two flips of one axis, in a third of the cases of exactly two, are none.
        "flips": 0.4 - 0.16 * 0.6 / 3,
    }.items():
        assert counts[name] / trials == pytest.approx(expected, abs=0.05), name


def test_target_is_the_flipped_volume_in_the_unit_interval(pretext: ModelsGenesis) -> None:
    volumes = smooth_volumes(2)
    before = volumes.clone()
    flipped = 0
    for step in range(8):
        problem = pretext.pose(volumes, None, draw(step))
        for sample, rng in enumerate(draw(step).generators()):
            axes = draw_flips(rng)
            flipped += bool(axes)
            volume = before[sample, 0]
            expected = ((volume - volume.min()) / (volume.max() - volume.min())).flip(axes)
            torch.testing.assert_close(problem.target[sample, 0], expected)
        assert ((problem.transformed >= 0) & (problem.transformed <= 1)).all()
        assert not torch.equal(problem.transformed, problem.target)
    assert flipped
    assert torch.equal(volumes, before)


def test_problem_depends_on_seed_step_and_sample_alone(pretext: ModelsGenesis) -> None:
    volumes = smooth_volumes(2)
    whole = pretext.pose(volumes, None, draw(3)).transformed
    assert torch.equal(whole, pretext.pose(volumes, None, draw(3)).transformed)
    assert torch.equal(whole[1:], pretext.pose(volumes[1:], None, draw(3, first=1, wanted=1)).transformed)
    assert not torch.equal(whole, pretext.pose(volumes, None, draw(4)).transformed)
    assert not torch.equal(whole, pretext.pose(volumes, None, draw(3, seed=1)).transformed)
    same = pretext.pose(volumes[:1].expand(2, -1, -1, -1, -1), None, draw(3)).transformed
    assert not torch.equal(same[0], same[1])


def test_loss_counts_valid_voxels_that_flip_along(pretext: ModelsGenesis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_genesis, "draw_flips", lambda rng: [0])
    volumes = smooth_volumes(2)
    valid = torch.ones_like(volumes, dtype=torch.bool)
    valid[0, :, :4] = False
    problem = pretext.pose(volumes, valid, draw(0))
    counted = torch.ones_like(valid)
    counted[0, :, -4:] = False
    assert pretext.terms(problem) == counted.sum()
    output = torch.rand(volumes.shape).masked_fill_(~counted, float("nan")).requires_grad_()
    loss = pretext.loss(output, problem, 2 * pretext.terms(problem))
    expected = (output - problem.target)[counted].square().mean() / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert output.grad is not None
    assert (output.grad[~counted] == 0).all()
    assert (output.grad[counted] != 0).any()
    by_hand = (problem.transformed - problem.target)[counted].square().mean()
    assert pretext.trivial_loss(problem) == pytest.approx(float(by_hand), rel=1e-5)
    pretext.figure(problem, output, "title")


def test_restoring_is_learned(pretext: ModelsGenesis) -> None:
    before, after = losses_before_and_after(pretext, steps=40, learning_rate=1e-2)
    assert after < before / 4
