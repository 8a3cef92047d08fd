"""What the Brain Imaging Data Structure (BIDS) says by the names of folders and files.

Source: the BIDS specification, "Common principles" (folders, entities) and "Magnetic resonance imaging" (suffixes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# Beside the folders of the subjects: not the raw images of the data set, or no images at all.
BESIDE_SUBJECTS = frozenset({"code", "derivatives", "phenotype", "sourcedata", "stimuli"})
# Below the folder of a subject: other data types than `anat`.
OTHER_DATATYPES = frozenset(
    {"beh", "dwi", "eeg", "fmap", "func", "ieeg", "meg", "micr", "motion", "mrs", "nirs", "perf", "pet"}
)
# Masks of removed faces, and phase, real and imaginary parts, which lie beside the images in `anat`.
NO_IMAGE = re.compile(r"_defacemask\.|_part-(phase|real|imag)_")
SUBJECT = re.compile(r"sub-[A-Za-z0-9+]+")
SESSION = re.compile(r"ses-[A-Za-z0-9+]+")


def is_dataset(files: Sequence[str], folders: Sequence[str]) -> bool:
    """Whether a folder that holds these files and folders is the root of a BIDS data set."""
    return "dataset_description.json" in files or any(SUBJECT.fullmatch(folder) for folder in folders)


def left_out(folder: Path, files: Sequence[str], folders: Sequence[str]) -> frozenset[str]:
    """Folders in `folder` that hold no anatomical raw images."""
    if is_dataset(files, folders):
        return BESIDE_SUBJECTS
    in_session = SESSION.fullmatch(folder.name) is not None and SUBJECT.fullmatch(folder.parent.name) is not None
    return OTHER_DATATYPES if in_session or SUBJECT.fullmatch(folder.name) else frozenset()


def subject_and_session(image: Path) -> tuple[str | None, str | None]:
    """Whose image a path is: (`data set/sub-01`, `ses-1`), each None if the folders do not say.

    The data set is the name of the folder that holds those of the subjects, so that `sub-01` of two data sets are two
    people. What lies in `derivatives/<pipeline>`, `sourcedata` or `rawdata` belongs to the data set around it.
    """
    for folder in image.parents:
        if SUBJECT.fullmatch(folder.name):
            break
    else:
        return None, None
    root = folder.parent
    if root.parent.name == "derivatives":
        root = root.parent.parent
    elif root.name in ("derivatives", "rawdata", "sourcedata"):
        root = root.parent
    sessions = [part for part in image.relative_to(folder).parts[:-1] if SESSION.fullmatch(part)]
    return f"{root.name}/{folder.name}", sessions[0] if sessions else None
