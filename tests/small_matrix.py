"""A comparison of two methods on a small data set, in a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
from small_dataset import ball, save, write_dataset
from small_runs import write_images

from s3d.comparison.compare import CompareConfig, compare

TINY = {"preset": "tiny", "steps": 3, "batch_size": 2, "momentum": 0.9, "workers": 0, "validate_every": 100}


def write_data(folder: Path) -> Path:
    """Volumes for pre-training, a data set of 6 cases with a test set of 2, and one without."""
    (folder / "heads").mkdir(parents=True)
    write_images(folder / "heads")
    for name in ("Dataset001_Balls", "Dataset002_Untested"):
        write_dataset(folder / name, cases=6)
    for number in (0, 1):
        image, label = ball((16, 20, 12), 100 + number)
        affine = nib.load(folder / "Dataset001_Balls" / "labelsTr" / "case_0.nii.gz").affine
        save(folder / "Dataset001_Balls" / "imagesTs" / f"test_{number}_0000.nii.gz", image, affine)
        save(folder / "Dataset001_Balls" / "labelsTs" / f"test_{number}.nii.gz", label, affine)
    return folder


def protocol(**changes: Any) -> dict[str, Any]:
    """Content of the file."""
    content = {
        "description": "Tiny.",
        "pretraining": {**TINY, "images": ["heads"], "patch_size": [32, 32, 32], "mask_block": 8},
        "finetuning": {**{name: value for name, value in TINY.items() if name != "preset"}, "patch_size": [12, 16, 12]},
        "methods": {
            "S3D": {"pretraining": {}},
            "from scratch": {"pretraining": None, "finetuning": {"preset": "tiny"}},
        },
        "datasets": {"balls": {"folder": "Dataset001_Balls", "labels": [2], "validation_cases": 1}},
        "seeds": [0, 1],
        "reference": "S3D",
    }
    return {**content, **changes}


def run(data: Path, output: Path, content: dict[str, Any], **changes: Any) -> None:
    """`s3d compare`, in this process unless devices are given."""
    output.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".json")
    file.write_text(json.dumps(content))
    compare(CompareConfig(**{"config": file, "output_dir": output, "data_dir": data, "devices": (), **changes}))
