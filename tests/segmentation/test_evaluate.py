"""`s3d evaluate` and `s3d rank` on small class maps whose scores are known."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from s3d.cli import main
from s3d.data.reading import BadImageError
from s3d.segmentation import evaluation_report
from s3d.segmentation.case_scores import CaseTask, score_case
from s3d.segmentation.evaluate import EvaluateConfig, evaluate
from s3d.segmentation.pictures import segmentation_figure
from s3d.segmentation.ranking import RankConfig, rank
from s3d.segmentation.scores import Scores, read_scores, scores_csv

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
SHAPE = (12, 14, 10)
CASES = ("case_a", "case_b", "case_c", "case_d")


def _write(path: Path, voxels: NDArray[np.generic], affine: NDArray[np.float64] = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


def _truth(case: int) -> NDArray[np.uint8]:
    truth = np.zeros(SHAPE, np.uint8)
    truth[2:6, 2:8, 2:7] = 1
    if case != 3:  # the last has one class only
        truth[6:10, 2:8, 2 + case : 5 + case] = 2
    return truth


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    """Four cases and two runs: one that is right, and one that misses the upper half of the first class."""
    names = {"background": 0, "one": 1, "two": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": names, "channel_names": {"0": "MRI"}}))
    generator = np.random.default_rng(0)
    for number, case in enumerate(CASES):
        truth = _truth(number)
        half = truth.copy()
        half[2:4][truth[2:4] == 1] = 0
        # As a scanner might have it: the first axis reversed, in the file and in its affine.
        flipped = AFFINE @ [[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        _write(tmp_path / "labelsTs" / f"{case}.nii.gz", truth)
        _write(tmp_path / "right" / f"{case}.nii.gz", truth[::-1].astype(np.int16), flipped)
        _write(tmp_path / "half" / f"{case}.nii.gz", half.astype(np.float32))
        image = generator.normal(size=SHAPE).astype(np.float32)
        _write(tmp_path / "imagesTs" / f"{case}_0000.nii.gz", image)
    return EvaluateConfig(
        labels=tmp_path / "labelsTs",
        predictions=(f"{tmp_path}/half", f"all right={tmp_path}/right"),
        output_dir=tmp_path / "out",
        workers=0,
    )


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def pictured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the pictures that are made from here on."""
    titles: list[str] = []

    def listed(*given: Any) -> Figure:
        titles.append(given[4])
        return segmentation_figure(*given)

    monkeypatch.setattr(evaluation_report, "segmentation_figure", listed)
    return titles


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time goes into pictures."""
    monkeypatch.setattr("s3d.segmentation.evaluate.evaluation_report", lambda *_: "")


def test_scores_tables_and_report(
    config: EvaluateConfig, pictured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    scores = evaluate(replace(config, images=config.labels.parent / "imagesTs"))

    assert (scores.runs, scores.cases, scores.classes) == (("half", "all right"), CASES, ("one", "two"))
    half = 2 / 3  # of the first class: all that is predicted is right, half is missing
    np.testing.assert_allclose(scores.dice[0], [[half, 1]] * 3 + [[half, np.nan]])
    np.testing.assert_allclose(scores.dice[1], [[1, 1]] * 3 + [[1, np.nan]])
    np.testing.assert_allclose(scores.nsd[1], scores.dice[1])
    assert (scores.nsd[0, :, 0] < 1).all()

    cases = _rows(config.output_dir / "cases.csv")
    assert len(cases) == 2 * 4 * 2
    assert cases[7] == {"run": "half", "case": "case_d", "class": "two", "dice": "", "nsd": ""}
    found = read_scores(config.output_dir / "cases.csv")
    np.testing.assert_allclose(found.dice, scores.dice, rtol=1e-5)
    np.testing.assert_allclose(found.nsd, scores.nsd, rtol=1e-5)

    rows = {(row["run"], row["class"]): row for row in _rows(config.output_dir / "summary.csv")}
    assert {key: int(row["cases"]) for key, row in rows.items()} == {
        (run, name): 3 if name == "two" else 4 for run in scores.runs for name in ("mean", "one", "two")
    }
    mean = (3 * (half + 1) / 2 + half) / 4  # each case counts with the mean of the classes that it has
    assert float(rows["half", "mean"]["dice"]) == pytest.approx(mean, abs=1e-5)
    assert float(rows["half", "mean"]["dice_low"]) < mean < float(rows["half", "mean"]["dice_high"])
    nsd = (scores.nsd[0, :3].mean(axis=1).sum() + scores.nsd[0, 3, 0]) / 4
    assert float(rows["half", "mean"]["nsd"]) == pytest.approx(nsd, abs=1e-5)
    (pair,) = _rows(config.output_dir / "comparisons.csv")
    assert (pair["first"], pair["second"], pair["cases"]) == ("half", "all right", "4")
    assert float(pair["difference"]) == pytest.approx(1 - mean, abs=1e-5)
    assert float(pair["p"]) == float(pair["p_holm"]) == pytest.approx(2 / 2**4, abs=0.02)

    markdown = (config.output_dir / "summary.md").read_text()
    assert f"| half | 4 | {mean:.3f} [" in markdown
    assert markdown.index("| all right |") < markdown.index("| half |")  # best first
    assert markdown in capsys.readouterr().out
    page = (config.output_dir / "report.html").read_text()
    assert page.count("<img") == 1 + 3 + 3
    assert "half: best, median and worst case" in page
    assert pictured[:3] == [
        "best: case_a, mean Dice 0.833 (one 0.667, two 1.000)",
        "median: case_c, mean Dice 0.833 (one 0.667, two 1.000)",
        "worst: case_d, mean Dice 0.667 (one 0.667, two nan)",
    ]


def test_a_single_case_is_pictured_once(config: EvaluateConfig, pictured: list[str]) -> None:
    for case in CASES[1:]:
        (config.labels / f"{case}.nii.gz").unlink()
    evaluate(config)
    assert [title[:27] for title in pictured] == ["best, median, worst: case_a"] * 2


def test_another_process_gives_the_same(config: EvaluateConfig, without_report: None) -> None:
    alone = evaluate(config)
    together = evaluate(replace(config, workers=1, output_dir=config.output_dir / "processes"))
    assert scores_csv(together) == scores_csv(alone)


def test_cases_may_be_done_in_any_order(
    config: EvaluateConfig, without_report: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backwards(work: Any, tasks: Sequence[CaseTask], workers: int) -> list[tuple[CaseTask, Any]]:
        return [(task, score_case(task)) for task in reversed(tasks)]

    alone = evaluate(config)
    monkeypatch.setattr("s3d.data.workers.run_in_processes", backwards)
    assert scores_csv(evaluate(replace(config, workers=1))) == scores_csv(alone)


def test_the_tolerance_is_in_millimetres(config: EvaluateConfig, without_report: None) -> None:
    # The half that is missing is two voxels of 1 mm thick; the truth's side faces there are farther from the rest.
    near, far = (evaluate(replace(config, tolerance_mm=mm)).nsd[0, 0, 0] for mm in (1.0, 2.0))
    assert near < far == 1


def test_one_run_is_not_compared(config: EvaluateConfig, without_report: None) -> None:
    evaluate(replace(config, predictions=config.predictions[:1]))
    assert "Comparisons" not in (config.output_dir / "summary.md").read_text()
    assert _rows(config.output_dir / "comparisons.csv") == []


def test_missing_files_are_named(config: EvaluateConfig) -> None:
    folder = config.labels.parent
    (folder / "right" / "case_b.nii.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"right/case_b\.nii\.gz: no such file; 1 of the 4 labels .* 'all right'"
    ):
        evaluate(config)
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        evaluate(replace(config, predictions=(str(folder / "nowhere"),)))
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: holds no images"):
        evaluate(replace(config, labels=folder / "empty"))
    (folder / "imagesTs" / "case_c_0000.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"imagesTs: holds no first channel of case case_c"):
        evaluate(replace(config, predictions=config.predictions[:1], images=folder / "imagesTs"))
    (folder / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset\.json: no such file, .* --dataset-json"):
        evaluate(config)


def test_bad_class_maps_are_named(config: EvaluateConfig) -> None:
    path = config.labels.parent / "half" / "case_b.nii.gz"
    _write(path, _truth(1) * 2)
    with pytest.raises(BadImageError, match=r"case_b\.nii\.gz: holds values that dataset.json does not name: 4 \(it"):
        evaluate(config)
    _write(path, _truth(1) / np.float32(2))
    with pytest.raises(BadImageError, match=r"case_b\.nii\.gz: .* does not name: 0\.5 \(it names 0 to 2\)"):
        evaluate(config)
    _write(path, _truth(1)[:-1])
    with pytest.raises(BadImageError, match=r"half/case_b.* another grid than .*labelsTs/case_b.* 10 x 14 x 11 voxels"):
        evaluate(config)
    _write(path, _truth(1), AFFINE + np.eye(4, k=3))
    with pytest.raises(BadImageError, match=r"half/case_b.* another grid than .*labelsTs/case_b.*: 1 mm apart"):
        evaluate(config)
    assert not config.output_dir.exists()


def test_two_of_one_name_are_refused(config: EvaluateConfig) -> None:
    folder = config.labels.parent
    with pytest.raises(ValueError, match=r"are both called 'half'; name them, as in first="):
        evaluate(replace(config, predictions=(f"{folder}/half", f"half={folder}/right")))
    with pytest.raises(ValueError, match=r"predictions: '=.*half' names no run before the ="):
        evaluate(replace(config, predictions=(f"={folder}/half",)))
    _write(folder / "half" / "case_a.nii", _truth(0))
    with pytest.raises(ValueError, match=r"case_a\.nii and case_a\.nii\.gz are one case"):
        evaluate(config)


def test_nothing_to_score_is_refused(config: EvaluateConfig) -> None:
    for case in CASES:
        for folder in ("labelsTs", "half"):
            _write(config.labels.parent / folder / f"{case}.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(ValueError, match=r"run 'half' has nothing to score"):
        evaluate(replace(config, predictions=config.predictions[:1]))


def test_surplus_predictions_are_told(
    config: EvaluateConfig, without_report: None, caplog: pytest.LogCaptureFixture
) -> None:
    (config.labels / "case_d.nii.gz").unlink()
    scores = evaluate(replace(config, predictions=config.predictions[:1]))
    assert scores.cases == CASES[:3]
    assert "half: left out 1 of its files, which have no label in" in caplog.text


def test_any_name_is_that_of_a_run(config: EvaluateConfig, without_report: None) -> None:
    folder = config.labels.parent
    (folder / "half").rename(folder / "lr=0.1 a|b")
    scores = evaluate(replace(config, predictions=(f"{folder}/lr=0.1 a|b", f"x={folder}/lr=0.1 a|b")))
    assert scores.runs == ("lr=0.1 a|b", "x")
    assert "| lr=0.1 a\\|b | 4 |" in (config.output_dir / "summary.md").read_text()


def test_a_class_called_mean_is_refused(config: EvaluateConfig) -> None:
    names = {"background": 0, "mean": 1, "two": 2}
    (config.labels.parent / "dataset.json").write_text(json.dumps({"labels": names}))
    with pytest.raises(ValueError, match=r"dataset\.json: a class is called 'mean'"):
        evaluate(config)


def test_settings_are_checked(config: EvaluateConfig) -> None:
    for wrong, message in (
        ({"predictions": ()}, "predictions must name at least one folder"),
        ({"tolerance_mm": -0.5}, r"tolerance_mm must be at least 0, got -0\.5"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **wrong)


def _write_scores(file: Path, **dice: list[float]) -> Path:
    """A cases.csv with one class."""
    table = np.array(list(dice.values()))[..., None]
    cases = tuple(f"case_{number}" for number in range(table.shape[1]))
    file.parent.mkdir(parents=True)
    file.write_text(scores_csv(Scores(tuple(dice), cases, ("one",), table, table)))
    return file


def test_ranks_over_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = (
        _write_scores(tmp_path / "hearts" / "cases.csv", a=[0.9, 0.8], b=[0.7, 0.6], c=[0.6, 0.7]),
        _write_scores(tmp_path / "livers" / "cases.csv", c=[0.5, np.nan, 0.5], b=[0.4, 0.5, 0.5], a=[0.1, 0.1, 0.1]),
    )
    output = tmp_path / "ranks"
    assert rank(RankConfig(results, output)) == {"a": 2.0, "b": 2.25, "c": 1.75}
    markdown = (output / "ranks.md").read_text()
    assert markdown in capsys.readouterr().out
    assert "| run | hearts | livers | mean Dice | mean rank |" in markdown
    assert "| c | 0.650 (2.5) | 0.500 (1) | 0.575 | 1.75 |" in markdown
    assert markdown.index("| c |") < markdown.index("| a |") < markdown.index("| b |")
    assert _rows(output / "ranks.csv")[5] == {"dataset": "livers", "run": "c", "dice": "0.5", "rank": "1"}


def test_results_that_cannot_be_ranked(tmp_path: Path) -> None:
    first = _write_scores(tmp_path / "x" / "cases.csv", a=[0.9, 0.8], b=[0.7, 0.6])
    other = _write_scores(tmp_path / "y" / "cases.csv", a=[0.9], d=[0.7])
    same_name = _write_scores(tmp_path / "z" / "x" / "cases.csv", a=[0.9], b=[0.7])
    for results, message in (
        ((first, other), r"y/cases\.csv: holds the runs a, d, but .*x/cases\.csv a, b"),
        ((first, same_name), r"z/x/cases\.csv is in a second folder called 'x'"),
        ((tmp_path / "cases.csv",), "No such file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            rank(RankConfig(results, tmp_path / "out"))
    with pytest.raises(ValueError, match="at least one"):
        RankConfig((), tmp_path)
    first.write_text("\n".join(first.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match=r"has 3 rows where each of 2 runs, 2 cases and 1 classes needs one"):
        rank(RankConfig((first,), tmp_path / "out"))
    whole = "run,case,class,dice,nsd\na,x,one,0.5,\na,y,one,0.5,0.5\n"
    for content, message in (
        (whole.replace("a,y", "a,x"), "has 2 rows where each of 1 runs, 1 cases and 1 classes"),
        (whole.removesuffix(",0.5\n"), "row 3 has dice '0.5' and nsd None; each must be 0 to 1 or empty"),
        (whole.replace("0.5,\n", "0.5,?\n"), r"row 2 has dice '0\.5' and nsd '\?'"),
        (whole.replace("0.5,\n", "7,\n"), "row 2 has dice '7' and nsd ''"),
    ):
        first.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_scores(first)
    first.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"has the columns a, b, not run, case, class, dice, nsd"):
        rank(RankConfig((first,), tmp_path / "out"))


def test_command_line(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--labels", str(config.labels), "--workers", "0", "--output-dir", str(config.output_dir)]
    main(["evaluate", *options, "--predictions", *config.predictions])
    main(["rank", "--results", f"{config.output_dir}/cases.csv", "--output-dir", f"{config.output_dir}/ranks"])
    assert "| all right | 1.000 (1) | 1.000 | 1.00 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *options, "--predictions", "nowhere"])
    assert "s3d: nowhere: no such folder" in capsys.readouterr().err
