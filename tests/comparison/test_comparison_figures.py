"""Figures of a comparison show every method, told apart, and only what there is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_results import evaluated, pretrained, random_results, results_of
from matplotlib.figure import Figure

from s3d.comparison.figures import (
    colours_of,
    cost_figure,
    labels_figure,
    learning_curves_figure,
    pretext_figure,
    pretraining_losses_figure,
)
from s3d.comparison.results import Results
from s3d.comparison.standings import Scoreboard, label_standings, standings
from s3d.report import save_figure


def _texts(figure: Figure) -> list[list[str]]:
    """Names in the legend of each panel that has one."""
    legends = [axes.get_legend() for axes in figure.axes]
    return [[text.get_text() for text in legend.get_texts()] for legend in legends if legend is not None]


@pytest.mark.parametrize("methods", [1, 20])
def test_every_method_is_drawn_in_colours_that_differ_within_a_panel(methods: int, tmp_path: Path) -> None:
    results = random_results(methods, seeds=2, cases=4)
    scoreboard = Scoreboard(results, "m0")
    names = list(results.methods)
    curves = learning_curves_figure(scoreboard, names)
    of_labels = labels_figure({"liver": label_standings(scoreboard, names, "liver")}, names, "m0")
    for figure in (curves, of_labels):
        panels = _texts(figure)
        assert {name for panel in panels for name in panel} == set(names)
        assert all("m0" in panel and len(panel) <= 6 for panel in panels)
        colours = colours_of(names, "m0")
        assert all(len({colours[name] for name in panel}) == len(panel) for panel in panels)
    assert len(_texts(curves)) == 3 * math.ceil(max(1, methods - 1) / 5)
    save_figure(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    cost = cost_figure(standings(scoreboard, names).rows, names, "m0")
    assert _texts(cost) == [["m0 (no pre-training)", *names[1:]]]
    losses = pretraining_losses_figure(results, names)
    assert [axes.get_title() for axes in losses.axes if axes.get_title()] == names[1:]


def test_colours_do_not_depend_on_what_is_shown() -> None:
    assert colours_of(["a", "ref", "b"], "ref") == {"ref": "black", "a": "C0", "b": "C1"}


def test_learning_curve_is_the_mean_over_seeds_with_their_range() -> None:
    cells = [
        replace(evaluated("a", [0.5], seed=0), curve=((10, 0.2), (20, 0.4), (30, 0.9))),
        replace(evaluated("a", [0.5], seed=1), curve=((10, 0.4), (20, 0.8))),  # was given fewer steps
        replace(evaluated("b", [0.5], seed=0), curve=((10, 0.1),)),
        replace(evaluated("b", [0.5], seed=1), curve=()),
    ]
    figure = learning_curves_figure(Scoreboard(results_of(cells), "a"), ["a", "b"])
    line = figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [[10, 0.3], [20, 0.6]])
    vertices = figure.axes[0].collections[0].get_paths()[0].vertices
    assert (vertices[:, 1].min(), vertices[:, 1].max()) == (0.2, 0.8)
    assert _texts(figure) == [["a", "b (1 of 2)"]]


def test_cost_figure_has_the_average_at_its_cost_and_no_unfinished_method() -> None:
    cells = [evaluated("scratch", [0.4]), evaluated("a", [0.5]), evaluated("b", [0.7]), evaluated("c", [0.9])]
    cells += [evaluated(name, [0.5], "spleen") for name in ("scratch", "a", "b")]
    results = results_of(cells, [pretrained("a", steps=30), pretrained("b", steps=600), pretrained("c")])
    rows = standings(Scoreboard(results, "scratch"), results.methods).rows
    time, operations = cost_figure(rows, results.methods, "scratch").axes
    assert [tuple(line.get_xydata()[0]) for line in time.lines if line.get_marker() == "o"] == [(1, 0.5), (20, 0.6)]
    assert [line.get_xdata()[0] for line in operations.lines if line.get_marker() == "o"] == [0.15, 3]
    assert time.get_xscale() == "log"
    assert [text.get_text() for text in operations.get_legend().get_texts()] == ["scratch (no pre-training)", "a", "b"]


def test_losses_are_each_on_their_own_axis_with_the_trivial_loss() -> None:
    silent = replace(pretrained("b"), trivial_loss=math.nan, loss_label="cross-entropy")
    results = results_of(
        [evaluated("a", [0.5]), evaluated("b", [0.5])], [pretrained("a", 0), pretrained("a", 1), silent]
    )
    first, second = pretraining_losses_figure(results, ["a", "b"]).axes[:2]
    assert not first.get_shared_y_axes().joined(first, second)
    assert [tuple(line.get_ydata()) for line in first.lines if line.get_linestyle() == "-"] == [(0.9, 0.7), (0.9, 0.6)]
    assert {tuple(line.get_ydata()) for line in first.lines if line.get_linestyle() == "--"} == {(1, 1)}
    assert len(second.lines) == 1
    assert second.get_ylabel() == "cross-entropy"


def test_contact_sheet_shows_the_last_pictures(tmp_path: Path) -> None:
    picture = Figure(figsize=(1, 1))
    save_figure(picture, tmp_path / "runs" / "a.png")
    cells = [evaluated(name, [0.5]) for name in ("a", "b", "c")]
    runs = [pretrained("a", picture=Path("runs/a.png")), pretrained("b", picture=Path("runs/b.png")), pretrained("c")]
    figure = pretext_figure(results_of(cells, runs), ["a", "b", "c"], tmp_path)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert [len(axes.images) for axes in figure.axes] == [1, 0]
    assert figure.axes[1].texts[0].get_text() == "runs/b.png is gone"


def test_figures_without_anything_to_show_say_so(tmp_path: Path) -> None:
    results = Results(("a",), ("liver",), (), (), 2)
    scoreboard = Scoreboard(results, "a")
    figures = [
        learning_curves_figure(scoreboard, ["a"]),
        cost_figure(standings(scoreboard, ["a"]).rows, ["a"], "a"),
        pretraining_losses_figure(results, ["a"]),
        pretext_figure(results, ["a"], tmp_path),
    ]
    assert all(figure.axes[0].texts[0].get_text().startswith("no ") for figure in figures)
