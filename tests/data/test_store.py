from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest
from numpy.typing import NDArray

from s3d.data import BadImageError, ImageSource, VolumeStore, WorkerDiedError, load_volume, preprocess
from s3d.data.preparing import case_names
from s3d.data.store import decompressed_voxels

WriteNifti = Callable[..., Path]
MakeHead = Callable[..., NDArray[np.float32]]


@pytest.fixture
def images(write_nifti: WriteNifti, make_head: MakeHead) -> list[Path]:
    return [write_nifti(f"in/{name}.nii.gz", make_head((20, 18, 16), seed)) for seed, name in enumerate("abc")]


@pytest.fixture
def bad_image(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "bad.nii.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"no image")
    return path


def bring_in(images: list[Path], folder: Path, **options: object) -> tuple[int, int, int]:
    summary = preprocess(images, folder, progress=False, **options)  # type: ignore[arg-type]
    return summary.written, summary.reused, summary.skipped


def test_a_region_is_that_part_of_the_volume(store: VolumeStore) -> None:
    rng = np.random.default_rng(0)
    for case, record in enumerate(store.cases):
        full = store.read(case)
        assert full.shape == record.shape
        assert full.dtype == np.float32
        for _ in range(20):
            start = [int(rng.integers(side)) for side in record.shape]
            shape = [int(rng.integers(1, side - first + 1)) for side, first in zip(record.shape, start)]
            expected = full[tuple(slice(first, first + length) for first, length in zip(start, shape))]
            np.testing.assert_array_equal(store.read(case, start, shape), expected)


def test_what_is_stored_is_the_loaded_volume_to_float16(store: VolumeStore) -> None:
    for case, record in enumerate(store.cases):
        volume = load_volume(record.source)
        np.testing.assert_allclose(store.read(case), volume.voxels, rtol=2**-11, atol=1e-6)
        assert (record.spacing_mm, record.mean, record.std) == (volume.spacing_mm, volume.mean, volume.std)
        np.testing.assert_array_equal(record.affine, volume.affine)
        assert record.background == store.read(case).min()


def test_blocks_are_small_and_compressed(store: VolumeStore) -> None:
    record = store.cases[0]
    array = blosc2.open(str(store.folder / record.file), mode="r")
    assert array.blocks == (16, 16, 16)
    assert (store.folder / record.file).stat().st_size < 2 * np.prod(record.shape)


@pytest.mark.parametrize(
    ("start", "shape"),
    [((-1, 0, 0), (4, 4, 4)), ((0, 0, 97), (4, 4, 4)), ((0, 0, 0), (4, 0, 4)), ((0, 0), (4, 4)), ((0, 200, 0), None)],
)
def test_regions_outside_are_refused(store: VolumeStore, start: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not describe a region of case 'case0'"):
        store.read(0, start, shape)


@pytest.mark.parametrize("case", [-1, 4])
def test_no_such_case(store: VolumeStore, case: int) -> None:
    with pytest.raises(IndexError, match="case must be 0 to 3"):
        store.read(case)


def test_store_can_be_pickled(store: VolumeStore) -> None:
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read(3), store.read(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_second_run_reuses_everything(images: list[Path], tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "store"
    assert bring_in(images, folder, workers=workers) == (3, 0, 0)
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.b2nd")}
    cases = VolumeStore(folder).cases
    assert [case.name for case in cases] == ["a", "b", "c"]
    assert bring_in(images, folder, workers=workers) == (0, 3, 0)
    assert files == {path: path.stat().st_mtime_ns for path in folder.glob("*.b2nd")}
    assert VolumeStore(folder).cases == cases


def test_changed_source_is_redone(
    images: list[Path], tmp_path: Path, write_nifti: WriteNifti, make_head: MakeHead
) -> None:
    folder = tmp_path / "store"
    bring_in(images, folder)
    before = VolumeStore(folder)
    old = before.read(1)
    write_nifti("in/b.nii.gz", make_head((24, 18, 16), 9))
    assert bring_in(images, folder) == (1, 2, 0)
    after = VolumeStore(folder)
    assert after.read(1).shape == (16, 18, 24) != old.shape
    assert after.cases[0] == before.cases[0]


def test_touched_source_is_redone(images: list[Path], tmp_path: Path) -> None:
    bring_in(images, tmp_path / "store")
    os.utime(images[0], (1, 1))
    assert bring_in(images, tmp_path / "store") == (1, 2, 0)


def test_other_spacing_is_redone(images: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    bring_in(images, folder)
    assert bring_in(images, folder, spacing_mm=2.0) == (3, 0, 0)
    assert VolumeStore(folder).cases[0].shape == (8, 9, 10)
    assert bring_in(images, folder, spacing_mm=(2.0, 2.0, 2.0)) == (0, 3, 0)
    assert bring_in(images, folder, spacing_mm=None) == (3, 0, 0)


def test_more_and_fewer_images(images: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    assert bring_in(images[:1], folder) == (1, 0, 0)
    assert bring_in(images, folder) == (2, 1, 0)
    assert bring_in(images[1:], folder) == (0, 2, 0)
    assert [case.name for case in VolumeStore(folder).cases] == ["b", "c"]


def test_killed_half_way_nothing_unfinished_counts_as_done(images: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    script = (
        "import os, sys\n"
        "from s3d.data import preprocess\n"
        "calls = []\n"
        "def die(fd):\n"
        "    calls.append(fd)\n"
        "    if len(calls) == 2: os.ftruncate(fd, 1000); os._exit(9)\n"
        "os.fsync = die\n"
        "preprocess(sys.argv[2:], sys.argv[1], progress=False)\n"
    )
    # In another folder, so that it imports the package that is tested and not the one in the current folder.
    killed = subprocess.run([sys.executable, "-c", script, str(folder), *map(str, images)], cwd=tmp_path, check=False)
    assert killed.returncode == 9
    assert [path.name.rsplit("-", 1)[0] for path in folder.glob("*.b2nd")] == ["a"]
    with pytest.raises(FileNotFoundError, match="preprocessing did not finish"):
        VolumeStore(folder)
    assert bring_in(images, folder) == (2, 1, 0)
    bring_in(images, tmp_path / "clean")
    for case in range(3):
        np.testing.assert_array_equal(VolumeStore(folder).read(case), VolumeStore(tmp_path / "clean").read(case))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failing_write_leaves_no_files(
    images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(OSError, match="no space left"):
        bring_in(images, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_rewriting_a_case_takes_the_index_away_until_the_end(
    images: list[Path], bad_image: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    bring_in(images, folder)
    with pytest.raises(BadImageError):
        bring_in([bad_image, *images], folder, spacing_mm=2.0)
    assert len(VolumeStore(folder)) == 3  # nothing was written yet
    with pytest.raises(BadImageError):
        bring_in([*images, bad_image], folder, spacing_mm=2.0)
    with pytest.raises(FileNotFoundError):
        VolumeStore(folder)


def test_damaged_case_file_is_redone(images: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    bring_in(images, folder)
    first, second = (folder / case.file for case in VolumeStore(folder).cases[:2])
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:500])
    store = VolumeStore(folder)
    for case in (0, 1):
        with pytest.raises(OSError, match=rf"/store/{store.cases[case].file} is damaged or gone; prepare the same"):
            store.read(case)
    assert bring_in(images, folder) == (2, 1, 0)
    store.read(0)


def test_runs_that_share_a_folder_do_not_see_each_others_voxels(images: list[Path], tmp_path: Path) -> None:
    """Another source of the same name, or another spacing, while the first run still reads."""
    folder, other = tmp_path / "store", tmp_path / "other" / images[0].name
    other.parent.mkdir()
    other.write_bytes(images[1].read_bytes())
    preprocess([images[0]], folder, progress=False)
    first = VolumeStore(folder)
    before = first.read(0)
    preprocess([other], folder, progress=False)
    preprocess([images[0]], folder, spacing_mm=2.0, progress=False)
    assert np.array_equal(first.read(0), before)
    assert preprocess([images[0]], folder, progress=False).reused == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_stops_or_is_skipped(images: list[Path], bad_image: Path, tmp_path: Path, workers: int) -> None:
    given = [images[0], bad_image, *images[1:], tmp_path / "in" / "gone.nii"]
    with pytest.raises(BadImageError, match=r"bad\.nii\.gz: cannot be read as NIfTI"):
        preprocess(given[:-1], tmp_path / "store", progress=False, workers=workers)
    with pytest.raises(BadImageError, match=r"gone\.nii: no such file"):  # known before anything is read
        preprocess(given, tmp_path / "store", progress=False, workers=workers)

    summary = preprocess(given, tmp_path / "store", skip_bad=True, progress=False, workers=workers)
    assert (summary.written + summary.reused, summary.skipped) == (3, 2)
    assert [error.path for error in summary.bad] == [bad_image, given[-1]]
    assert "2 skipped" in str(summary)
    assert f"skipped {bad_image}: cannot be read as NIfTI" in str(summary)
    store = VolumeStore(tmp_path / "store")
    assert len(store) == 3
    assert [(error.path, error.reason) for error in store.skipped] == [
        (error.path, error.reason) for error in summary.bad
    ]


def test_all_bad_is_an_error(bad_image: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all 1 images are bad, for example .*bad\.nii\.gz"):
        preprocess([bad_image], tmp_path / "store", skip_bad=True, progress=False)


def test_arguments(images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images is empty"):
        preprocess([], tmp_path / "store")
    with pytest.raises(ValueError, match="workers must be 0 or more, got -1"):
        preprocess(images, tmp_path / "store", workers=-1)
    with pytest.raises(TypeError, match="images must be a sequence of paths"):
        preprocess(images[0], tmp_path / "store")  # type: ignore[arg-type]


def test_same_file_twice_is_one_case(images: list[Path], tmp_path: Path) -> None:
    assert bring_in([images[0], images[0].parent / ".." / "in" / "a.nii.gz"], tmp_path / "store") == (1, 0, 0)


def test_progress_bar_counts_images(images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(images, tmp_path / "store")
    assert "3/3" in capsys.readouterr().err
    preprocess(images, tmp_path / "store", progress=False)
    assert capsys.readouterr().err == ""


def test_store_of_another_version_is_refused(images: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    bring_in(images, folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": 0}))
    with pytest.raises(ValueError, match="store format 0, this version reads 2"):
        VolumeStore(folder)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["/d/t1.nii.gz", "/d/t2.nii"], ["t1", "t2"]),
        (["/d/a/t1.nii.gz", "/d/b/t1.nii.gz", "/d/b/t2.nii"], ["a__t1", "b__t1", "t2"]),
        (["/x/a/s/t1.nii", "/x/b/s/t1.nii", "/x/b/q/t1.nii"], ["a__s__t1", "b__s__t1", "q__t1"]),
        (["/d/a/t1.nii", "/d/b/t1.nii", "/d/c/a__t1.nii"], ["d__a__t1", "b__t1", "c__a__t1"]),
        (["/d/a/T1.nii", "/d/b/t1.nii"], ["a__T1", "b__t1"]),
    ],
)
def test_case_names_are_short_and_unique(sources: list[str], expected: list[str]) -> None:
    assert case_names([ImageSource(Path(source)) for source in sources]) == expected


def test_case_names_of_files_that_only_differ_in_suffix_or_case() -> None:
    names = case_names([ImageSource(Path(f"/d/{name}")) for name in ("t1.nii", "t1.nii.gz", "T1.nii")])
    assert len({name.lower() for name in names}) == 3


def kill_a_worker() -> None:
    deadline = time.monotonic() + 60
    while not (children := multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert children[0].pid is not None
    os.kill(children[0].pid, signal.SIGKILL)


def test_killed_worker_is_named_with_its_image_and_nothing_is_lost(
    tmp_path: Path, write_nifti: WriteNifti, make_head: MakeHead
) -> None:
    images = [write_nifti(f"in/{seed}.nii.gz", make_head((70, 70, 70), seed)) for seed in range(6)]
    folder = tmp_path / "store"
    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    with pytest.raises(
        WorkerDiedError, match=r"by signal 9 \(Killed\) while it worked on .*/in/\d\.nii\.gz; out of memory\?"
    ):
        preprocess(images, folder, workers=2, progress=False)
    killer.join()
    with pytest.raises(FileNotFoundError):
        VolumeStore(folder)
    assert sum(bring_in(images, folder, workers=2)) == 6
    bring_in(images, tmp_path / "clean")
    for case in range(6):
        np.testing.assert_array_equal(VolumeStore(folder).read(case), VolumeStore(tmp_path / "clean").read(case))


@pytest.mark.parametrize("workers", [0, 2])
def test_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    tmp_path: Path, write_nifti: WriteNifti, make_head: MakeHead, workers: int
) -> None:
    """A limit on the size of files fails like a full disk does: in the middle of a write."""
    images = [write_nifti("in/a.nii.gz", make_head((16, 16, 16))), write_nifti("in/b.nii.gz", make_head((60, 60, 60)))]
    folder = tmp_path / "store"
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, sys\n"
        "from s3d.data import preprocess\n"
        "if __name__ == '__main__':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"    preprocess(sys.argv[2:], sys.argv[1], progress=False, workers={workers})\n"
    )
    run = subprocess.run(
        [sys.executable, script, folder, *images], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert re.search(
        r"^OSError: cannot write .*/b-\w+\.b2nd \(0\.\d MB\): File too large; free some space there and run the same",
        run.stderr,
        re.MULTILINE,
    )
    assert [path.name.rsplit("-", 1)[0] for path in folder.iterdir()] == ["a"]
    assert bring_in(images, folder) == (1, 1, 0)


def test_leftovers_of_killed_runs_are_removed_when_they_are_old(images: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    old, young = folder / ".a.b2nd.1.tmp", folder / ".a.b2nd.2.tmp"
    old.touch()
    young.touch()
    os.utime(old, (1, 1))
    bring_in(images, folder)
    assert not old.exists()
    assert young.exists()


def test_decompressed_voxels_are_those_of_the_touched_blocks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        whole = rng.integers(8, 90, 3)
        start = rng.integers(whole)
        shape = rng.integers(1, whole - start + 1)
        block = np.minimum(16, whole)
        touched = np.zeros(whole, bool)
        for corner in itertools.product(*(range(f // b, (f + n - 1) // b + 1) for f, n, b in zip(start, shape, block))):
            touched[tuple(slice(c * b, (c + 1) * b) for c, b in zip(corner, block))] = True
        assert decompressed_voxels(start.tolist(), shape.tolist(), whole.tolist()) == touched.sum()
