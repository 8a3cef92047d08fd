"""The picture of docs/method.md: what of a convolution's result is computed, and what is known beforehand.

python -m s3d.known_figure docs/images/known_beforehand.png

All of it is drawn from what s3d_kernels gives for a volume one voxel deep.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from s3d_kernels import Background, BlockMask, BlockSparseTensor, FilledTensor

from .figure_file import digest, write_figure
from .model import TILE_ON_CPU as TILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Cells of the mask, and which are visible; voxels of a cell and of the volume in the second panel, along an axis.
CELLS, VISIBLE, BLOCK, SMALL = 4, ((0, 2), (2, 0), (2, 1), (3, 3)), 8, 9

# Colours that differ in brightness too, after Okabe and Ito.
KINDS = (
    ("the constant, one vector", "#f4f4f4"),
    ("2nd voxel from the border", "#cfcfcf"),
    ("1st voxel from the border", "#a8a8a8"),
    ("visible", "#0072b2"),
    ("reached by the first convolution", "#e69f00"),
    ("reached by the second", "#f0e442"),
)
CONSTANT, SECOND, FIRST, SEEN, ONE, TWO = range(len(KINDS))


def kinds_of_voxels() -> np.ndarray:
    """[D, D] index into KINDS: a slice through a masked volume behind two convolutions."""
    filled = _filled()
    size = CELLS * BLOCK
    kinds = np.full((size, size), CONSTANT)
    for kind, distance in ((SECOND, 1), (FIRST, 0)):
        for row in (distance, size - 1 - distance):
            kinds[row, distance : size - distance] = kinds[distance : size - distance, row] = kind
    reached = [filled]
    for _ in range(2):
        reached.append(reached[-1].conv3d(torch.ones(1, 1, 1, 3, 3)))
    for kind, step in ((TWO, 2), (ONE, 1), (SEEN, 0)):
        kinds[reached[step].correction.to_dense()[0, 0, 0].numpy() > 0] = kind
    return kinds


def computed_tiles() -> list[tuple[int, int]]:
    """First row and column of each tile that the second convolution computes."""
    twice = _filled().conv3d(torch.ones(1, 1, 1, 3, 3)).conv3d(torch.ones(1, 1, 1, 3, 3))
    return [(TILE * row, TILE * column) for _, _, row, column in twice.correction.mask.index.tolist()]


def values_of_ones() -> list[np.ndarray]:
    """[9, 9] each: what one and two convolutions with nine ones make of a volume of ones."""
    background = Background.constant(torch.ones(1), (1, SMALL, SMALL))
    values = []
    for _ in range(2):
        background = background.conv3d(torch.ones(1, 1, 1, 3, 3))
        values.append(background.to_dense()[0, 0].numpy())
    return values


def known_figure() -> Figure:
    """Left: voxels of a slice by what has to be computed. Right: what convolutions make of a constant volume."""
    # Not at the head of the file: who trains needs no matplotlib for it.
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    figure = Figure(figsize=(13.5, 5.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    kinds = kinds_of_voxels()
    left.imshow(kinds, cmap=ListedColormap([colour for _, colour in KINDS]), vmin=-0.5, vmax=len(KINDS) - 0.5)
    for row, column in computed_tiles():
        left.add_patch(Rectangle((column - 0.5, row - 0.5), TILE, TILE, fill=False, linewidth=0.5, edgecolor="0.15"))
    for edge in range(BLOCK, CELLS * BLOCK, BLOCK):
        left.axhline(edge - 0.5, color="black", linewidth=1.2, linestyle=":")
        left.axvline(edge - 0.5, color="black", linewidth=1.2, linestyle=":")
    left.set_title("Correction: only the outlined tiles are computed")
    named = [KINDS[kind] for kind in (SEEN, ONE, TWO, FIRST, SECOND, CONSTANT)]
    patches = [Patch(facecolor=colour, edgecolor="0.4", label=name) for name, colour in named]
    figure.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.71, 0.02), ncols=2, frameon=False)
    titles = ("Background behind one convolution:\n3 positions an axis", "behind two:\n5 positions an axis")
    for axes, values, title in zip((middle, right), values_of_ones(), titles, strict=True):
        _show_values(axes, values)
        axes.set_title(title)
    for axes in (left, middle, right):
        axes.set_anchor("N")
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def drawn_data() -> str:
    """Digest of what the figure shows."""
    values = [of_step.tolist() for of_step in values_of_ones()]
    return digest([kinds_of_voxels().tolist(), computed_tiles(), values, KINDS])


def _show_values(axes: Axes, values: np.ndarray) -> None:
    axes.imshow(values, cmap="gray", vmin=-0.4 * values.max(), vmax=1.04 * values.max())  # light enough for black text
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=11)


def _filled() -> FilledTensor:
    """Ones at visible voxels, over nothing."""
    grid = torch.zeros(1, 1, CELLS, CELLS, dtype=torch.bool)
    for row, column in VISIBLE:
        grid[0, 0, row, column] = True
    mask = BlockMask.from_grid(grid, (1, BLOCK, BLOCK)).split((1, TILE, TILE))
    ones = torch.ones(mask.num_blocks, *mask.block, 1)
    return FilledTensor(BlockSparseTensor(ones, mask), Background.constant(torch.zeros(1), mask.shape))


if __name__ == "__main__":
    write_figure(Path(sys.argv[1]), known_figure(), drawn_data())
