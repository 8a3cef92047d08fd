"""A second small task for `s3d compare`, from what `pip install 's3d[demo]'` brings: grey and white matter.

python examples/comparison/tissue.py --output-dir Dataset005_Tissue

Boxes of 40 x 56 x 40 voxels of 1 mm out of the ICBM 2009a template of nilearn (a T1-weighted average of 152 adults,
without skull) and its tissue maps: 1 where grey matter has a probability of at least one half, 2 where white matter
has. 12 boxes for training come from the back half of the head, 12 for the test from the front half: the template is
symmetric, so that its right half would be its left one again.

What it can say is limited: all boxes are of one averaged head, more alike than heads of two people, and a model that
knows the intensities is nearly done. It is a check whether a comparison ranks methods alike on a task that is not the
hippocampus, and no more.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from s3d.data.embedded import embedded_images

TEMPLATE = "mni152_2009a_symmetric_t1"
BOX = (40, 56, 40)  # voxels along x (left to right), y (back to front), z
BOXES = 12  # of either half
FEWEST = 0.15  # share of a box that each tissue has at least
TRIES = 100_000


def main() -> None:
    options = _options()
    image, labels, affine = read_template()
    middle = round(float((np.linalg.inv(affine) @ (0, 0, 0, 1))[1]))
    halves = (slice(0, middle), slice(middle, image.shape[1]))
    back, front = halves if affine[1, 1] > 0 else halves[::-1]
    folder: Path = options.output_dir
    for images, maps, half, name in (
        ("imagesTr", "labelsTr", back, "back"),
        ("imagesTs", "labelsTs", front, "front"),
    ):
        (folder / images).mkdir(parents=True, exist_ok=True)
        (folder / maps).mkdir(exist_ok=True)
        for number, corner in enumerate(choose_boxes(labels, half, options.seed)):
            box = tuple(slice(start, start + side) for start, side in zip(corner, BOX))
            place = affine.copy()
            place[:, 3] = affine @ (*corner, 1)
            case = f"{name}_{number:02d}"
            nib.save(nib.Nifti1Image(image[box], place), folder / images / f"{case}_0000.nii.gz")
            nib.save(nib.Nifti1Image(labels[box], place), folder / maps / f"{case}.nii.gz")
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "grey matter": 1, "white matter": 2},
        "numTraining": BOXES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    print(f"{2 * BOXES} boxes: {folder}")


def read_template() -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float64]]:
    """Intensities, labels and affine of the head.

    Raises:
        FileNotFoundError: nilearn is not installed.
    """
    found = [image.path for image in embedded_images() if image.name == TEMPLATE]
    if not found:
        raise FileNotFoundError("nilearn is not installed, which has the template; pip install 's3d[demo]'")
    t1 = nib.load(found[0])
    grey, white = (
        nib.load(found[0].with_name(found[0].name.replace("_t1_", f"_{tissue}_"))).get_fdata()
        for tissue in ("gm", "wm")
    )
    # The maps are probabilities or shares of 255.
    labels = np.zeros(t1.shape, np.uint8)
    for value, tissue in ((1, grey), (2, white)):
        labels[tissue / tissue.max() >= 0.5] = value
    return t1.get_fdata(dtype=np.float32), labels, t1.affine


def choose_boxes(labels: NDArray[np.uint8], half: slice, seed: int) -> list[tuple[int, int, int]]:
    """Corners of boxes in a half of the head that have enough of either tissue, far enough from each other.

    Raises:
        ValueError: there are no so many.
    """
    draw = random.Random(seed)
    width, _, height = labels.shape
    ranges = ((0, width - BOX[0]), (half.start, half.stop - BOX[1]), (0, height - BOX[2]))
    found: list[tuple[int, int, int]] = []
    for _ in range(TRIES):
        x, y, z = (draw.randint(first, last) for first, last in ranges)
        box = labels[x : x + BOX[0], y : y + BOX[1], z : z + BOX[2]]
        # Boxes may overlap, by half a box at the most along one of the axes.
        apart = all(any(2 * abs(a - b) >= side for a, b, side in zip((x, y, z), other, BOX)) for other in found)
        if apart and all(np.mean(box == value) >= FEWEST for value in (1, 2)):
            found.append((x, y, z))
            if len(found) == BOXES:
                return found
    raise ValueError(f"only {len(found)} of {BOXES} boxes were found")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="such as Dataset005_Tissue")
    parser.add_argument("--seed", type=int, default=0, help="of the places of the boxes")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"tissue: {error}")
