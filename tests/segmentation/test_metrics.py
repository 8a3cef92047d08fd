"""Dice and surface Dice against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from s3d.segmentation.metrics import dice, surface_dice


def test_dice_counts_voxels() -> None:
    truth = np.zeros((2, 3, 4), np.uint8)
    truth[0, :2, :2] = 1  # 4 voxels
    truth[1, 0, :] = 2  # 4 voxels
    prediction = np.zeros_like(truth)
    prediction[0, 0, :3] = 1  # 3 voxels, 2 in common
    prediction[1, 0, :2] = 2  # 2 voxels, all in common
    assert dice(prediction, truth, 3).tolist() == [2 * 2 / 7, 2 * 2 / 6]


def test_dice_of_classes_that_are_absent() -> None:
    truth, prediction = np.zeros((2, 4, 4, 4), np.uint8)
    truth[0] = 1
    prediction[1] = 2
    scores = dice(prediction, truth, 5)
    assert scores[:2].tolist() == [0, 0]  # in one of them
    assert np.isnan(scores[2:]).all()  # in neither


def test_dice_is_that_of_monai() -> None:
    from monai.metrics import compute_dice

    generator = np.random.default_rng(0)
    prediction, truth = generator.integers(0, 4, size=(2, 6, 7, 8))
    one_hot = [torch.from_numpy(np.eye(4)[voxels].transpose(3, 0, 1, 2))[None] for voxels in (prediction, truth)]
    expected = compute_dice(*one_hot, include_background=False)[0]
    np.testing.assert_allclose(dice(prediction, truth, 4), expected, rtol=1e-6)


def _area(code: int, spacing_mm: NDArray[np.float64]) -> float:
    """Area of the surface in a cell whose corner lies on `code` faces of a cuboid, by marching cubes.

    Args:
        code: for each axis whether a face normal to it goes through the cell.
    """
    axes = [axis for axis in range(3) if code >> axis & 1]
    half = spacing_mm / 2
    if len(axes) == 1:
        return math.prod(np.delete(spacing_mm, axes[0]))
    if len(axes) == 2:
        (along,) = {0, 1, 2} - set(axes)
        return float(spacing_mm[along] * np.hypot(*half[axes]))
    return float(np.linalg.norm([half[0] * half[1], half[1] * half[2], half[0] * half[2]])) / 2


def _areas(shape: NDArray[np.int_], spacing_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area in every cell of the surface of a cuboid, [shape + 1]; 0 within."""
    areas = np.zeros(shape + 1)
    for place in np.ndindex(*areas.shape):
        code = sum(1 << axis for axis in range(3) if place[axis] in (0, shape[axis]))
        areas[place] = _area(code, spacing_mm) if code else 0
    return areas


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_surface_dice_of_a_cuboid_that_is_one_layer_too_long(axis: int) -> None:
    spacing_mm = np.array([3.0, 1.0, 2.0])
    shape = np.array([4, 5, 6])
    longer = shape + (np.arange(3) == axis)
    prediction = np.ones(longer, np.uint8)  # it fills the volume
    truth = np.zeros_like(prediction)
    truth[tuple(slice(side) for side in shape)] = 1

    true, predicted = _areas(shape, spacing_mm), _areas(longer, spacing_mm)
    end = [slice(None) if other != axis else -1 for other in range(3)]
    inside_end = [slice(1, -1) if other != axis else -1 for other in range(3)]
    # The inner part of the truth's last face and all of the prediction's lie nowhere on the other surface.
    wrong = true[tuple(inside_end)].sum() + predicted[tuple(end)].sum()
    expected = 1 - wrong / (true.sum() + predicted.sum())
    assert 0.5 < expected < 0.95

    assert surface_dice(prediction, truth, 2, spacing_mm, 0.5).tolist() == pytest.approx([expected], rel=1e-5)
    assert surface_dice(truth, prediction, 2, spacing_mm, 0.5).tolist() == pytest.approx([expected], rel=1e-5)
    # One voxel along this axis is all they are apart.
    assert surface_dice(prediction, truth, 2, spacing_mm, spacing_mm[axis]).tolist() == [1]
    assert surface_dice(prediction, truth, 2, spacing_mm, 0.99 * spacing_mm[axis])[0] < 1


def test_surface_dice_takes_a_voxel_for_a_voxel_however_its_size_is_rounded() -> None:
    truth, prediction = np.zeros((2, 8, 8, 8), np.uint8)
    truth[2:5, 2:5, 2:5] = prediction[3:6, 2:5, 2:5] = 1
    side = float(np.float32(0.7)) + 1e-7
    assert surface_dice(prediction, truth, 2, (side, side, side), 0.7).tolist() == [1]


def test_surface_dice_looks_at_each_class_alone() -> None:
    generator = np.random.default_rng(0)
    truth = np.zeros((12, 12, 12), np.uint8)
    truth[2:6, 2:9, 2:9] = 1
    truth[6:9, 2:9, 2:9] = 2
    prediction = np.where(generator.random(truth.shape) < 0.1, 0, truth)
    both = surface_dice(prediction, truth, 3, (1, 1, 1), 0.5)
    for value in (1, 2):
        alone = surface_dice((prediction == value).astype(int), (truth == value).astype(int), 2, (1, 1, 1), 0.5)
        assert alone[0] == both[value - 1] < 1


def test_surface_dice_of_classes_that_are_absent() -> None:
    truth, prediction = np.zeros((2, 6, 6, 6), np.uint8)
    truth[:2] = 1
    prediction[3:] = 2
    scores = surface_dice(prediction, truth, 4, (1, 1, 1), 10.0)
    assert scores[:2].tolist() == [0, 0]
    assert np.isnan(scores[2])


def test_what_is_no_class_map_is_refused() -> None:
    zeros = np.zeros((4, 4, 4), int)
    for metric in (dice, lambda *given: surface_dice(*given, (1, 1, 1), 1.0)):
        with pytest.raises(ValueError, match="truth has values from 3 to 3; with 3 classes they must be 0 to 2"):
            metric(zeros, zeros + 3, 3)
        with pytest.raises(ValueError, match="prediction has values from -1 to -1"):
            metric(zeros - 1, zeros, 3)
        with pytest.raises(ValueError, match=r"shape \(4, 4, 3\), truth \(4, 4, 4\)"):
            metric(zeros[..., 1:], zeros, 3)
    with pytest.raises(ValueError, match=r"tolerance_mm must be at least 0, got -1"):
        surface_dice(zeros, zeros, 3, (1, 1, 1), -1.0)
