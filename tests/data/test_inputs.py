from __future__ import annotations

import json
from pathlib import Path

import pytest

from s3d.data import find_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folder with a.nii.gz, sub/b.nii, sub/deep/c.NII.GZ and things that are no images."""
    for name in ("a.nii.gz", "sub/b.nii", "sub/deep/c.NII.GZ", "notes.txt", "sub/._b.nii", "sub/mask.nrrd"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def names(found: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in found]


def test_folder_is_searched_recursively_for_images_only(images: Path) -> None:
    assert names(find_images([images]), images) == ["a.nii.gz", "sub/b.nii", "sub/deep/c.NII.GZ"]


def test_overlapping_inputs_give_each_file_once_and_sorted(images: Path) -> None:
    given = [images / "sub", str(images / "sub" / ".." / "a.nii.gz"), f"{images}/**/*.nii*", images / "sub" / "b.nii"]
    assert names(find_images(given), images) == ["a.nii.gz", "sub/b.nii", "sub/deep/c.NII.GZ"]


def test_pattern(images: Path) -> None:
    assert names(find_images([f"{images}/*/*"]), images) == ["sub/b.nii"]


def test_existing_name_with_pattern_characters_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t1[1].nii"
    path.touch()
    assert find_images([path]) == [path]


def test_relative_inputs_become_absolute(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    assert find_images(["a.nii.gz"]) == [images / "a.nii.gz"]


@pytest.mark.parametrize("column", ["image", "path"])
def test_csv_is_relative_to_itself_and_may_name_missing_files(images: Path, column: str) -> None:
    listing = images / "sub" / "list.csv"
    listing.write_text(f"\ufeffage,{column}\n7,b.nii\n8,../a.nii.gz\n9,{images}/gone.nii\n10,\n", encoding="utf-8")
    assert names(find_images([listing]), images) == ["a.nii.gz", "gone.nii", "sub/b.nii"]


def test_json_of_paths_and_objects(images: Path) -> None:
    listing = images / "list.json"
    listing.write_text(json.dumps(["sub/b.nii", {"image": "a.nii.gz", "age": 7}]))
    assert names(find_images([listing]), images) == ["a.nii.gz", "sub/b.nii"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x.csv", "file,age\na.nii,7\n", r"columns \['file', 'age'\].*'image' or 'path'"),
        ("x.csv", "image\nscan.mha\n", r"entry '.*scan\.mha'"),
        ("x.csv", "image\n", r"x\.csv' matches no"),
        ("x.json", "{}", "holds a dict"),
        ("x.json", "[1]", "1 is neither a path nor an object"),
        ("x.json", '[{"label": "a.nii"}]', "neither a path nor an object"),
        ("x.json", "[", "no readable json"),
        ("x.txt", "a.nii", r"is a \.txt file; an input is a folder"),
    ],
)
def test_lists_that_cannot_be_used_say_why(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        find_images([tmp_path / file])


@pytest.mark.parametrize("given", ["gone.nii.gz", "nothing/*.nii", "empty"])
def test_input_that_matches_nothing_is_an_error(tmp_path: Path, given: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"inputs: .* matches no \.nii or \.nii\.gz file; an input is a folder"):
        find_images([tmp_path / given])


def test_no_inputs_is_an_error() -> None:
    with pytest.raises(ValueError, match="inputs is empty"):
        find_images([])


def test_single_string_is_refused(images: Path) -> None:
    with pytest.raises(TypeError, match="inputs must be a sequence of paths, got the single str"):
        find_images(str(images))
