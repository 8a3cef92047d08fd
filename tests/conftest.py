"""What must be decided before anything is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from s3d.pretrain import PretrainResult
    from s3d.pretrain_config import PretrainConfig

# Triton reads it once, when it is imported: its kernels are functions in Python then, which run on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def measurements_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor write what was measured for the user."""
    from s3d_kernels.backends import measurements

    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache") / "measurements.json"
        patch.setattr(measurements, "_store", measurements.MeasurementStore(path))
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three smooth volumes."""
    from small_runs import write_images

    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, PretrainResult]:
    """A run of six steps, left alone."""
    from small_runs import configure

    from s3d.pretrain import pretrain

    config = configure(images, tmp_path_factory.mktemp("run") / "a")
    return config, pretrain(config)
