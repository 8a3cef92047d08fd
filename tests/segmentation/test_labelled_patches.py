from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from small_dataset import write_dataset

from s3d.segmentation.case_store import CaseStore, prepare_dataset
from s3d.segmentation.patches import SegmentationPatches
from s3d.segmentation.planning import fixed_plan
from s3d.segmentation.raw_dataset import read_raw_dataset

NAMES = ("case_0", "case_1", "case_2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    """Three cases of two channels, 20 x 30 x 25 voxels; the second has few voxels of one class only."""
    folder = tmp_path_factory.mktemp("patches")
    write_dataset(folder / "raw", shape=(26, 32, 20), channels=("T1", "T2"))
    stored = nib.load(folder / "raw" / "labelsTr" / "case_1.nii.gz")
    label = np.zeros(stored.shape, np.uint8)
    label[20:22, 3:5, 14:16] = 2
    nib.save(nib.Nifti1Image(label, stored.affine), folder / "raw" / "labelsTr" / "case_1.nii.gz")
    dataset = read_raw_dataset(folder / "raw")
    plan = fixed_plan(dataset, "tiny", 1.0, (8, 8, 8))
    return prepare_dataset(dataset.training, plan, folder / "store", progress=False)


def patches(store: CaseStore, patch_size: tuple[int, int, int] = (12, 16, 8), **options: object) -> SegmentationPatches:
    settings = {"seed": 5, "length": 60, "augmentation": False, **options}
    return SegmentationPatches(store, NAMES, patch_size, **settings)  # type: ignore[arg-type]


def test_a_patch_is_a_part_of_its_case(store: CaseStore) -> None:
    for sample in map(patches(store).__getitem__, range(20)):
        assert sample["image"].dtype == torch.float32
        assert sample["label"].dtype == torch.uint8
        assert (sample["image"].shape, sample["label"].shape) == ((2, 12, 16, 8), (1, 12, 16, 8))
        case = store.position(sample["case"])
        whole = np.lib.stride_tricks.sliding_window_view(store.read(case), (12, 16, 8), axis=(1, 2, 3))
        found = np.argwhere((whole[0] == sample["image"][0].numpy()).all(axis=(-1, -2, -3)))
        assert len(found) == 1
        d, h, w = found[0]
        np.testing.assert_array_equal(sample["image"], whole[:, d, h, w])
        np.testing.assert_array_equal(sample["label"][0], store.read_labels(case, (d, h, w), (12, 16, 8)))


@pytest.mark.parametrize("augmentation", [False, True])
def test_a_sample_depends_on_seed_and_number_only(store: CaseStore, augmentation: bool) -> None:
    first, again = patches(store, augmentation=augmentation), patches(store, augmentation=augmentation)
    for i in (31, 2, 17):  # the order of reading does not matter
        a, b = first[i], again[i]
        assert a["case"] == b["case"]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])
    for i in range(60):
        torch.manual_seed(i)
        again[i]
    assert torch.equal(first[3]["image"], again[3]["image"])
    assert not torch.equal(first[0]["image"], patches(store, seed=6, augmentation=augmentation)[0]["image"])


def test_an_epoch_shows_each_case_once(store: CaseStore) -> None:
    cases = [patches(store)[i]["case"] for i in range(60)]
    for epoch in range(20):
        assert sorted(cases[3 * epoch : 3 * epoch + 3]) == list(NAMES)
    assert len({tuple(cases[3 * epoch : 3 * epoch + 3]) for epoch in range(20)}) > 1


@pytest.mark.parametrize(("share", "samples"), [(0.0, 100), (1 / 3, 500), (1.0, 100)])
def test_a_share_of_the_patches_is_centred_on_a_class(store: CaseStore, share: float, samples: int) -> None:
    """The few voxels of the second case are rarely hit by chance."""
    dataset = SegmentationPatches(
        store, ["case_1"], (4, 4, 4), seed=5, length=samples, augmentation=False, foreground_share=share
    )
    hit = np.mean([bool(dataset[i]["label"].any()) for i in range(samples)])
    by_chance = 0.008  # 5^3 of 17 x 27 x 22 places
    assert hit == pytest.approx(share + (1 - share) * by_chance, abs=0.06)


def test_classes_are_drawn_alike(store: CaseStore) -> None:
    """The core has an eighth of the voxels of the ball."""
    dataset = patches(store, (3, 3, 3), length=600, foreground_share=1.0)
    centres = [
        int(sample["label"][0, 1, 1, 1])
        for sample in map(dataset.__getitem__, range(600))
        if sample["case"] != "case_1"
    ]
    counts = np.bincount(centres, minlength=3) / len(centres)
    assert counts[0] == 0
    assert counts[1] == pytest.approx(0.5, abs=0.08)


def test_foreground_patches_stay_within_the_case(store: CaseStore) -> None:
    """The patch shows no background beyond the border, but for what is smaller than it."""
    shape = store.cases[1].shape
    dataset = patches(store, shape, foreground_share=1.0)
    sample = next(sample for sample in map(dataset.__getitem__, range(9)) if sample["case"] == "case_1")
    np.testing.assert_array_equal(sample["image"], store.read(1))


def test_a_small_case_is_centred_on_background(store: CaseStore) -> None:
    depth, height, width = store.cases[0].shape
    dataset = patches(store, (depth + 5, height - 2, width + 8))
    sample = next(sample for sample in map(dataset.__getitem__, range(9)) if sample["case"] == "case_0")
    inner = (slice(3, 3 + depth), slice(None), slice(4, 4 + width))
    outside = torch.ones(depth + 5, height - 2, width + 8, dtype=torch.bool)
    outside[inner] = False
    for channel, background in enumerate(store.cases[0].background):
        assert (sample["image"][channel][outside] == background).all()
    assert not sample["label"][0][outside].any()
    labels = store.read_labels(0)
    assert any(np.array_equal(sample["label"][0][inner], labels[:, first : first + height - 2]) for first in range(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be 0 or more"),
        ({"length": 0}, "length must be 1 or more"),
        ({"foreground_share": 1.5}, r"foreground_share must be within \[0, 1\]"),
        ({"patch_size": (8, 8)}, "patch_size must be three positive whole numbers"),
    ],
)
def test_settings_out_of_range_are_named(store: CaseStore, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patches(store, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no case 'none'"):
        SegmentationPatches(store, ["none"], (8, 8, 8), seed=0, length=1, augmentation=False)
    with pytest.raises(ValueError, match="cases is empty"):
        SegmentationPatches(store, [], (8, 8, 8), seed=0, length=1, augmentation=False)
    with pytest.raises(IndexError):
        patches(store)[60]
