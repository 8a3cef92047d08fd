from __future__ import annotations

import json
from pathlib import Path

import pytest

from s3d.data import ImageSource, find_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folder with a.nii.gz, sub/b.nii, sub/deep/c.NII.GZ and things that are no images."""
    for name in (
        "a.nii.gz",
        "sub/b.nii",
        "sub/deep/c.NII.GZ",
        "notes.txt",
        "sub/._b.nii",
        "sub/mask.nrrd",
        ".git/d.nii",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def names(found: list[ImageSource], root: Path) -> list[str]:
    return [image.path.relative_to(root).as_posix() for image in found]


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
    assert [image.path for image in find_images([path])] == [path]


def test_relative_inputs_become_absolute(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    (image,) = find_images(["a.nii.gz"])
    assert image.path == images / "a.nii.gz"
    assert Path(image) == image.path  # it stands for its path


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
    with pytest.raises(
        ValueError, match=r"inputs: .* matches no \.nii, .*\.mgz file or DICOM series; an input is a folder"
    ):
        find_images([tmp_path / given])


def test_no_inputs_is_an_error() -> None:
    with pytest.raises(ValueError, match="inputs is empty"):
        find_images([])


def test_single_string_is_refused(images: Path) -> None:
    with pytest.raises(TypeError, match="inputs must be a sequence of paths, got the single str"):
        find_images(str(images))


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.fixture
def bids(tmp_path: Path) -> Path:
    """Two data sets that both have a sub-01, one with sessions, and much that is no anatomical image."""
    touch(
        tmp_path,
        "ds1/dataset_description.json",
        "ds1/sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "ds1/sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz",
        "ds1/sub-01/ses-b/anat/sub-01_ses-b_mod-T1w_defacemask.nii.gz",
        "ds1/sub-01/ses-b/anat/sub-01_ses-b_part-phase_T2w.nii.gz",
        "ds1/sub-01/ses-b/func/sub-01_ses-b_task-rest_bold.nii.gz",
        "ds1/sub-02/ses-a/anat/sub-02_ses-a_FLAIR.nii",
        "ds1/derivatives/strip/sub-01/ses-a/anat/sub-01_ses-a_desc-brain_T1w.nii.gz",
        "ds1/sourcedata/sub-01/scan.nii",
        "ds2/sub-01/anat/sub-01_T1w.nii.gz",
        "ds2/sub-01/dwi/sub-01_dwi.nii.gz",
        "ds2/derivatives/x/sub-01/anat/sub-01_T1w.nii.gz",
    )
    return tmp_path


def test_bids_gives_anatomical_raw_images_with_subject_and_session(bids: Path) -> None:
    known = [(image.path.name, image.subject, image.session) for image in find_images([bids])]
    assert known == [
        ("sub-01_ses-a_T1w.nii.gz", "ds1/sub-01", "ses-a"),
        ("sub-01_ses-b_T1w.nii.gz", "ds1/sub-01", "ses-b"),
        ("sub-02_ses-a_FLAIR.nii", "ds1/sub-02", "ses-a"),
        ("sub-01_T1w.nii.gz", "ds2/sub-01", None),
    ]
    assert find_images([bids / "ds1", bids / "ds2"]) == find_images([bids])


def test_what_bids_leaves_out_can_be_named_and_belongs_to_the_same_subject(bids: Path) -> None:
    derived, bold = find_images([bids / "ds1/derivatives/strip", bids / "ds1/sub-01/ses-b/func"])
    assert (derived.subject, derived.session) == ("ds1/sub-01", "ses-a")
    assert (bold.path.name, bold.subject) == ("sub-01_ses-b_task-rest_bold.nii.gz", "ds1/sub-01")
    (phase,) = find_images([f"{bids}/ds1/sub-01/*/anat/*phase*"])
    assert phase.path.name == "sub-01_ses-b_part-phase_T2w.nii.gz"


def test_a_list_knows_better_than_names_of_folders(bids: Path) -> None:
    (bids / "l.csv").write_text("image,subject\nds2/sub-01/anat/sub-01_T1w.nii.gz,another\n")
    for given in ([bids / "l.csv", bids / "ds2"], [bids / "ds2", bids / "l.csv"]):
        assert [image.subject for image in find_images(given)] == ["another"]


def test_folders_that_are_called_derivatives_elsewhere_are_searched(tmp_path: Path) -> None:
    touch(tmp_path, "derivatives/a.nii", "func/b.nii", "patients/sub-7/T1.nii")
    found = find_images([tmp_path / "derivatives", tmp_path / "func", tmp_path / "patients"])
    assert [image.subject for image in found] == [None, None, "patients/sub-7"]


def test_lists_may_say_subject_session_and_masks(images: Path) -> None:
    row = {"image": "b.nii", "subject": "7", "session": "first", "anatomy_mask": "m/anat.nii"}
    (images / "sub" / "l.json").write_text(json.dumps([{**row, "anonymization_mask": "/m/face.nii"}]))
    (images / "sub" / "l.csv").write_text(
        "path,subject,session,anatomy_mask,anonymisation_mask\nb.nii,7,first,m/anat.nii,/m/face.nii\n../a.nii.gz,,,,\n"
    )
    expected = ImageSource(
        images / "sub/b.nii",
        subject="7",
        session="first",
        anatomy_mask=images / "sub/m/anat.nii",
        anonymisation_mask=Path("/m/face.nii"),
    )
    assert find_images([images / "sub" / "l.json"]) == [expected]
    assert find_images([images / "sub" / "l.csv"]) == [ImageSource(images / "a.nii.gz"), expected]
    # A folder that holds them as well adds nothing, and takes nothing away.
    assert expected in find_images([images / "sub" / "l.csv", images])
    touch(images, "sub/m/anat.nii")  # a mask is no image
    assert "sub/m/anat.nii" in names(find_images([images]), images)
    assert "sub/m/anat.nii" not in names(find_images([images, images / "sub" / "l.csv"]), images)
    assert expected in find_images([images, images / "sub" / "l.csv"])


def nnssl_list(**image: object) -> dict[str, object]:
    images = [{"name": "x", "image_path": "scan.nii.gz", "modality": "T1w", "image_info": {}, **image}]
    sessions = {"ses-1": {"session_id": "ses-1", "session_info": None, "images": images}}
    subjects = {"sub-1": {"subject_id": "sub-1", "subject_info": {"age": 3}, "sessions": sessions}}
    datasets = {"ds9": {"dataset_index": "ds9", "name": None, "dataset_info": {}, "subjects": subjects}}
    return {"collection_index": 745, "collection_name": "Mind", "datasets": datasets}


def test_nnssl_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnssl_raw", "/data/raw/")
    masks = {"anonymization_mask": "$nnssl_raw/face.nii.gz", "anatomy_mask": None}
    listing = tmp_path / "pretrain_data.json"
    listing.write_text(json.dumps(nnssl_list(image_path="$nnssl_raw/ds9/scan.nii.gz", associated_masks=masks)))
    expected = ImageSource(
        Path("/data/raw/ds9/scan.nii.gz"),
        subject="Mind/ds9/sub-1",
        session="ses-1",
        anonymisation_mask=Path("/data/raw/face.nii.gz"),
    )
    assert find_images([listing]) == [expected]
    listing.write_text(json.dumps(nnssl_list(associated_masks=None)))
    assert find_images([listing]) == [ImageSource(tmp_path / "scan.nii.gz", subject="Mind/ds9/sub-1", session="ses-1")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            nnssl_list(image_path="$nowhere_at_all/a.nii"),
            "the variable nowhere_at_all is not set; export nowhere_at_all=",
        ),
        (nnssl_list(image_path="a.nrrd"), r"has the entry '.*a\.nrrd'"),
        ({"datasets": {"a": {}}}, "is not laid out as collection, datasets, .* KeyError 'subjects'"),
        ({"datasets": [1]}, "is not laid out as collection"),
    ],
)
def test_nnssl_list_that_cannot_be_used_says_why(tmp_path: Path, content: dict[str, object], message: str) -> None:
    (tmp_path / "l.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        find_images([tmp_path / "l.json"])
