"""How well a class map agrees with the truth: Dice and normalised surface distance of each class.

A class that neither of the two has says nothing: NaN, left out of every mean. A class that only one of them has
scores 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

TOLERANCE_SLACK = 1e-4
"""Relative. Voxel sizes come rounded from headers, and "one voxel away" must not depend on their last digit."""


def dice(
    prediction: NDArray[np.integer],  # any shape
    truth: NDArray[np.integer],  # the same
    classes: int,
) -> NDArray[np.float64]:
    """Dice of every class but the background: 2 |P and T| / (|P| + |T|), counted in voxels.

    Args:
        prediction: class of each voxel, 0 to classes - 1.
        truth: the same.
        classes: how many there are, the background included.
    Returns: [classes - 1]; NaN for a class that is in neither, 0 for one that is in one of them only.
    Raises:
        ValueError: the shapes differ, or a value is no class.
    """
    _check(prediction, truth, classes)
    predicted, true, both = (
        np.bincount(voxels.ravel(), minlength=classes)[1:] for voxels in (prediction, truth, truth[prediction == truth])
    )
    total = predicted + true
    return np.divide(2.0 * both, total, out=np.full(classes - 1, np.nan), where=total > 0)


def surface_dice(
    prediction: NDArray[np.integer],  # [D, H, W]
    truth: NDArray[np.integer],  # [D, H, W]
    classes: int,
    spacing_mm: Sequence[float],  # (depth, height, width)
    tolerance_mm: float,
) -> NDArray[np.float64]:
    """Normalised surface distance (NSD, "surface Dice") of every class but the background.

    The share of both surfaces, by area, that lies within `tolerance_mm` of the other surface. The surfaces are those of
    marching cubes between voxel centres; beyond the volume there is background.

    Args:
        prediction: class of each voxel, 0 to classes - 1.
        truth: the same.
        classes: how many there are, the background included.
        spacing_mm: voxel size.
        tolerance_mm: distance that does not count as an error.
    Returns: [classes - 1]; NaN for a class that is in neither, 0 for one that is in one of them only.
    Raises:
        ValueError: the shapes differ, a value is no class, or the tolerance is negative.
    Source: Nikolov et al., Clinically applicable segmentation of head and neck anatomy for radiotherapy (JMIR 2021),
        as MONAI computes it.
    """
    from monai.metrics import compute_surface_dice
    from scipy.ndimage import find_objects

    _check(prediction, truth, classes)
    if not tolerance_mm >= 0:
        raise ValueError(f"tolerance_mm must be at least 0, got {tolerance_mm}")
    scores = np.full(classes - 1, np.nan)
    boxes = (find_objects(voxels, max_label=classes - 1) for voxels in (prediction, truth))
    for value, (predicted, true) in enumerate(zip(*boxes), start=1):
        if predicted is None and true is None:
            continue
        if predicted is None or true is None:
            scores[value - 1] = 0.0
            continue
        # All there is of the class: MONAI passes over what it is given several times.
        box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(predicted, true))
        with warnings.catch_warnings():
            # Of MONAI 1.5 to 1.6 to itself.
            warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
            score = compute_surface_dice(
                torch.from_numpy(prediction[box] == value)[None, None],
                torch.from_numpy(truth[box] == value)[None, None],
                class_thresholds=[tolerance_mm * (1 + TOLERANCE_SLACK)],
                include_background=True,  # one class is passed, and it is none
                spacing=[float(side) for side in spacing_mm],
                use_subvoxels=True,
            )
        scores[value - 1] = score.item()
    return scores


def _check(prediction: NDArray[np.integer], truth: NDArray[np.integer], classes: int) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}; both must have the same")
    for name, voxels in (("prediction", prediction), ("truth", truth)):
        if voxels.size and not 0 <= int(voxels.min()) <= int(voxels.max()) < classes:
            raise ValueError(
                f"{name} has values from {voxels.min()} to {voxels.max()}; with {classes} classes they must be 0 to "
                f"{classes - 1}"
            )
