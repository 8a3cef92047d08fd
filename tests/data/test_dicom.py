from __future__ import annotations

import locale
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from s3d.data import BadImageError, ImageSource, VolumeStore, find_images, load_volume, preprocess

sitk = pytest.importorskip("SimpleITK")

MakeHead = Callable[..., NDArray[np.float32]]
DIRECTION = np.array([[0.96, 0.28, 0.0], [-0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])  # columns: the axes, in LPS


def write_series(
    folder: Path,
    voxels: NDArray[np.int16],  # [k, j, i]
    uid: str = "1.2.3",
    patient: str = "P7",
    suffix: str = "",
    places: list[float] | None = None,  # of the slices in mm
    shift: float = 0.0,  # of each slice against the one before it, in mm along its columns
) -> None:
    """One file a slice, 2.5 mm thick, pixels of 1.5 x 1.25 mm, names in an order that is not that of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, values in enumerate(voxels):
        image = sitk.GetImageFromArray(values)
        image.SetSpacing([1.5, 1.25])
        place = number * 2.5 if places is None else places[number]
        tags = {
            "0008|0060": "MR",
            "0008|0018": f"{uid}.{number + 1}",
            "0010|0020": patient,
            "0020|000d": "9.8.7",
            "0020|000e": uid,
            "0020|0032": "\\".join(
                map(str, np.array([10.0, 20.0, 30.0]) + DIRECTION[:, 2] * place + DIRECTION[:, 1] * shift * number)
            ),
            "0020|0037": "\\".join(map(str, [*DIRECTION[:, 0], *DIRECTION[:, 1]])),
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        name = f"{uid}_{(number * 7) % len(voxels):03d}{suffix}"
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(folder / name))
        writer.Execute(image)


@pytest.fixture(autouse=True)
def _locale_kept() -> Iterator[None]:
    """Writing series with SimpleITK changes the locale of the process."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def voxels(make_head: MakeHead) -> NDArray[np.int16]:
    return make_head((12, 20, 16)).astype(np.int16)


def test_reading_leaves_the_locale_of_the_process(tmp_path: Path, voxels: NDArray[np.int16]) -> None:
    """Or text files would be written and read as ASCII from then on."""
    write_series(tmp_path, voxels)
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    (found,) = find_images([tmp_path])
    load_volume(found)
    assert locale.setlocale(locale.LC_CTYPE) == "C.UTF-8"


def test_series_are_found_by_uid_with_subject_and_session(tmp_path: Path, voxels: NDArray[np.int16]) -> None:
    write_series(tmp_path / "p/scans", voxels)
    write_series(tmp_path / "p/scans", voxels + 1, uid="1.2.4", suffix=".dcm")
    write_series(tmp_path / "p/other", voxels, uid="1.2.5", patient="P8")
    (tmp_path / "p/scans/notes.txt").write_text("no image")
    found = find_images([tmp_path])
    assert found == [
        ImageSource(tmp_path / "p/other", "1.2.5", "P8", "9.8.7"),
        ImageSource(tmp_path / "p/scans", "1.2.3", "P7", "9.8.7"),
        ImageSource(tmp_path / "p/scans", "1.2.4", "P7", "9.8.7"),
    ]
    assert find_images([f"{tmp_path}/*/scans"]) == found[1:]
    (tmp_path / "p/scans/notes.txt").unlink()
    for file in list((tmp_path / "p/other").iterdir()):
        file.rename(file.with_name(f"MR.{file.name.replace('_', '.')}"))  # as archives name files: by UIDs
    assert find_images([tmp_path]) == found
    (tmp_path / "l.csv").write_text("image,subject\np/other,somebody\n")
    assert [image.subject for image in find_images([tmp_path / "l.csv"])] == ["somebody"]


def test_voxels_and_affine_are_those_of_the_files(tmp_path: Path, voxels: NDArray[np.int16]) -> None:
    write_series(tmp_path, voxels)
    (source,) = find_images([tmp_path])
    volume = load_volume(source, None)
    assert volume.spacing_mm == pytest.approx((2.5, 1.25, 1.5), abs=1e-4)
    # DICOM's axes point to the left and to posterior, the volume's to the right and to anterior.
    expected = voxels[:, ::-1, ::-1].astype(np.float64)
    np.testing.assert_allclose(volume.voxels * volume.std + volume.mean, expected, atol=0.01)
    last = np.array([10, 20, 30]) + DIRECTION @ np.array([15 * 1.5, 19 * 1.25, 0])  # LPS of the voxel [0, -1, -1]
    np.testing.assert_allclose(volume.affine[:3, 3], last * [-1, -1, 1], atol=1e-3)


def test_series_of_a_folder_become_cases_that_are_redone_when_files_change(
    tmp_path: Path, voxels: NDArray[np.int16]
) -> None:
    write_series(tmp_path / "in", voxels)
    write_series(tmp_path / "in", voxels + 1, uid="1.2.4")
    folder = tmp_path / "store"
    assert preprocess(find_images([tmp_path / "in"]), folder, progress=False).written == 2
    first, second = VolumeStore(folder).cases
    assert first.name != second.name
    assert first.name.startswith("in-")
    assert (first.series, first.subject, first.session) == ("1.2.3", "P7", "9.8.7")
    assert preprocess(find_images([tmp_path / "in"]), folder, progress=False).written == 0
    next((tmp_path / "in").iterdir()).touch()
    assert preprocess(find_images([tmp_path / "in"]), folder, progress=False).written == 2


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([0, 2.5, 5, 10, 12.5, 15, 17.5, 20, 22.5, 25, 27.5, 30], r"slices 2\.5 to 5 mm apart \(some are missing\?\)"),
        ([0, 0, 2.5, 2.5, 5, 5, 7.5, 7.5, 10, 10, 12.5, 12.5], "several slices at one place"),
    ],
)
def test_series_that_are_no_volume_are_named(
    tmp_path: Path, voxels: NDArray[np.int16], places: list[float], message: str
) -> None:
    write_series(tmp_path, voxels, places=places)
    (source,) = find_images([tmp_path])
    with pytest.raises(BadImageError, match=rf"DICOM series 1\.2\.3 has {message}") as caught:
        load_volume(source)
    assert caught.value.path == tmp_path


def test_slices_of_a_tilted_gantry_are_named(tmp_path: Path, voxels: NDArray[np.int16]) -> None:
    write_series(tmp_path, voxels, shift=0.5)
    (source,) = find_images([tmp_path])
    with pytest.raises(BadImageError, match=r"shifted against each other by up to 5\.5 mm \(a tilted gantry\?\)"):
        load_volume(source)


def test_truncated_slice_is_named(tmp_path: Path, voxels: NDArray[np.int16]) -> None:
    write_series(tmp_path, voxels)
    (source,) = find_images([tmp_path])
    damaged = max(tmp_path.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-300])
    with pytest.raises(BadImageError, match=r"DICOM series 1\.2\.3"):
        load_volume(source)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(BadImageError, match=r"DICOM series 1\.2\.3 is not there"):
        load_volume(source)
    with pytest.raises(BadImageError, match="no such file"):
        preprocess([source], tmp_path / "store", progress=False)


def test_without_simpleitk_the_error_says_what_to_install(
    tmp_path: Path, voxels: NDArray[np.int16], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path, voxels[:2])
    missing: Any = None
    monkeypatch.setitem(sys.modules, "SimpleITK", missing)
    with pytest.raises(ValueError, match=r"holds DICOM files, .*pip install 's3d\[dicom\]'"):
        find_images([tmp_path])
