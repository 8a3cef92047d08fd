from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_dataset import save, write_dataset

from s3d.data import BadImageError
from s3d.model import PRESETS, RESENC_PRESETS, NetworkShape, preset_shape
from s3d.segmentation import planning
from s3d.segmentation.fingerprint import Fingerprint, read_fingerprint
from s3d.segmentation.plan import SegmentationPlan
from s3d.segmentation.planning import (
    dynamic_plan,
    feature_values,
    fixed_plan,
    plan_patch,
    target_spacing,
    total_strides,
)
from s3d.segmentation.raw_dataset import read_raw_dataset

# The stages of nnU-Net's own networks.
DEEP = preset_shape("resenc-l")


def fingerprint(spacings: list[tuple[float, ...]], shapes: list[tuple[int, ...]]) -> Fingerprint:
    return Fingerprint(np.array(spacings, dtype=float), np.array(shapes), np.zeros((1, 1), np.float32))


def test_a_fixed_plan_has_the_network_of_its_preset(tmp_path: Path) -> None:
    dataset = read_raw_dataset(write_dataset(tmp_path, channels=("T1", "T2")))
    plan = fixed_plan(dataset, "small", 1.0, (16, 24, 32))
    assert (plan.kind, plan.patch_size, plan.spacing_mm) == ("fixed", (16, 24, 32), (1.0, 1.0, 1.0))
    assert plan.network == preset_shape("small")
    assert [channel.scheme for channel in plan.normalization] == ["zscore", "zscore"]
    assert SegmentationPlan.from_plain(json.loads(json.dumps(plan.plain()))) == plan
    assert plan.build_network()(torch.zeros(1, 2, *plan.patch_size)).shape == (1, 3, *plan.patch_size)


@pytest.mark.parametrize(
    ("preset", "spacing", "patch_size", "message"),
    [
        ("huge", 1.0, (16, 16, 16), "preset must be one of"),
        ("small", 0.0, (16, 16, 16), "spacing_mm must be one positive number"),
        ("small", None, (16, 16, 16), "spacing_mm must be one positive number"),
        ("small", 1.0, (16, 20, 30), "multiple of 8 x 8 x 8, .* got 16 x 20 x 30; 16 x 16 x 32 is near"),
        ("small", 1.0, (16, 16), "patch_size must be three positive whole numbers"),
        ("small", 1.0, (8, 8, 8), "leaves one voxel at the lowest resolution"),
    ],
)
def test_a_fixed_plan_that_cannot_be_is_refused(
    tmp_path: Path, preset: str, spacing: float, patch_size: tuple[int, ...], message: str
) -> None:
    dataset = read_raw_dataset(write_dataset(tmp_path, cases=1, shape=(4, 5, 6)))
    with pytest.raises(ValueError, match=message):
        fixed_plan(dataset, preset, spacing, patch_size)


def test_ct_is_normalised_by_the_foreground_of_the_data_set(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, cases=0, channels=("ct", "PET"))
    intensities = []
    for number in range(3):
        rng = np.random.default_rng(number)
        label = (rng.random((12, 12, 12)) < 0.3).astype(np.int16)
        image = rng.normal(40 + number, 5, label.shape).astype(np.float32) * label - 1000 * (1 - label)
        intensities.append(image[label > 0])
        for channel in range(2):
            save(folder / "imagesTr" / f"c{number}_000{channel}.nii.gz", image.astype(np.float32), np.eye(4))
        save(folder / "labelsTr" / f"c{number}.nii.gz", label, np.eye(4))
    described = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**described, "numTraining": 3}))
    dataset = read_raw_dataset(folder)
    everything = np.concatenate(intensities)
    for plan in (
        fixed_plan(dataset, "tiny", 1.0, (8, 8, 8), progress=False),
        dynamic_plan(dataset, "tiny", 4, workers=2, progress=False),
    ):
        ct, pet = plan.normalization
        assert pet.scheme == "zscore"
        assert ct.scheme == "ct"
        expected = [everything.mean(), everything.std(), *np.percentile(everything, (0.5, 99.5))]
        np.testing.assert_allclose([ct.mean, ct.std, ct.low, ct.high], expected, rtol=1e-4)


