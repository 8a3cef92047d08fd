"""The matrix of a comparison, and which cases its runs are trained, validated and tested on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_dataset import write_dataset
from small_matrix import protocol

from s3d.comparison.cells import FinetuningCell, PretrainingCell, plan_matrix
from s3d.comparison.labelled_cases import choose_cases, labelled_cases, link_test_cases
from s3d.comparison.protocol import LabelledDataset, parse_protocol
from s3d.comparison.run_cell import Workplace, finetune_config, pretrain_config
from s3d.segmentation.raw_dataset import default_folds


def test_matrix() -> None:
    datasets = {"balls": {"folder": "D", "labels": [2, None]}, "A & B": {"folder": "E"}}
    matrix = plan_matrix(parse_protocol(protocol(datasets=datasets)))
    assert set(matrix.pretraining) == {("S3D", 0)}
    assert len(matrix.finetuning) == 2 * 3 * 2  # methods, data sets with label counts, seeds
    cell = matrix.finetuning["from scratch", "A & B", None, 1]
    assert cell.folder == Path("finetuning/a-b/all/from-scratch/seed-1")
    assert cell.pretraining is None
    cell = matrix.finetuning["S3D", "balls", 2, 1]
    assert cell.folder == Path("finetuning/balls/2/s3d/seed-1")
    assert cell.pretraining is matrix.pretraining["S3D", 0]
    assert cell.pretraining.folder == Path("pretraining/s3d/seed-0")
    assert len(matrix.cells) == 13
    assert isinstance(matrix.cells[0], PretrainingCell)


def test_each_seed_has_a_pretraining() -> None:
    matrix = plan_matrix(parse_protocol(protocol(pretraining_seeds="each")))
    assert set(matrix.pretraining) == {("S3D", 0), ("S3D", 1)}
    for seed in (0, 1):
        start = matrix.finetuning["S3D", "balls", 2, seed].pretraining
        assert start is not None
        assert start.seed == seed
        place = Workplace(Path("output"), Path("data"), None)
        assert pretrain_config(start, place, "cpu").seed == seed
        tuning = finetune_config(matrix.finetuning["S3D", "balls", 2, seed], place, "cpu")
        assert tuning.seed == seed
        assert tuning.checkpoint == Path(f"output/pretraining/s3d/seed-{seed}/checkpoint.pt")


def test_same_settings_are_one_cell() -> None:
    methods = {
        "S3D": {"pretraining": {}},
        "again": {"pretraining": {"method": "s3d", "mask_ratio": 0.75}},  # both are defaults
        "frozen": {"pretraining": {}, "finetuning": {"schedule": "frozen"}},
        "other": {"pretraining": {"mask_ratio": 0.5}},
    }
    content = protocol(methods=methods)
    matrix = plan_matrix(parse_protocol(content))
    start = matrix.pretraining["S3D", 0]
    assert matrix.pretraining["again", 0] is start
    assert matrix.pretraining["frozen", 0] is start
    assert matrix.pretraining["other", 0] is not start
    assert matrix.finetuning["again", "balls", 2, 0] is matrix.finetuning["S3D", "balls", 2, 0]
    assert matrix.finetuning["frozen", "balls", 2, 0] is not matrix.finetuning["S3D", "balls", 2, 0]
    kinds = [type(cell) for cell in matrix.cells]
    assert (kinds.count(PretrainingCell), kinds.count(FinetuningCell)) == (2, 6)
    # A new method of the same settings that stands before an old one takes the old one's folder.
    known = plan_matrix(parse_protocol(content), known=["again"])
    assert known.pretraining["S3D", 0].folder == Path("pretraining/again/seed-0")


def test_labels_are_nested() -> None:
    names = tuple(f"case_{number:02d}" for number in range(30))
    for seed in range(3):
        few, more, every = (choose_cases(names, labels, 6, seed) for labels in (8, 16, None))
        assert [len(split["train"]) for split in (few, more, every)] == [8, 16, 24]
        assert set(few["train"]) < set(more["train"]) < set(every["train"])
        assert few["val"] == more["val"] == every["val"] == choose_cases(names, 8, 6, seed + 1)["val"]
        assert len(few["val"]) == 6
        assert {*every["train"], *every["val"]} == set(names)
    assert choose_cases(names, 8, 6, 0)["train"] != choose_cases(names, 8, 6, 1)["train"]
    assert choose_cases(names[::-1], 8, 6, 0) == choose_cases(names, 8, 6, 0)
    assert choose_cases(names, None, 0, 0)["val"] == []


def test_without_labelled_test_cases_the_first_fold_is_the_test(tmp_path: Path) -> None:
    raw = write_dataset(tmp_path / "raw", cases=6)
    links = tmp_path / "links"
    dataset = LabelledDataset("balls", "raw", (2,), 1, {})
    cases = labelled_cases(dataset, tmp_path, links)
    fold = default_folds([f"case_{number}" for number in range(6)])[0]
    assert list(cases.training) == fold["train"]
    for _ in range(2):
        link_test_cases(cases)
        assert sorted(path.name for path in cases.labels.iterdir()) == [f"{name}.nii.gz" for name in fold["val"]]
        assert sorted(path.name for path in cases.images.iterdir()) == [f"{name}_0000.nii.gz" for name in fold["val"]]
    name = f"{fold['val'][0]}.nii.gz"
    assert (cases.labels / name).samefile(raw / "labelsTr" / name)

    # Other splits: what was tested is trained on.
    split = {"train": [*fold["val"], *fold["train"][1:]], "val": fold["train"][:1]}
    (raw / "splits_final.json").write_text(json.dumps([split]))
    link_test_cases(labelled_cases(dataset, tmp_path, links))
    assert [path.name for path in cases.labels.iterdir()] == [f"{fold['train'][0]}.nii.gz"]
    assert [path.name for path in cases.images.iterdir()] == [f"{fold['train'][0]}_0000.nii.gz"]


def test_too_few_cases(tmp_path: Path) -> None:
    write_dataset(tmp_path / "raw", cases=6)
    dataset = LabelledDataset("balls", "raw", (4, None), 1, {})
    with pytest.raises(ValueError, match=r"datasets\.balls: 4 training cases are wanted, but .* has 4 that are not"):
        labelled_cases(dataset, tmp_path, tmp_path / "links")
