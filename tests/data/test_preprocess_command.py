from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from s3d import preprocessing
from s3d.cli import main
from s3d.data import VolumeStore, loader_speed

WriteNifti = Callable[..., Path]
MakeHead = Callable[..., NDArray[np.float32]]


@pytest.fixture
def images(write_nifti: WriteNifti, make_head: MakeHead, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two subjects, a damaged image, and a list that gives one of them a mask."""
    monkeypatch.setattr(preprocessing, "loader_speed", functools.partial(loader_speed, seconds=0))
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    first = write_nifti("in/sub-1/anat/T1w.nii.gz", make_head((20, 18, 16)), affine)
    write_nifti("in/sub-2/ses-1/anat/T1w.nii.gz", make_head((22, 18, 16), 1), affine)
    face = np.zeros((20, 18, 16), np.uint8)
    face[5:, 9:, :8] = 1
    write_nifti("face.nii.gz", face, affine)
    folder = first.parents[2]
    (folder.parent / "faces.csv").write_text(f"image,anonymisation_mask\n{first},face.nii.gz\n")
    return folder


def test_command_fills_a_store_and_reports(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = images / "sub-2/ses-1/anat/T2w.nii.gz"
    damaged.write_bytes(b"no image")
    arguments = ["preprocess", "--images", str(images), str(tmp_path / "faces.csv")]
    arguments += ["--output-dir", str(tmp_path / "store"), "--workers", "0"]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert re.search(r"^s3d: .*T2w\.nii\.gz: cannot be read as NIfTI", capsys.readouterr().err, re.MULTILINE)

    main([*arguments, "--skip-bad"])
    assert "0 written, 2 reused, 1 skipped" in capsys.readouterr().out
    store = VolumeStore(tmp_path / "store")
    assert [(case.subject, case.session) for case in store.cases] == [("in/sub-1", None), ("in/sub-2", "ses-1")]
    assert store.cases[0].spacing_mm == (1.0, 1.0, 1.0)
    assert store.has_anonymised

    page = (tmp_path / "store" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    rows = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", page))
    assert rows["volumes"] == "2"
    assert rows["subjects"] == "2, of 2 volumes"
    assert rows["volumes with anonymised regions"] == "1"
    assert rows[str(damaged)].startswith("cannot be read as NIfTI")
    assert re.search(r"<td>160\^3</td><td>augmented</td><td>[\d.]+</td><td>[\d.]+</td><td>[\d.]+</td>", page)
    assert "32 x 36 x 40" in page  # after resampling


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [(["native"], (2.0, 2.0, 2.0)), (["1mm"], (1.0, 1.0, 1.0)), (["4"], (4, 4, 4)), (["4", "2", "1"], (4, 2, 1))],
)
def test_spacing(images: Path, tmp_path: Path, spacing: list[str], expected: tuple[float, ...]) -> None:
    if spacing == ["4"]:  # a side of 16 voxels of 2 mm would be too short
        spacing, expected = ["1.6"], (1.6, 1.6, 1.6)
    main(
        [
            "preprocess",
            "--images",
            str(images),
            "--output-dir",
            str(tmp_path / "s"),
            "--workers",
            "0",
            "--spacing",
            *spacing,
        ]
    )
    assert VolumeStore(tmp_path / "s").cases[0].spacing_mm == pytest.approx(expected, rel=0.05)


def test_mistakes_end_with_one_line(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            main(["preprocess", "--output-dir", str(tmp_path / "s"), "--workers", "0", *arguments])
        return capsys.readouterr().err

    assert "matches no .nii" in complaint("--images", str(tmp_path / "nowhere"))
    assert "s3d: spacing_mm must be one positive number" in complaint("--images", str(images), "--spacing", "-1")
    assert "workers must be at least 0, got -1" in complaint("--images", str(images), "--workers", "-1")
    (tmp_path / "s").touch()
    assert re.search(r"s3d: .*exists.*'.*/s'", complaint("--images", str(images)))


def test_options_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts name them; a new one joins the list, none leaves it."""
    with pytest.raises(SystemExit):
        main(["preprocess", "--help"])
    options = set(re.findall(r"--([a-z][a-z-]+)", capsys.readouterr().out))
    assert options == {"help", "images", "output-dir", "skip-bad", "no-skip-bad", "spacing", "workers"}