def test_the_spacing_is_the_median() -> None:
    cases = fingerprint([(1, 1, 1), (2, 0.5, 1.5), (3, 0.6, 2)], [(40, 50, 60)] * 3)
    assert target_spacing(cases) == (2.0, 0.6, 1.5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_coarse_axis_takes_its_tenth_percentile(axis: int) -> None:
    def along(coarse: float, fine: float) -> tuple[float, ...]:
        return tuple(coarse if other == axis else fine for other in range(3))

    spacings = [along(coarse, 1.0) for coarse in (4, 5, 6, 7, 8, 8, 8, 8, 8, 8, 8)]
    few = fingerprint(spacings, [along(10, 200)] * 11)  # type: ignore[list-item]
    assert target_spacing(few) == along(5.0, 1.0)
    many = fingerprint(spacings, [along(100, 200)] * 11)  # type: ignore[list-item]
    assert target_spacing(many) == along(8.0, 1.0)
    some_fine = fingerprint([along(0.5, 1.0)] * 3 + spacings, [along(10, 200)] * 14)  # type: ignore[list-item]
    assert target_spacing(some_fine) == along(1.0, 1.0)  # not finer than the other axes


@pytest.mark.parametrize(
    ("spacing", "shape", "patch", "strides"),
    [  # of nnU-Net's published plans: hippocampus, and BraTS, whose network is cut by its memory
        ((1.0, 1.0, 1.0), (36, 50, 35), (40, 56, 40), (8, 8, 8)),
        ((1.0, 1.0, 1.0), (140, 171, 136), (128, 160, 112), (32, 32, 16)),
    ],
)
def test_known_data_sets_get_known_patches(
    spacing: tuple[float, ...], shape: tuple[int, ...], patch: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    planned, network = plan_patch(DEEP, spacing, shape, values=680e6, channels=1, classes=3)
    assert planned == patch
    assert total_strides(network) == strides


def test_an_axis_of_long_voxels_is_halved_and_convolved_later() -> None:
    patch, network = plan_patch(DEEP, (5.0, 1.0, 1.0), (20, 320, 320), values=math.inf, channels=1, classes=2)
    assert network.strides[:4] == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    assert network.kernel_sizes[:4] == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    assert patch[0] == 20
    assert patch[1] == patch[2] > 150


def test_less_memory_gives_smaller_patches_of_the_same_proportions() -> None:
    last = math.inf
    for values in (1e9, 3e8, 1e8, 3e7):
        patch, network = plan_patch(DEEP, (1, 1, 1), (100, 200, 150), values=values, channels=1, classes=2)
        assert feature_values(network, patch, 1, 2) <= values
        assert math.prod(patch) < last
        last = math.prod(patch)
        shares = np.array(patch) / (100, 200, 150)
        assert shares.max() / shares.min() < 1.7
    with pytest.raises(ValueError, match="memory_gib is too little"):
        plan_patch(DEEP, (1, 1, 1), (100, 200, 150), values=1e4, channels=1, classes=2)


def test_no_more_stages_than_the_preset_has() -> None:
    for preset in RESENC_PRESETS:
        size = PRESETS[preset]
        _, network = plan_patch(preset_shape(preset), (1, 1, 1), (160,) * 3, values=1e10, channels=1, classes=2)
        assert len(network.strides) == len(network.kernel_sizes) == len(size.features)
        assert network.features == size.features
        _, network = plan_patch(preset_shape(preset), (1, 1, 1), (11,) * 3, values=1e10, channels=1, classes=2)
        assert network.features == size.features[:2]
        assert network.blocks == size.blocks[:2]


def test_the_topology_is_that_of_nnunet() -> None:
    topology = pytest.importorskip("nnunetv2.experiment_planning.experiment_planners.network_topology")
    deep = NetworkShape((1,) * 12, (1,) * 12, (), ())
    compared = 0
    rng = np.random.default_rng(0)
    for _ in range(20):
        spacing = rng.choice([0.5, 0.8, 1.0, 1.7, 3.0, 5.0], 3).tolist()
        shape = rng.integers(5, 200, 3).tolist()
        _, strides, kernels, patch, _ = topology.get_pool_and_conv_props(spacing, shape, 4, 999)
        planned, network = plan_patch(deep, spacing, shape, values=math.inf, channels=1, classes=2)
        if 256 * math.prod(spacing) ** (1 / 3) < max(side * step for side, step in zip(shape, spacing)):
            continue  # longer than the longest patch
        compared += 1
        assert network.strides == tuple(map(tuple, strides))
        assert network.kernel_sizes == tuple(map(tuple, kernels))
        assert planned == tuple(int(side) for side in patch)
    assert compared > 10


def test_a_dynamic_plan_fits_the_data(tmp_path: Path) -> None:
    dataset = read_raw_dataset(write_dataset(tmp_path, shape=(21, 26, 16), spacing_mm=(1.5, 0.75, 1.0)))
    plan = dynamic_plan(dataset, "small", 1.0, progress=False)
    assert (plan.kind, plan.spacing_mm) == ("dynamic", (1.0, 0.75, 1.5))
    assert plan.patch_size == (16, 24, 20)  # of 16 x 24 x 20 after cropping
    assert plan.build_network()(torch.zeros(1, 1, *plan.patch_size)).shape == (1, 3, *plan.patch_size)
    assert dynamic_plan(dataset, "small", 1.0, workers=2, progress=False) == plan
    with pytest.raises(ValueError, match="memory_gib must be positive"):
        dynamic_plan(dataset, "small", 0)
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        dynamic_plan(dataset, "small", 1, batch_size=0)


def test_the_median_case_is_that_of_the_resampled_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64, 16 and 40 voxels of 1, 2 and 2 mm are 32, 16 and 40 of 2 mm."""
    cases = fingerprint([(1, 1, 1), (2, 2, 2), (2, 2, 2)], [(64,) * 3, (16,) * 3, (40,) * 3])
    monkeypatch.setattr(planning, "read_fingerprint", lambda dataset, **options: cases)
    dataset = read_raw_dataset(write_dataset(tmp_path, cases=1, shape=(4, 5, 6)))
    plan = dynamic_plan(dataset, "small", 8)
    assert (plan.spacing_mm, plan.patch_size) == ((2.0, 2.0, 2.0), (32, 32, 32))


def test_bad_cases_stop_the_planning_or_are_left_out(tmp_path: Path) -> None:
    dataset = read_raw_dataset(write_dataset(tmp_path))
    image = dataset.training[1].images[0]
    image.write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"case_1_0000\.nii\.gz"):
        read_fingerprint(dataset, progress=False)
    assert len(read_fingerprint(dataset, skip_bad=True, progress=False).shapes) == 2
    for case in dataset.training:
        case.images[0].write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"all 3 training cases of .* are bad, for example"):
        read_fingerprint(dataset, skip_bad=True, progress=False)
