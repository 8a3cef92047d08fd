"""The page of a comparison: which files are written, and that its numbers lead to the folders of their runs."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from made_up_results import evaluated, pretrained, random_results, results_of
from matplotlib.figure import Figure

import s3d.comparison.page
from s3d.comparison.page import write_comparison
from s3d.comparison.results import Results

FIGURES = {"cost.png", "learning_curves.png", "pretext.png", "pretraining_losses.png"}


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty figures, which are drawn at once."""
    for name in dir(s3d.comparison.page):
        if name.endswith("_figure") and name != "save_figure":
            monkeypatch.setattr(s3d.comparison.page, name, lambda *_: Figure(figsize=(1, 1)))


@pytest.mark.usefixtures("without_figures")
def test_all_files_are_written_and_the_tables_returned(tmp_path: Path) -> None:
    results = random_results(methods=3)
    markdown = write_comparison("Title", "About.", results, ["m0", "m2"], ["m2", "m1"], "m0", tmp_path)
    expected = {"comparison.md", "comparison.csv", "ablation.md", "ablation.csv", "labels.md", "labels.csv"}
    expected |= {"cells.csv", "pretraining.csv", "comparison.html", "labels.png"} | FIGURES
    assert {path.name for path in tmp_path.iterdir()} == expected  # and nothing unfinished
    headings = re.findall("^## (.*)$", markdown, flags=re.M)
    assert headings == ["Comparison", "Ablation", "Number of labels: liver", "What the numbers mean"]
    rows = re.findall(r"^\| (m\d) \|", (tmp_path / "ablation.md").read_text(encoding="utf-8"), flags=re.M)
    assert rows == ["m2", "m1"]
    again = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert write_comparison("Title", "About.", results, ["m0", "m2"], ["m2", "m1"], "m0", tmp_path) == markdown
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == again


@pytest.mark.usefixtures("without_figures")
def test_numbers_of_the_page_lead_to_their_runs(tmp_path: Path) -> None:
    cells = [evaluated(name, [0.5, 0.7], seed=seed) for name in ("a", "b % <c>") for seed in (0, 1)]
    results = results_of(cells, [pretrained("a")])
    for cell in (*results.evaluated, *results.pretrained):
        (tmp_path / cell.folder).mkdir(parents=True)
    (tmp_path / "protocol.json").write_text('{"seeds": [0, 1]}', encoding="utf-8")
    write_comparison("T & U", "A < B", results, list(results.methods), [], "a", tmp_path)
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    targets = [unquote(target) for target in re.findall('href="([^"]*)"', page)]
    folders = [target for target in targets if target.endswith("/")]
    assert len(folders) == 5
    assert {tmp_path / folder for folder in folders} == {
        tmp_path / cell.folder for cell in (*results.evaluated, *results.pretrained)
    }
    assert all((tmp_path / target).exists() for target in targets)
    assert "<title>T &amp; U</title>" in page
    assert "A &lt; B" in page
    assert "<c>" not in page
    assert "{&quot;seeds&quot;: [0, 1]}" in page
    assert "torch" in page[page.index("Machine that wrote this page") :]
    assert not (tmp_path / "ablation.md").exists()
    assert not (tmp_path / "labels.md").exists()


@pytest.mark.usefixtures("without_figures")
def test_best_is_marked_on_the_page(tmp_path: Path) -> None:
    cells = [evaluated(name, [dice]) for name, dice in (("a", 0.5), ("b", 0.7), ("c", 0.6))]
    write_comparison("T", "", results_of(cells), ["a", "b", "c"], [], "a", tmp_path)
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert page.count("<strong>70.00</strong>") == 2  # the data set and the average
    assert page.count("<em>60.00</em>") == 2


def test_nothing_finished_yet(tmp_path: Path) -> None:
    results = Results(("a", "b"), ("liver",), (), (), 4)
    markdown = write_comparison("T", "", results, ["a", "b"], ["b"], "a", tmp_path)
    assert "Unfinished: 0 of 4 runs are done" in markdown
    assert {path.name for path in tmp_path.glob("*.png")} == FIGURES


def test_unknown_methods_are_named_before_anything_is_written(tmp_path: Path) -> None:
    results = results_of([evaluated("a", [0.5])])
    with pytest.raises(ValueError, match="there is no method 'z'"):
        write_comparison("T", "", results, ["a", "z"], [], "a", tmp_path)
    assert list(tmp_path.iterdir()) == []
