from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from s3d.data import VolumeStore, preprocess

WriteNifti = Callable[..., Path]


def head(shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.float32]:
    """A bright noisy ellipsoid that touches every side, on zero background."""
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    inside = sum(axis**2 for axis in axes) <= 1.2
    noise = np.random.default_rng(seed).normal(100, 20, size=shape)
    return np.where(inside, noise, 0).astype(np.float32)


@pytest.fixture
def make_head() -> Callable[..., NDArray[np.float32]]:
    return head


@pytest.fixture
def write_nifti(tmp_path: Path) -> WriteNifti:
    """write_nifti(name, voxels [x, y, z] in RAS, affine) -> path"""

    def write(name: str, voxels: NDArray[np.generic], affine: NDArray[np.float64] | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    """Four volumes: two larger than a chunk of the store, one thin, one small."""
    folder = tmp_path_factory.mktemp("store")
    images = []
    for seed, shape in enumerate([(70, 90, 100), (66, 66, 66), (60, 50, 20), (24, 24, 24)]):
        images.append(folder / f"case{seed}.nii.gz")
        nib.save(nib.Nifti1Image(head(shape, seed), np.eye(4)), images[-1])
    preprocess(images, folder / "store", progress=False)
    return VolumeStore(folder / "store")
