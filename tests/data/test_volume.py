from __future__ import annotations

import gc
import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from s3d.data import BadImageError, Volume, load_volume

WriteNifti = Callable[..., Path]
MakeHead = Callable[..., NDArray[np.float32]]

# Mostly (posterior, right, superior), turned by 6 degrees.
OBLIQUE = np.array([[0, np.cos(0.1), np.sin(0.1), 12], [-1, 0, 0, 30], [0, -np.sin(0.1), np.cos(0.1), 5], [0, 0, 0, 1]])


def test_axes_are_depth_superior_height_anterior_width_right(write_nifti: WriteNifti, make_head: MakeHead) -> None:
    voxels = make_head((20, 24, 28))
    voxels[19, 1, 2] = 1e4  # far right, low posterior, low inferior
    volume = load_volume(write_nifti("a.nii.gz", voxels))
    assert volume.voxels.shape == (28, 24, 20)
    assert np.unravel_index(volume.voxels.argmax(), volume.voxels.shape) == (2, 1, 19)


@pytest.mark.parametrize("codes", ["LPS", "LAS", "PIR", "SRA", "IAL"])
@pytest.mark.parametrize("affine", [np.diag([1.0, 1.0, 1.0, 1.0]), OBLIQUE], ids=["straight", "oblique"])
def test_orientation_of_storage_does_not_matter(
    tmp_path: Path, make_head: MakeHead, codes: str, affine: NDArray[np.float64]
) -> None:
    image = nib.as_closest_canonical(nib.Nifti1Image(make_head((20, 24, 28)), affine))
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
    )
    assert "".join(nib.aff2axcodes(turned.affine)) == codes
    nib.save(image, tmp_path / "ras.nii")
    nib.save(turned, tmp_path / "turned.nii")
    expected, actual = (load_volume(tmp_path / name, None) for name in ("ras.nii", "turned.nii"))
    np.testing.assert_array_equal(actual.voxels, expected.voxels)
    np.testing.assert_allclose(actual.affine, expected.affine, atol=1e-5)
    assert actual.spacing_mm == pytest.approx(expected.spacing_mm)


def ramp(world: NDArray[np.float64]) -> NDArray[np.float64]:
    """An intensity that is linear in the place, nowhere zero. world: [..., 3] mm."""
    return 2000 + world @ np.array([3.0, -5.0, 7.0])


