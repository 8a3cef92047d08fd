"""What the pictures show: the right planes, both class maps, the classes that are there."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from s3d.segmentation.pictures import segmentation_figure

NAMES = ("background", "first", "second", "never")


def _titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def _extent(figure: Figure, plane: int, contour: int) -> list[list[float]]:
    """Lowest and highest coordinates, (across, up), of a contour."""
    vertices = np.concatenate([path.vertices for path in figure.axes[plane].collections[contour].get_paths()])
    return [vertices.min(axis=0).tolist(), vertices.max(axis=0).tolist()]


def test_planes_are_those_of_the_largest_section_and_show_both_class_maps() -> None:
    truth = np.zeros((60, 50, 40), np.uint8)
    truth[30:34, 20:26, 10:14] = 1
    truth[33, 20:26, 14:17] = 2
    prediction = np.zeros_like(truth)
    prediction[30:34, 21:27, 10:14] = 1
    image = np.random.default_rng(0).normal(size=truth.shape).astype(np.float32)
    figure = segmentation_figure(image, truth, prediction, NAMES, "a case", spacing_mm=(3, 1, 2))

    assert _titles(figure) == ["axial, slice 33", "coronal, slice 20", "sagittal, slice 10"]
    assert [axes.get_aspect() for axes in figure.axes] == [1 / 2, 3 / 2, 3]
    # 8 voxels around what is segmented (depth 30-34, height 20-27, width 10-17).
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), image[33, 12:35, 2:25])
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), image[22:42, 20, 2:25])
    # First class and second of the truth, then the prediction's one; coordinates count from the cut.
    contours = figure.axes[0].collections
    assert [contour.get_linestyle()[0][1] is None for contour in contours] == [True, True, False]
    assert _extent(figure, 0, 0) == [[7.5, 7.5], [11.5, 13.5]]
    assert _extent(figure, 0, 1) == [[11.5, 7.5], [14.5, 13.5]]
    assert _extent(figure, 0, 2) == [[7.5, 8.5], [11.5, 14.5]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["truth", "prediction", "first", "second"]


def test_planes_where_the_truth_is_empty() -> None:
    empty = np.zeros((10, 12, 14), np.uint8)
    prediction = empty.copy()
    prediction[2, 3, 4] = 1
    image = np.zeros(empty.shape, np.float32)
    found = segmentation_figure(image, empty, prediction, NAMES, "a case")
    assert _titles(found) == ["axial, slice 2", "coronal, slice 3", "sagittal, slice 4"]
    nothing = segmentation_figure(image, empty, empty, NAMES, "a case")
    assert _titles(nothing) == ["axial, slice 5", "coronal, slice 6", "sagittal, slice 7"]


def test_a_class_that_fills_the_volume_has_a_contour(tmp_path) -> None:
    full = np.ones((6, 7, 8), np.uint8)
    figure = segmentation_figure(np.zeros(full.shape, np.float32), full, full, NAMES, "a case")
    assert _extent(figure, 0, 0) == [[-0.5, -0.5], [7.5, 6.5]]
    figure.savefig(tmp_path / "figure.png")


def test_other_shapes_are_refused() -> None:
    image = np.zeros((4, 4, 4), np.float32)
    with pytest.raises(ValueError, match=r"shapes \(4, 4, 4\), \(4, 4, 3\) and \(4, 4, 4\)"):
        segmentation_figure(image, image[..., 1:].astype(int), image.astype(int), NAMES, "a case")
