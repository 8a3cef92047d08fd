"""DICOM series through SimpleITK: which are in a folder, and the volume of one.

SimpleITK reads what scanners write, compressed transfer syntaxes included, and sorts slices by place. What it only
warns of (missing slices) or does not notice (a localizer, several volumes in one series) is an error here.
"""

from __future__ import annotations

import locale
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s3d.data.reading import BadImageError, one_line
from s3d.data.source import ImageSource

MAGIC = b"DICM"  # at byte 128 of a DICOM file
# Other files are not opened: there may be 100,000 images beside. A suffix of digits is the end of a UID.
NAME = re.compile(r"[^.]+|.*\.(dcm|dicom|ima|[\d_-]+)", re.IGNORECASE)
PATIENT_ID = "0010|0020"
STUDY_UID = "0020|000d"
POSITION = "0020|0032"  # of a slice's first voxel, mm
ORIENTATION = "0020|0037"  # of a slice: direction of its rows and of its columns
UNEVEN = 0.1  # of the usual step: what two steps between slices may differ by


def is_dicom(path: Path) -> bool:
    """Whether the content is DICOM: many files have no suffix."""
    try:
        with path.open("rb") as stream:
            stream.seek(128)
            return stream.read(4) == MAGIC
    except OSError:
        return False


@contextmanager
def _locale_kept() -> Iterator[None]:
    """SimpleITK sets the locale of the process to C while it reads, and leaves it so: text files would be ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


@_locale_kept()
def series_of(folder: Path) -> list[ImageSource]:
    """The DICOM series whose files lie in a folder (not in folders below it), by SeriesInstanceUID.

    The subject is the PatientID and the session the StudyInstanceUID of the first file.

    Returns: none if the folder holds no DICOM file.
    Raises:
        ValueError: SimpleITK is not installed; says how to get it.
    """
    if not any(is_dicom(path) for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_file()):
        return []
    sitk = _simpleitk(folder)
    found = []
    for series in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
        header = sitk.ImageFileReader()
        header.SetImageIO("GDCMImageIO")
        header.SetFileName(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series)[0])
        try:
            header.ReadImageInformation()
        except RuntimeError:  # reading the series says what is wrong, when the time comes
            found.append(ImageSource(folder, series))
            continue
        subject, session = (
            header.GetMetaData(key).strip() if header.HasMetaDataKey(key) else "" for key in (PATIENT_ID, STUDY_UID)
        )
        found.append(ImageSource(folder, series, subject or None, session or None))
    return found


@_locale_kept()
def read_series(
    folder: Path, series: str
) -> tuple[
    NDArray[np.generic],  # [i, j, k]
    NDArray[np.float64],  # [4, 4], (i, j, k, 1) -> RAS+ millimetres
]:
    """The voxels of a series, rescaled as its files say, and their affine.

    Raises:
        BadImageError: it cannot be read, is not one volume of evenly spaced slices, or is not made of real numbers.
    """
    sitk = _simpleitk(folder)

    def bad(reason: str) -> BadImageError:
        return BadImageError(folder, f"DICOM series {series} {reason}")

    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series)
    if not files:
        raise bad("is not there")
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames(files)
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise bad(f"cannot be read (corrupt or truncated?): {one_line(error)}") from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise bad("is in colour; only real numbers can be used")
    if image.GetDimension() != 3 or min(image.GetSize()) < 2:
        raise bad(f"is of {' x '.join(map(str, image.GetSize()))} voxels; a volume with 3 axes is needed")
    if len(files) > 1:  # one file that holds a volume is evenly spaced by its nature
        reason = _uneven(reader, len(files))
        if reason:
            raise bad(reason)

    spacing, origin = np.array(image.GetSpacing()), np.array(image.GetOrigin())
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * spacing
    affine[:3, 3] = origin
    # DICOM's world points to the left and to posterior, nibabel's to the right and to anterior.
    return sitk.GetArrayFromImage(image).T, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _uneven(reader: Any, slices: int) -> str | None:
    """Why the slices are not those of one evenly sampled volume, or None."""
    places, normals = [], []
    for number in range(slices):
        if not all(reader.HasMetaDataKey(number, key) for key in (POSITION, ORIENTATION)):
            return "has slices that do not say where they are"
        position, orientation = (
            np.array(reader.GetMetaData(number, key).split("\\"), dtype=np.float64) for key in (POSITION, ORIENTATION)
        )
        places.append(position)
        normals.append(np.cross(orientation[:3], orientation[3:]))
    if np.abs(np.array(normals) - normals[0]).max() > 1e-3:
        return "has slices in different directions (a localizer?)"
    offsets = np.array(places) - places[0]
    along = offsets @ normals[0]
    aside = np.linalg.norm(offsets - along[:, None] * normals[0], axis=1).max()
    if aside > 0.5 * np.ptp(along) / (slices - 1):
        return f"has slices that are shifted against each other by up to {aside:.3g} mm (a tilted gantry?)"
    # Sorted here as well: SimpleITK takes another order where the places leave it no choice.
    steps = np.diff(np.sort([float(place @ normals[0]) for place in places]))
    usual = float(np.median(steps[steps > 0])) if (steps > 0).any() else 0.0
    if steps.min() <= UNEVEN * usual:
        return "has several slices at one place (several volumes in one series?)"
    if np.abs(steps - usual).max() > UNEVEN * usual:
        return f"has slices {steps.min():.3g} to {steps.max():.3g} mm apart (some are missing?)"
    return None


def _simpleitk(folder: Path) -> ModuleType:
    try:
        import SimpleITK
    except ImportError as error:
        raise ValueError(
            f"inputs: folder {str(folder)!r} holds DICOM files, which SimpleITK reads: pip install 's3d[dicom]' "
            "(or name other images by a pattern such as 'folder/**/*.nii.gz')"
        ) from error
    return SimpleITK
