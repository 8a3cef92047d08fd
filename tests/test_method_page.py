"""docs/method.md: its examples give what it prints, its picture is of the code of today."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import numpy as np
import torch

from s3d.decoder import _fusing_pays
from s3d.figure_file import write_figure
from s3d.known_figure import (
    BLOCK,
    CELLS,
    CONSTANT,
    FIRST,
    ONE,
    SECOND,
    SEEN,
    SMALL,
    TWO,
    VISIBLE,
    computed_tiles,
    drawn_data,
    kinds_of_voxels,
    known_figure,
    values_of_ones,
)
from s3d.model import TILE_ON_CPU as TILE
from s3d.model import build_unet

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "method.md").read_text()
PICTURE = DOCS / "images" / "known_beforehand.png"


def test_the_examples_of_the_page_print_what_it_says() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```pycon\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == PAGE.count("```pycon") > 0
    for block in blocks:
        test = doctest.DocTestParser().get_doctest(block, names, "docs/method.md", None, None)
        said: list[str] = []
        failed, tried = doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
        assert tried > 0
        assert failed == 0, "".join(said)
        names.update(test.globs)  # the next block goes on


def test_the_sums_of_the_table_are_those_of_its_rows() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.split("| GFLOP |")[1].split("\n\n")[0].splitlines()[2:]]
    *parts, sums, ratios = ([float(cell.replace(",", "")) for cell in row[1:]] for row in rows)
    assert np.asarray(parts).shape == (6, 7)
    np.testing.assert_allclose(np.sum(parts, 0), sums, atol=0.3)
    np.testing.assert_allclose(sums[0] / np.asarray(sums), ratios, atol=0.006)


def test_the_three_finest_stages_of_a_large_patch_are_fused() -> None:
    with torch.device("meta"):
        decoder = build_unet("resenc-l").decoder
    stages = zip(decoder.transpconvs[::-1], decoder.stages[::-1], strict=True)
    fused = [
        _fusing_pays(up, stage.convs[0].conv.weight, (160 // 2**depth) ** 3) for depth, (up, stage) in enumerate(stages)
    ]
    assert fused == [True, True, True, False, False]


def test_the_picture_shows_how_far_convolutions_reach() -> None:
    size = CELLS * BLOCK
    visible = np.zeros((size, size), dtype=bool)
    for row, column in VISIBLE:
        visible[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] = True
    seen = np.argwhere(visible)
    kinds = kinds_of_voxels()
    tiles = set()
    for (row, column), kind in np.ndenumerate(kinds):
        away = np.abs(seen - (row, column)).max(1).min()
        border = min(row, column, size - 1 - row, size - 1 - column)
        beyond = {0: FIRST, 1: SECOND}.get(border, CONSTANT)
        assert kind == {0: SEEN, 1: ONE, 2: TWO}.get(away, beyond)
        if away <= 2:
            tiles.add((row // TILE * TILE, column // TILE * TILE))
    assert set(computed_tiles()) == tiles


def test_the_picture_shows_what_convolutions_make_of_ones() -> None:
    volume = torch.ones(1, 1, SMALL, SMALL)
    for values in values_of_ones():
        volume = torch.nn.functional.conv2d(volume, torch.ones(1, 1, 3, 3), padding=1)
        np.testing.assert_array_equal(values, volume[0, 0])


def test_the_numbers_in_the_picture_are_those_values() -> None:
    _, *panels = known_figure().axes
    for axes, values in zip(panels, values_of_ones(), strict=True):
        assert [int(text.get_text()) for text in axes.texts] == values.flatten().tolist()


def test_the_picture_of_the_page_is_of_this_code(tmp_path: Path) -> None:
    """If not: python -m s3d.known_figure docs/images/known_beforehand.png"""
    assert "(images/known_beforehand.png)" in PAGE
    assert drawn_data().encode() in PICTURE.read_bytes()
    write_figure(tmp_path / "new.png", known_figure(), drawn_data())
    assert drawn_data().encode() in (tmp_path / "new.png").read_bytes()