def world_of(shape: tuple[int, ...], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Place of every voxel of an array with axes in the order of the affine, [*shape, 3] mm."""
    index = np.stack(np.meshgrid(*(np.arange(side) for side in shape), indexing="ij"), axis=-1)
    return nib.affines.apply_affine(affine, index)


@pytest.mark.parametrize(
    ("spacing_mm", "wanted"),
    [((2, 2, 2), 1.0), ((1, 1, 1), 2.0), ((0.7, 0.8, 1.3), 1.0), ((1, 1, 3), (3.0, 1.5, 0.5)), ((1, 1, 1), 1.0)],
)
def test_resampled_linear_ramp_is_the_ramp_at_the_new_places(
    write_nifti: WriteNifti, spacing_mm: tuple[float, ...], wanted: float | tuple[float, ...]
) -> None:
    affine = OBLIQUE @ np.diag([*spacing_mm, 1])
    voxels = ramp(world_of((30, 33, 36), affine))
    voxels[:3] = voxels[:, -2:] = voxels[:, :, :5] = 0  # cropping moves the origin
    volume = load_volume(write_nifti("ramp.nii.gz", voxels.astype(np.float64), affine), wanted)

    intensities = volume.voxels.astype(np.float64) * volume.std + volume.mean
    expected = ramp(world_of(volume.voxels.shape[::-1], volume.affine)).transpose(2, 1, 0)
    inner = (slice(3, -3),) * 3  # at the border there is nothing to interpolate with
    # The sampled triangle filter's centre of mass is off by up to 0.04 of a new voxel where an axis gets coarser.
    coarser = max(np.broadcast_to(wanted, 3)) if np.any(np.broadcast_to(wanted, 3) > spacing_mm[::-1]) else 0
    np.testing.assert_allclose(intensities[inner], expected[inner], rtol=1e-5, atol=0.04 * (3 + 5 + 7) * coarser)
    # A side is a whole number of voxels, so the spacing may be off by half a voxel over the side.
    for got, want, side in zip(volume.spacing_mm, np.broadcast_to(wanted, 3), volume.voxels.shape):
        assert abs(got - want) <= 0.5 * want / side + 1e-6


def test_downsampling_does_not_alias(write_nifti: WriteNifti) -> None:
    checkerboard = 100.0 + 50.0 * (-1.0) ** np.indices((45, 45, 45)).sum(axis=0)
    volume = load_volume(write_nifti("fine.nii", checkerboard.astype(np.float32)), 3.0)
    assert volume.voxels.shape == (15, 15, 15)
    assert volume.std < 5  # picking every third voxel would keep all of the 50


def test_crop_and_zscore_over_the_whole_crop(write_nifti: WriteNifti, make_head: MakeHead) -> None:
    inner = make_head((16, 18, 20))
    voxels = np.pad(inner, ((3, 1), (0, 4), (2, 2)))
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    volume = load_volume(write_nifti("a.nii.gz", voxels, affine), None)
    expected = (inner.T.astype(np.float64) - inner.mean(dtype=np.float64)) / inner.std(dtype=np.float64)
    np.testing.assert_allclose(volume.voxels, expected, atol=1e-5)
    assert volume.background == pytest.approx(-volume.mean / volume.std)
    assert volume.spacing_mm == (1.5, 1.5, 1.5)
    np.testing.assert_allclose(volume.affine[:3, 3], [4.5, 0.0, 3.0])


def test_integers_with_scaling_and_singleton_axes(tmp_path: Path, make_head: MakeHead) -> None:
    voxels = make_head((12, 12, 12)).round()
    image = nib.Nifti1Image(voxels.astype(np.int16)[..., None], np.eye(4))
    image.header.set_slope_inter(2.0, 0.0)
    nib.save(image, tmp_path / "scaled.nii.gz")
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "plain.nii.gz")
    scaled, plain = (load_volume(tmp_path / f"{name}.nii.gz") for name in ("scaled", "plain"))
    np.testing.assert_allclose(scaled.voxels, plain.voxels, atol=1e-5)


# nibabel leaves a file open whose header it could not read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["x.mgz", "x.mgh"])
def test_mgh_is_read_like_nifti(tmp_path: Path, make_head: MakeHead, name: str) -> None:
    voxels = make_head((20, 24, 28))
    affine = OBLIQUE @ np.diag([1.5, 1.0, 2.0, 1.0])
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "x.nii")
    nib.save(nib.MGHImage(voxels, affine), tmp_path / name)
    expected, actual = (load_volume(tmp_path / file) for file in ("x.nii", name))
    np.testing.assert_allclose(actual.voxels, expected.voxels, atol=1e-4)
    np.testing.assert_allclose(actual.affine, expected.affine, atol=1e-4)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(BadImageError, match=r"truncated\?"):
        load_volume(tmp_path / name)
    (tmp_path / name).write_bytes(b"no image at all" * 30)
    with pytest.raises(BadImageError, match="cannot be read as MGH"):
        load_volume(tmp_path / name)
    gc.collect()


def good(path: Path) -> None:
    voxels = np.random.default_rng(0).normal(100, 20, size=(16, 16, 16)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


def save(voxels: NDArray[np.generic]) -> Callable[[Path], None]:
    return lambda path: nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


def edit(change: Callable[[bytearray], bytearray]) -> Callable[[Path], None]:
    """Writes a good file and changes the bytes on disk."""

    def write(path: Path) -> None:
        good(path)
        path.write_bytes(change(bytearray(path.read_bytes())))

    return write


def flip_a_bit_of_voxels(content: bytearray) -> bytearray:
    plain = bytearray(gzip.decompress(content))
    plain[3000] ^= 1
    packed = bytearray(gzip.compress(bytes(plain)))
    packed[-8:] = content[-8:]  # the checksum of the undamaged file
    return packed


def zero_pixdim_without_sform(content: bytearray) -> bytearray:
    content[80:84] = struct.pack("<f", 0.0)
    content[252:256] = struct.pack("<hh", 0, 0)  # neither qform nor sform
    return content


def sform(*rows: list[float]) -> Callable[[bytearray], bytearray]:
    def change(content: bytearray) -> bytearray:
        content[280:328] = struct.pack("<12f", *np.ravel(rows))
        return content

    return change


def with_nan() -> NDArray[np.float32]:
    voxels = np.full((16, 16, 16), 7, np.float32)
    voxels[3, 4, 5] = np.nan
    voxels[3, 4, 6] = np.inf
    return voxels


def tiny_object() -> NDArray[np.float32]:
    voxels = np.zeros((16, 16, 16), np.float32)
    voxels[3:6, 2:14, 1:15] = np.random.default_rng(0).normal(9, 1, size=(3, 12, 14))
    return voxels


NOISE = np.random.default_rng(1).normal(100, 20, size=(16, 16, 16))
RGB = np.zeros((16, 16, 16), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])

BAD = {
    "missing": ("x.nii.gz", lambda path: None, "no such file"),
    "zero bytes": ("x.nii.gz", lambda path: path.touch(), r"the file is empty \(0 bytes\)"),
    "text": ("x.nii", lambda path: path.write_text("hello " * 200), "cannot be read as NIfTI"),
    "text named gz": ("x.nii.gz", lambda path: path.write_text("hello " * 200), "cannot be read as NIfTI"),
    "truncated gz": ("x.nii.gz", edit(lambda content: content[: len(content) // 2]), "corrupt or truncated"),
    "gz without its last bytes": ("x.nii.gz", edit(lambda content: content[:-6]), "corrupt or truncated"),
    "damaged gz": ("x.nii.gz", edit(flip_a_bit_of_voxels), "corrupt or truncated"),
    "truncated": ("x.nii", edit(lambda content: content[:-100]), r"truncated\?"),
    "header only": ("x.nii", edit(lambda content: content[:200]), "cannot be read as NIfTI"),
    "2D": ("x.nii.gz", save(NOISE[0]), r"has 2 axes \(16 x 16\)"),
    "one slice": ("x.nii.gz", save(NOISE[:, :, :1]), r"single slice \(16 x 16 x 1\)"),
    "4D": ("x.nii.gz", save(np.stack([NOISE, NOISE], -1)), r"has 4 axes \(16 x 16 x 16 x 2\)"),
    "zero size": ("x.nii", save(np.zeros((16, 0, 16), np.float32)), "empty: its shape is 16 x 0 x 16"),
    "all zero": ("x.nii.gz", save(np.zeros((16, 16, 16), np.int16)), "empty: every voxel is zero"),
    "constant": ("x.nii.gz", save(np.full((16, 16, 16), 0.1, np.float32)), "constant: .* is 0.1"),
    "not finite": ("x.nii.gz", save(with_nan()), "2 of 4096 voxels are NaN or infinite"),
    "overflowing": ("x.nii.gz", save(NOISE * 1e200), "beyond 1e30"),
    "RGB": ("x.nii.gz", save(RGB), r"unsupported voxel type .*colour \(RGB\)"),
    "complex": ("x.nii.gz", save(NOISE.astype(np.complex64)), "unsupported voxel type complex64: complex"),
    "zero spacing": ("x.nii", edit(sform([1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0])), "degenerate affine: voxel size"),
    "flat affine": (
        "x.nii",
        edit(sform([1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0])),
        "degenerate affine: its axes do not span space",
    ),
    "NaN affine": ("x.nii", edit(sform([1, 0, 0, 0], [0, np.nan, 0, 0], [0, 0, 1, 0])), "not finite"),
    "zero pixdim": ("x.nii", edit(zero_pixdim_without_sform), r"voxel size \[0.0, 1.0, 1.0\] mm in its header"),
    "too small": ("x.nii.gz", save(tiny_object()), "too small: 14 x 12 x 3 voxels .* at least 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_image_is_named_with_its_reason(tmp_path: Path, case: str) -> None:
    name, write, reason = BAD[case]
    path = tmp_path / name
    write(path)
    with pytest.raises(BadImageError, match=reason) as caught:
        load_volume(path)
    assert caught.value.path == path
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in str(caught.value)


def test_the_files_that_bad_ones_are_made_from_are_good(tmp_path: Path) -> None:
    good(tmp_path / "x.nii.gz")
    save(NOISE)(tmp_path / "y.nii")
    assert all(isinstance(load_volume(tmp_path / name), Volume) for name in ("x.nii.gz", "y.nii"))


def test_bad_image_error_survives_pickling(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(BadImageError(tmp_path / "x.nii", "broken")))
    assert (error.path, error.reason) == (tmp_path / "x.nii", "broken")


@pytest.mark.parametrize("spacing_mm", [0, -1.0, float("nan"), (1.0, 2.0), (1.0, 0.0, 1.0)])
def test_spacing_must_be_positive(tmp_path: Path, spacing_mm: float | tuple[float, ...]) -> None:
    good(tmp_path / "x.nii")
    with pytest.raises(ValueError, match="spacing_mm must be one positive number, three of them or None"):
        load_volume(tmp_path / "x.nii", spacing_mm)
