"""Pictures of segmentations: the truth and a prediction as contours on the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from s3d.report import PLANES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN = 0.4  # of the side of what is segmented, shown around it at either side ...
MIN_MARGIN = 8  # ... and at least so many voxels
STYLES: dict[str, Literal["solid", "dashed"]] = {"truth": "solid", "prediction": "dashed"}


def segmentation_figure(
    image: NDArray[np.floating],  # [D, H, W]
    truth: NDArray[np.integer],  # [D, H, W]
    prediction: NDArray[np.integer],  # [D, H, W]
    class_names: Sequence[str],
    title: str,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),  # (depth, height, width)
) -> Figure:
    """Three planes, each where the truth's foreground is largest, cut to the surroundings of what is segmented.

    Truth is drawn solid, the prediction dashed, a colour a class. Where the truth has no foreground, the planes are
    those of the prediction; where neither has, the middle ones.

    Args:
        image: one channel; grey values from its 0.5 to its 99.5 % point.
        truth: class of each voxel; 0 is the background.
        prediction: the same.
        class_names: of the values, that of the background first.
        title: above the planes.
        spacing_mm: voxel size, so that the planes have their true proportions.
    Raises:
        ValueError: the three shapes differ.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not image.shape == truth.shape == prediction.shape:
        raise ValueError(
            f"image, truth and prediction have shapes {image.shape}, {truth.shape} and {prediction.shape}; they must "
            "be the same"
        )
    foreground = (truth > 0) | (prediction > 0)
    box = _surroundings(foreground)
    places = _largest_sections(truth > 0 if (truth > 0).any() else foreground)
    low, high = np.percentile(image, [0.5, 99.5])
    colours: dict[int, str] = {}  # of the classes that these sections show

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for plane, axes in enumerate(figure.subplots(1, 3)):
        height_mm, width_mm = (side for axis, side in enumerate(spacing_mm) if axis != plane)
        section = tuple(places[plane] if axis == plane else side for axis, side in enumerate(box))
        axes.imshow(image[section], cmap="gray", vmin=low, vmax=high, origin="lower", aspect=height_mm / width_mm)
        for classes, style in zip((truth[section], prediction[section]), STYLES.values()):
            for value in np.unique(classes[classes > 0]).tolist():
                colours[value] = f"C{(value - 1) % 10}"
                # Background around the box, so that contours are closed at its edge too.
                inside = np.pad(classes == value, 1)
                across, up = (np.arange(side) - 1 for side in reversed(inside.shape))
                look = {"colors": [colours[value]], "linestyles": style, "linewidths": 1.4}
                axes.contour(across, up, inside, levels=[0.5], **look)
        axes.set_title(f"{PLANES[plane]}, slice {places[plane]}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    lines = [Line2D([], [], color="0.3", linestyle=style, label=name) for name, style in STYLES.items()]
    lines += [Line2D([], [], color=colours[drawn], label=class_names[drawn]) for drawn in sorted(colours)]
    figure.legend(handles=lines, loc="outside right center", fontsize=8, frameon=False)
    return figure


def _surroundings(foreground: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The box of the foreground with a margin; the whole volume where there is none."""
    box = []
    for axis, side in enumerate(foreground.shape):
        places = np.flatnonzero(foreground.any(axis=tuple(other for other in range(3) if other != axis)))
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, side - 1)
        margin = max(MIN_MARGIN, round(MARGIN * (last - first)))
        box.append(slice(max(0, first - margin), last + margin + 1))
    depth, height, width = box
    return depth, height, width


def _largest_sections(foreground: NDArray[np.bool_]) -> list[int]:
    """Along each axis, where the section of the foreground is largest; the middle where there is none."""
    sizes = [foreground.sum(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
    return [int(size.argmax()) if size.any() else len(size) // 2 for size in sizes]
