"""What must be decided before anything is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

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
