"""Tables of a comparison against numbers recomputed by hand, on made-up scores."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from made_up_results import evaluated, pretrained, random_results, results_of
from scipy.stats import wilcoxon

from s3d.comparison.csv_tables import cells_csv, labels_csv, pretraining_csv, standings_csv
from s3d.comparison.notes import progress_note, statistics_notes
from s3d.comparison.results import EvaluatedCell, Results
from s3d.comparison.standings import Scoreboard, Standings, Task, label_standings, standings
from s3d.comparison.tables import LinkedTable, amount, duration, labels_table, standings_table
from s3d.segmentation.comparison import holm

LIVER, SPLEEN = Task("liver", None), Task("spleen", None)


def _standings(results: Results, reference: str) -> Standings:
    return standings(Scoreboard(results, reference), results.methods)


def _rows(table: LinkedTable) -> dict[str, dict[str, str]]:
    """method -> column -> text."""
    return {row[0].text: dict(zip(table.header, (cell.markdown() for cell in row), strict=True)) for row in table.rows}


def _read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_tasks_are_ordered_as_configured_and_by_labels() -> None:
    cells = [evaluated("a", [0.5], "spleen", n) for n in (16, None, 8)] + [evaluated("a", [0.5], "liver", 100)]
    found = Scoreboard(results_of(cells), "a").tasks
    assert found == (Task("spleen", 8), Task("spleen", 16), Task("spleen", None), Task("liver", 100))
    assert [str(task) for task in found[1:3]] == ["spleen, 16 labels", "spleen, all labels"]


def test_mean_is_over_classes_of_a_case_then_cases_and_seeds() -> None:
    nan = math.nan
    cells = [
        evaluated("a", [[0.2, 0.4], [nan, 0.9]], seed=0),  # cases: 0.3, 0.9
        evaluated("a", [[0.4, 0.4], [0.6, 0.2]], seed=1),  # cases: 0.4, 0.4
    ]
    row = _standings(results_of(cells), "a").rows[0]
    assert row.scores[LIVER].dice.mean == pytest.approx((0.3 + 0.9 + 0.4 + 0.4) / 4)
    assert row.scores[LIVER].seeds == (0, 1)
    assert row.scores[LIVER].folders == (cells[0].folder, cells[1].folder)


def test_average_counts_tasks_alike_and_its_interval_holds_it() -> None:
    cells = [evaluated("a", [0.1, 0.3]), evaluated("a", [0.8, 0.9, 1.0, 0.9], "spleen")]
    average = _standings(results_of(cells), "a").rows[0].average
    assert average is not None
    assert average.mean == pytest.approx((0.2 + 0.9) / 2)
    assert average.low < average.mean < average.high
    # No further than all cases being the worst, or the best, of their data set.
    assert average.low >= (0.1 + 0.8) / 2
    assert average.high <= (0.3 + 1.0) / 2


def test_same_cases_under_other_labels_do_not_narrow_the_interval() -> None:
    generator = np.random.default_rng(0)
    dice, gain = generator.uniform(0.3, 0.9, size=(2, 20)), generator.normal(0, 0.1, size=20)
    cells = [evaluated("ref", dice[seed], labels=n, seed=seed) for n in (8, None) for seed in (0, 1)]
    cells += [evaluated("a", dice[seed] + gain, labels=n, seed=seed) for n in (8, None) for seed in (0, 1)]
    both = _standings(results_of(cells), "ref").rows[1]
    alone = _standings(results_of([cell for cell in cells if cell.labels == 8]), "ref").rows[1]
    assert both.average == alone.average
    assert both.against == alone.against


def test_ranks_are_averaged_over_tasks_and_equals_share_places() -> None:
    cells = [
        *(evaluated(name, [dice]) for name, dice in (("a", 0.9), ("b", 0.9), ("c", 0.5))),
        *(evaluated(name, [dice], "spleen") for name, dice in (("a", 0.6), ("b", 0.7), ("c", 0.8))),
    ]
    found = _standings(results_of(cells), "a")
    assert {row.method: list(row.ranks.values()) for row in found.rows} == {"a": [1.5, 3], "b": [1.5, 2], "c": [3, 1]}
    assert [row.average_rank for row in found.rows] == pytest.approx([2.25, 1.75, 2])
    rows = _rows(standings_table("T", found))
    assert [rows[name]["average rank"] for name in "abc"] == ["2.25", "**1.75**", "_2.00_"]
    assert [rows[name]["liver, all labels"] for name in "abc"] == ["**90.00**", "**90.00**", "_50.00_"]


def test_ranks_are_among_the_methods_of_the_table() -> None:
    cells = [evaluated(name, [dice]) for name, dice in (("a", 0.9), ("b", 0.8), ("c", 0.7))]
    found = standings(Scoreboard(results_of(cells), "a"), ["c", "b"])
    assert [(row.method, row.average_rank) for row in found.rows] == [("c", 2), ("b", 1)]
    assert [row.against is not None for row in found.rows] == [True, True]  # the reference needs no row of its own


def test_best_is_marked_by_the_digits_shown() -> None:
    cells = [evaluated(name, [dice]) for name, dice in (("a", 0.70001), ("b", 0.70004), ("c", 0.6), ("d", 0.5))]
    rows = _rows(standings_table("T", _standings(results_of(cells), "a")))
    assert [rows[name]["average"] for name in "abcd"] == ["**70.00**", "**70.00**", "_60.00_", "50.00"]
    two = _rows(standings_table("T", _standings(results_of(cells[2:]), "c")))
    assert [two[name]["average"] for name in "cd"] == ["**60.00**", "50.00"]  # the second of two is the last
    one = _rows(standings_table("T", _standings(results_of(cells[:1]), "a")))
    assert one["a"]["average"] == "70.00"


def test_difference_is_method_minus_reference_paired_by_case() -> None:
    generator = np.random.default_rng(0)
    base, spread = generator.uniform(0.3, 0.9, size=20), generator.normal(0, 0.001, size=20)
    cells = [evaluated("ref", base), evaluated("better", base + 0.03 + spread), evaluated("worse", base - 0.03)]
    found = {row.method: row.against for row in _standings(results_of(cells), "ref").rows}
    assert found["ref"] is None
    better, worse = found["better"], found["worse"]
    assert better is not None
    assert worse is not None
    assert better.difference.mean == pytest.approx(0.03 + spread.mean())
    # Cases differ by far more than the methods: only a paired interval is that narrow.
    assert 0.029 < better.difference.low < better.difference.mean < better.difference.high < 0.031
    assert worse.difference.mean == pytest.approx(-0.03)
    table = _rows(standings_table("T", _standings(results_of(cells), "ref")))
    assert table["ref"]["difference to ref"] == "reference"
    assert table["better"]["difference to ref"].startswith("+3.0")
    assert table["worse"]["difference to ref"] == "-3.00 [-3.0, -3.0]"


def test_test_is_over_the_cases_of_all_data_sets_each_once() -> None:
    results = random_results(methods=3, seeds=2, cases=9)
    found = _standings(results, "m0")
    p_values = []
    for method in ("m1", "m2"):
        of_case = []
        for dataset in ("liver", "spleen"):
            # A case of the liver is tested under 8 and all labels and two seeds: once, with the mean of its four.
            means = []
            for name in (method, "m0"):
                dice = [c.dice.mean(axis=1) for c in results.evaluated if (c.method, c.dataset) == (name, dataset)]
                means.append(np.mean(dice, axis=0))
            of_case.append(means[0] - means[1])
        p_values.append(wilcoxon(np.concatenate(of_case)).pvalue)
    against = [row.against for row in found.rows[1:]]
    assert [test.cases for test in against if test] == [18, 18]
    assert [test.p_value for test in against if test] == pytest.approx(p_values)
    assert [test.p_holm for test in against if test] == pytest.approx(holm(p_values).tolist())
    assert p_values[1] < p_values[0]


def test_difference_uses_the_cases_that_both_have_a_score_for() -> None:
    nan = math.nan
    cells = [evaluated("ref", [0.5, nan, 0.7]), evaluated("a", [0.6, 0.9, nan])]
    against = _standings(results_of(cells), "ref").rows[1].against
    assert against is not None
    assert against.cases == 1
    assert against.difference.mean == pytest.approx(0.1)


def test_labels_are_compared_with_the_reference_each_and_corrected_together() -> None:
    results = random_results(methods=3)
    scoreboard = Scoreboard(results, "m0")
    rows = label_standings(scoreboard, ["m0", "m1", "m2"], "liver")
    tests = [row.against[task] for row in rows[1:] for task in (Task("liver", 8), LIVER)]
    assert rows[0].against == {}
    assert [test.p_holm for test in tests] == pytest.approx(holm([test.p_value for test in tests]).tolist())
    few = {c.method: [] for c in results.evaluated}  # type: dict[str, list[np.ndarray]]
    for cell in results.evaluated:
        if cell.labels == 8:
            few[cell.method].append(cell.dice.mean(axis=1))
    assert tests[0].difference.mean == pytest.approx(np.mean(few["m1"]) - np.mean(few["m0"]))
    table = labels_table("liver", rows, "m0", seeds=3)
    assert table.header[1:3] == ("8 labels", "all labels")
    assert _rows(table)["m2"]["8 labels, difference to m0"].startswith(f"{100 * tests[2].difference.mean:+.2f} [")
    lines = _read(labels_csv(rows, seeds=3))
    assert [(line["method"], line["labels"]) for line in lines[:2]] == [("m0", "8"), ("m0", "all")]
    assert float(lines[2]["p_holm"]) == pytest.approx(tests[0].p_holm, rel=1e-5)
    assert lines[0]["p"] == ""


def _unfinished() -> Results:
    """Two seeds; b lacks one on the liver, c everything on the spleen, d everything."""
    cells = []
    for seed in (0, 1):
        cells += [evaluated("a", [0.9, 0.8], seed=seed), evaluated("a", [0.9, 0.8], "spleen", seed=seed)]
        cells += [evaluated("b", [0.7, 0.6], "spleen", seed=seed), evaluated("c", [0.7, 0.7], seed=seed)]
        cells += [evaluated("e", [0.6, 0.5], seed=seed), evaluated("e", [0.6, 0.5], "spleen", seed=seed)]
    cells.append(evaluated("b", [0.99, 0.98]))
    results = results_of(cells, planned=20)
    return Results(("a", "b", "c", "d", "e"), results.datasets, results.evaluated, (), results.planned)


def test_unfinished_methods_show_what_they_have_and_are_out_of_ranks() -> None:
    found = _standings(_unfinished(), "a")
    table = standings_table("T", found)
    rows = _rows(table)
    assert rows["b"]["liver, all labels"].endswith("(1 of 2 seeds)")
    assert not rows["b"]["liver, all labels"].startswith("**")  # higher than a's, but not of the same runs
    assert rows["a"]["liver, all labels"].startswith("**85.00")
    assert [rows[name]["spleen, all labels"] for name in "cd"] == ["–", "–"]  # noqa: RUF001
    for name in "bcd":
        columns = ("average", "average rank", "difference to a", "p, Holm")
        assert [rows[name][column] for column in columns] == ["–"] * 4  # noqa: RUF001
    assert [rows[name]["average rank"] for name in "ae"] == ["**1.00**", "2.00"]
    assert rows["e"]["difference to a"].startswith("-30.00")
    assert [note.split(" is ")[0] for note in table.notes] == ["b", "c", "d"]
    assert "(liver, all labels: 1 of 2 seeds)" in table.notes[0]
    assert "(spleen, all labels: 0 of 2 seeds)" in table.notes[1]
    assert progress_note(_unfinished()) == "Unfinished: 13 of 20 runs are done, the tables show these."


def test_without_all_runs_of_the_reference_there_are_no_differences() -> None:
    table = standings_table("T", _standings(_unfinished(), "b"))
    assert {row["difference to b"] for row in _rows(table).values()} == {"reference", "–"}  # noqa: RUF001
    assert table.notes[-1] == "Differences need all runs of the reference, b."


def test_finished_matrix_has_no_note_of_what_is_missing() -> None:
    results = random_results(methods=2)
    assert progress_note(results) is None
    assert standings_table("T", _standings(results, "m0")).notes == []


def test_notes_say_what_intervals_leave_out() -> None:
    def notes(results: Results) -> str:
        return " ".join(statistics_notes(results, _standings(results, "m0")))

    assert "3 seeds are few" in notes(random_results(methods=2))
    assert "variance is 2/3" in notes(random_results(methods=2))
    assert "was pre-trained once" in notes(random_results(methods=2))
    alone = notes(random_results(methods=2, seeds=1))
    assert "there is one seed" in alone
    assert "was pre-trained once" not in alone
    results = random_results(methods=2)
    each = [pretrained("m1", seed) for seed in range(3)]
    several = Results(results.methods, results.datasets, results.evaluated, tuple(each), results.planned)
    assert "was pre-trained once" not in notes(several)


def test_cost_of_pretraining_is_the_mean_of_its_runs() -> None:
    cells = [evaluated("a", [0.5]), evaluated("scratch", [0.5])]
    found = _standings(results_of(cells, [pretrained("a", 0, steps=100), pretrained("a", 1, steps=300)]), "a")
    cost = found.rows[0].cost
    assert cost is not None
    assert (cost.seconds, cost.flops, cost.memory_mib) == (400, 200 * 5e12, 512)
    assert found.rows[1].cost is None
    table = standings_table("T", found)
    rows = _rows(table)
    assert [rows["a"][column] for column in ("pre-training", "PFLOP", "GiB")] == ["6.7 min", "1", "0.5"]
    assert [rows["scratch"][column] for column in ("pre-training", "PFLOP", "GiB")] == ["–"] * 3  # noqa: RUF001
    assert table.rows[0][-3].folders == (
        ("seed-0", Path("pretraining/a/seed-0")),
        ("seed-1", Path("pretraining/a/seed-1")),
    )


def test_amounts_are_readable() -> None:
    assert [duration(seconds) for seconds in (6, 7140, 7200, 3.6e6)] == ["6.0 s", "119.0 min", "2.0 h", "1,000.0 h"]
    assert [amount(value) for value in (0.01234, 12.345, 999, 12_600_000.4)] == ["0.0123", "12.3", "999", "12,600,000"]


def test_csv_of_standings_has_the_same_numbers() -> None:
    found = _standings(random_results(methods=3), "m0")
    lines = _read(standings_csv(found))
    assert len(lines) == 3 * (3 + 1)
    assert [(line["dataset"], line["labels"]) for line in lines[:4]] == [
        ("liver", "8"),
        ("liver", "all"),
        ("spleen", "all"),
        ("average", ""),
    ]
    row, average = found.rows[1], lines[7]
    assert row.average is not None
    assert row.against is not None
    assert float(average["dice"]) == pytest.approx(row.average.mean, rel=1e-5)
    assert float(average["difference_low"]) == pytest.approx(row.against.difference.low, rel=1e-4)
    assert float(average["pretraining_pflop"]) == pytest.approx(0.5)
    assert lines[3]["pretraining_pflop"] == lines[3]["p"] == ""
    assert float(lines[4]["dice"]) == pytest.approx(row.scores[found.tasks[0]].dice.mean, rel=1e-5)
    unfinished = _read(standings_csv(_standings(_unfinished(), "a")))
    of_b = [line for line in unfinished if line["method"] == "b"]
    assert [line["seeds"] for line in of_b] == ["1", "2", ""]
    assert of_b[2]["dice"] == of_b[2]["rank"] == ""


def test_csv_of_cells_names_each_run() -> None:
    cells = [
        evaluated("a", [[0.2, 0.4], [math.nan, 0.6]], labels=8, classes=("cyst", "stone")),
        evaluated("a", [0.5], "spleen", seed=3, classes=("organ",)),
    ]
    first, second = _read(cells_csv(results_of(cells)))
    assert (first["method"], first["dataset"], first["labels"], first["seed"]) == ("a", "liver", "8", "0")
    assert (first["dice cyst"], first["dice stone"], first["dice organ"]) == ("0.2", "0.5", "")
    assert float(first["dice"]) == pytest.approx((0.3 + 0.6) / 2)
    assert first["folder"] == "finetuning/liver/8/a/seed-0"
    assert (second["labels"], second["dice organ"], second["seconds"]) == ("all", "0.5", "63")


def test_csv_of_pretrainings_names_each_run() -> None:
    results = results_of([evaluated("a", [0.5])], [pretrained("a", 1, picture=Path("pretraining/a/seed-1/p.png"))])
    (line,) = _read(pretraining_csv(results))
    assert line["folder"] == "pretraining/a/seed-1"
    assert line["picture"] == "pretraining/a/seed-1/p.png"
    assert [float(line[name]) for name in ("seconds", "pflop", "validation_loss", "trivial_loss")] == [200, 0.5, 0.6, 1]


def _other_cases() -> list[EvaluatedCell]:
    return [evaluated("a", [0.5, 0.6]), evaluated("b", [0.5])]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (_other_cases(), r"a/seed-0 and \S+/b/seed-0 were tested on other cases of data set 'liver'"),
        (
            [evaluated("a", [0.5], classes=("x",)), evaluated("b", [0.5], classes=("y",))],
            "were tested on other classes of data set 'liver'",
        ),
        ([evaluated("a", [0.5])] * 2, "are both a on liver, all labels, seed 0"),
        ([evaluated("a", [math.nan, math.nan])], "a/seed-0 has nothing to score"),
    ],
)
def test_results_that_do_not_fit_are_refused(cells: list[EvaluatedCell], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scoreboard(results_of(cells), "a")


def test_methods_that_are_not_there_are_refused() -> None:
    results = results_of([evaluated("a", [0.5])])
    with pytest.raises(ValueError, match="there is no method 'z' to make a table of; the comparison has a"):
        Scoreboard(results, "z")
    with pytest.raises(ValueError, match="there is no method 'y'"):
        standings(Scoreboard(results, "a"), ["a", "y"])
    stranger = Results(("b",), ("liver",), results.evaluated, (), 1)
    with pytest.raises(ValueError, match="is of method 'a' on data set 'liver'; the comparison has the methods b"):
        Scoreboard(stranger, "b")


def test_scores_need_a_row_for_each_case() -> None:
    cell = evaluated("a", [0.5, 0.6])
    with pytest.raises(ValueError, match=r"must be \[cases, classes\] = \(1, 1\), got shape \(2, 1\)"):
        EvaluatedCell("a", "liver", None, 0, cell.folder, cell.classes, ("one",), cell.dice, (), 1.0)
