"""The protocol of a comparison: what it means, and that a mistake is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_matrix import protocol

from s3d.comparison.protocol import Budget, parse_protocol, pretraining_settings, read_protocol
from s3d.pretext.registry import METHODS

SHIPPED = Path(__file__).parents[2] / "examples" / "comparison"


def test_settings_of_a_method_go_before_those_of_all() -> None:
    methods = {"S3D": {"pretraining": {"steps": 9, "mask_ratio": [0.6, 0.9]}, "finetuning": {"batch_size": 1}}}
    datasets = {"balls": {"folder": "D", "labels": [2, None], "finetuning": {"batch_size": 3, "steps": 4}}}
    parsed = parse_protocol(protocol(methods=methods, datasets=datasets))
    (method,), (dataset,) = parsed.methods, parsed.datasets
    values = pretraining_settings(method.pretraining or {}, Path("/data"))
    assert values["steps"] == 9
    assert values["mask_ratio"] == (0.6, 0.9)
    assert values["preset"] == "tiny"
    assert values["images"] == ("/data/heads",)
    tuning = parsed.finetuning_of(method, dataset)
    assert (tuning["batch_size"], tuning["steps"], tuning["momentum"]) == (1, 4, 0.9)
    assert dataset.labels == (2, None)


def test_time_instead_of_steps() -> None:
    content = protocol(budget={"pretraining_seconds": 5, "finetuning_seconds": 2.5})
    with pytest.raises(ValueError, match=r"methods\.S3D\.pretraining: steps and budget exclude each other"):
        parse_protocol(content)
    for part in ("pretraining", "finetuning"):
        del content[part]["steps"]
    assert parse_protocol(content).budget == Budget(5.0, 2.5)


def test_seeds_of_pretraining() -> None:
    assert [parse_protocol(protocol(seeds=[3, 4])).pretraining_seed(seed) for seed in (3, 4)] == [3, 3]
    each = parse_protocol(protocol(seeds=[3, 4], pretraining_seeds="each"))
    assert [each.pretraining_seed(seed) for seed in (3, 4)] == [3, 4]


SCRATCH = {"pretraining": None, "finetuning": {"preset": "tiny"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [0]}, "sedes: no such setting; accepted: description, pretraining"),
        ({"seeds": []}, "seeds: must be a list of different whole numbers"),
        ({"seeds": [0, 0]}, "seeds: must be a list of different whole numbers"),
        ({"pretraining_seeds": "all"}, "pretraining_seeds: must be 'one' or 'each', got 'all'"),
        ({"methods": {}}, "methods: must name at least one"),
        ({"methods": {"S3D": {"pretraining": {"stepz": 1}}}}, r"methods\.S3D\.pretraining\.stepz: no such setting; "),
        ({"methods": {"S3D": {"pretraining": {"seed": 1}}}}, r"methods\.S3D\.pretraining\.seed: no such setting; "),
        (
            {"methods": {"S3D": {"pretraining": {"steps": "many"}}}},
            r"methods\.S3D\.pretraining\.steps: must be a whole number, got 'many'",
        ),
        (
            {"methods": {"S3D": {"pretraining": {"patch_size": [32, 32]}}}},
            r"methods\.S3D\.pretraining\.patch_size: must be a list of 3 times a whole number, got \[32, 32\]",
        ),
        (
            {"methods": {"S3D": {"pretraining": {"mask_block": 7}}}},
            r"methods\.S3D\.pretraining: mask_block must be a multiple of 4",
        ),
        ({"methods": {"S3D": {}}}, r"methods\.S3D\.pretraining: is missing"),
        (
            {"methods": {"a": {**SCRATCH, "finetuning": {"schedule": "frozen"}}}},
            r"methods\.a\.finetuning \(with datasets\.balls\.finetuning and finetuning\): schedule frozen",
        ),
        ({"methods": {"a b": SCRATCH, "A-b": SCRATCH}}, r"methods\.A-b: .* gives the same as 'a b'"),
        ({"methods": {"+": SCRATCH}}, r"methods\.\+: .* gives none"),
        ({"pretraining": {}}, r"methods\.S3D\.pretraining: give images or volumes"),
        ({"datasets": {"a": {"folder": "a", "labels": [0]}}}, r"datasets\.a\.labels: must be a list of different"),
        ({"datasets": {"a": {"folder": "a", "fold": 1}}}, r"datasets\.a\.fold: no such setting; accepted: folder"),
        ({"datasets": {"a": {"labels": [2]}}}, r"datasets\.a\.folder: is missing"),
        (
            {"budget": {"pretraining_seconds": 0, "finetuning_seconds": 1}},
            r"budget\.pretraining_seconds: must be a pos",
        ),
        ({"tables": {"comparison": ["VoCo"]}}, r"tables\.comparison: no such method: 'VoCo'; there are: S3D, from scr"),
        ({"reference": "none"}, "reference: no such method: 'none'"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_protocol(protocol(**{"reference": next(iter(changes.get("methods", ())), "S3D"), **changes}))


def test_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "protocol.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"protocol\.json: is not JSON"):
        read_protocol(file)
    file.write_text(json.dumps(protocol(seeds=None)))
    with pytest.raises(ValueError, match=r"protocol\.json: seeds: must be"):
        read_protocol(file)


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="examples are not beside the tests")
@pytest.mark.parametrize("name", ["small.json", "paper.json"])
def test_shipped_protocols(name: str) -> None:
    parsed = read_protocol(SHIPPED / name)
    used = {method.pretraining.get("method", "s3d") for method in parsed.methods if method.pretraining is not None}
    assert used == set(METHODS), "a method is not compared"
    assert {*parsed.comparison, *parsed.ablation} == {method.name for method in parsed.methods}


def test_a_name_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "protocol.json"
    file.write_text('{"methods": {"S3D": {"pretraining": {}}, "S3D": {"pretraining": null}}}')
    with pytest.raises(ValueError, match=r"protocol.json: S3D: given twice in one object"):
        read_protocol(file)
    file.write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match=r"protocol.json: is not JSON"):
        read_protocol(file)
