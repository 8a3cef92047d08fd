"""Writes what a comparison has found: tables, the numbers they are made from, figures, and one page of all."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from s3d.data.store import write_atomically
from s3d.html_page import (
    Html,
    html_code,
    html_heading,
    html_link,
    html_list,
    html_page,
    html_picture,
    html_table,
    html_text,
)
from s3d.report import save_figure

from .csv_tables import cells_csv, labels_csv, pretraining_csv, standings_csv
from .figures import (
    cost_figure,
    labels_figure,
    learning_curves_figure,
    pretext_figure,
    pretraining_losses_figure,
)
from .kept_protocol import KEPT
from .machine import machine_rows
from .notes import progress_note, statistics_notes
from .results import Results
from .standings import (
    LabelStanding,
    Scoreboard,
    Standings,
    datasets_with_several_labels,
    label_standings,
    standings,
)
from .tables import Cell, LinkedTable, labels_table, standings_table

PAGE = "comparison.html"
CELLS = "cells.csv"
PRETRAINING = "pretraining.csv"
COMPARISON_TITLE = "Comparison"
ABLATION_TITLE = "Ablation"


def write_comparison(
    title: str,
    description: str,
    results: Results,
    comparison: Sequence[str],
    ablation: Sequence[str],
    reference: str,
    output_dir: Path,
) -> str:
    """Write the tables (Markdown, CSV), `cells.csv`, `pretraining.csv`, the figures and `comparison.html`.

    Each file is as it was before or complete, whenever the process stops. All can be written again at any time.

    Args:
        title: of the page.
        description: what the comparison is about.
        results: all that has been measured so far.
        comparison: methods of the table of comparison, in its order.
        ablation: methods of the table of ablations, in its order; empty: there is none.
        reference: the method that the others are compared with.
        output_dir: folder of the comparison, that the folders in the results are relative to.
    Returns: the tables and their notes, Markdown.
    Raises:
        ValueError: there is no such method, or the results do not fit each other; says which.
        OSError: a file could not be written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    scoreboard = Scoreboard(results, reference)
    every = list(dict.fromkeys([*comparison, *ablation]))
    wanted = (("comparison", COMPARISON_TITLE, comparison), ("ablation", ABLATION_TITLE, ablation))
    found = {stem: (heading, standings(scoreboard, methods)) for stem, heading, methods in wanted if methods}
    by_labels = {
        dataset: label_standings(scoreboard, every, dataset)
        for dataset in datasets_with_several_labels(scoreboard.tasks)
    }
    whole = standings(scoreboard, every)
    notes = [note for note in [progress_note(results), *statistics_notes(results, whole)] if note is not None]

    _write(output_dir / CELLS, cells_csv(results))
    _write(output_dir / PRETRAINING, pretraining_csv(results))
    tables = _write_tables(found, by_labels, scoreboard, notes, output_dir)
    pictures = _write_figures(scoreboard, whole, by_labels, output_dir)

    parts = [html_text(description)] if description else []
    for table in tables:
        parts += [html_heading(table.title), linked_table(table), html_list(table.notes)]
    parts += [html_heading("What the numbers mean"), html_list(notes)]
    for path, caption in pictures:
        parts += [html_heading(caption), html_picture(path, caption)]
    parts += _sources(output_dir)
    _write(output_dir / PAGE, html_page(title, parts))
    return _markdown([table.markdown() for table in tables], notes)


def _write_tables(
    found: dict[str, tuple[str, Standings]],
    by_labels: dict[str, list[LabelStanding]],
    scoreboard: Scoreboard,
    notes: list[str],
    output_dir: Path,
) -> list[LinkedTable]:
    tables = []
    for stem, (heading, rows) in found.items():
        table = standings_table(heading, rows)
        _write(output_dir / f"{stem}.csv", standings_csv(rows))
        _write(output_dir / f"{stem}.md", _markdown([table.markdown()], notes))
        tables.append(table)
    if by_labels:
        seeds = len(scoreboard.seeds)
        of_labels = [labels_table(dataset, rows, scoreboard.reference, seeds) for dataset, rows in by_labels.items()]
        all_rows = [row for rows in by_labels.values() for row in rows]
        _write(output_dir / "labels.csv", labels_csv(all_rows, seeds))
        _write(output_dir / "labels.md", _markdown([table.markdown() for table in of_labels], notes))
        tables += of_labels
    return tables


def _write_figures(
    scoreboard: Scoreboard, whole: Standings, by_labels: dict[str, list[LabelStanding]], output_dir: Path
) -> list[tuple[Path, str]]:
    """The files and their captions."""
    results, reference = scoreboard.results, scoreboard.reference
    methods = [row.method for row in whole.rows]
    figures = [
        (
            "learning_curves.png",
            "Fine-tuning: validation Dice, mean and range of the seeds",
            learning_curves_figure(scoreboard, methods),
        ),
        (
            "cost.png",
            "Average Dice and cost of pre-training",
            cost_figure(whole.rows, results.methods, reference),
        ),
        (
            "pretraining_losses.png",
            "Pre-training: validation loss; dashed where nothing is learned; not comparable between methods",
            pretraining_losses_figure(results, methods),
        ),
        (
            "pretext.png",
            "What the methods learn from: their last pictures",
            pretext_figure(results, methods, output_dir),
        ),
    ]
    if by_labels:
        figure = labels_figure(by_labels, results.methods, reference)
        figures.insert(1, ("labels.png", "Dice and number of labels, with intervals", figure))
    for name, _, figure in figures:
        save_figure(figure, output_dir / name)
    return [(output_dir / name, caption) for name, caption, _ in figures]


def linked_table(table: LinkedTable) -> str:
    """A table as HTML: below each number small links to the folders of the runs that it comes from."""
    rows = [[_linked_cell(cell) for cell in row] for row in table.rows]
    return f'<div style="overflow-x: auto">{html_table(table.header, rows)}</div>'


def _linked_cell(cell: Cell) -> Html:
    text = html.escape(cell.text)
    tag = {0: "", 1: "strong", 2: "em"}[cell.place]
    if tag:
        text = f"<{tag}>{text}</{tag}>"
    links = ", ".join(html_link(name, f"{folder.as_posix()}/") for name, folder in cell.folders)
    return Html(f"{text}<br><small>{links}</small>" if links else text)


def _sources(output_dir: Path) -> list[str]:
    """Where every number comes from: runs, configuration, machine."""
    rows = [
        ("runs that were fine-tuned", html_link(CELLS, CELLS)),
        ("runs that were pre-trained", html_link(PRETRAINING, PRETRAINING)),
    ]
    parts = [html_heading("Runs"), html_table(("", ""), rows)]
    if (output_dir / KEPT).is_file():
        parts += [html_heading("Configuration"), html_code((output_dir / KEPT).read_text(encoding="utf-8"))]
    return [*parts, html_heading("Machine that wrote this page"), html_table(("", ""), machine_rows())]


def _markdown(tables: list[str], notes: list[str]) -> str:
    meaning = "\n".join(["## What the numbers mean", "", *(f"- {note}" for note in notes)])
    return "\n\n".join([*tables, meaning]) + "\n"


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())
