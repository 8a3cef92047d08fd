"""From image files to training patches: find, preprocess, store, augment, draw."""

from s3d.data.augment import SpatialAugmentation, SpatialTransform
from s3d.data.embedded import EmbeddedImage, embedded_images
from s3d.data.inputs import find_images
from s3d.data.patches import PatchDataset, split_cases, validation_patch
from s3d.data.store import PreprocessSummary, StoredCase, VolumeStore, preprocess
from s3d.data.volume import BadImageError, Volume, load_volume

__all__ = [
    "BadImageError",
    "EmbeddedImage",
    "PatchDataset",
    "PreprocessSummary",
    "SpatialAugmentation",
    "SpatialTransform",
    "StoredCase",
    "Volume",
    "VolumeStore",
    "embedded_images",
    "find_images",
    "load_volume",
    "preprocess",
    "split_cases",
    "validation_patch",
]
