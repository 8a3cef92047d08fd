"""From image files to training patches: find, preprocess, store, augment, draw."""

from s3d.data.augment import SpatialAugmentation, SpatialTransform
from s3d.data.embedded import EmbeddedImage, embedded_images
from s3d.data.inputs import find_images
from s3d.data.patches import PatchDataset, Sample, split_cases, validation_sample
from s3d.data.preparing import PreprocessSummary, preprocess
from s3d.data.reading import BadImageError
from s3d.data.source import ImageSource
from s3d.data.store import StoredCase, VolumeStore
from s3d.data.throughput import LoaderSpeed, loader_speed
from s3d.data.volume import Volume, load_volume
from s3d.data.workers import WorkerDiedError

__all__ = [
    "BadImageError",
    "EmbeddedImage",
    "ImageSource",
    "LoaderSpeed",
    "PatchDataset",
    "PreprocessSummary",
    "Sample",
    "SpatialAugmentation",
    "SpatialTransform",
    "StoredCase",
    "Volume",
    "VolumeStore",
    "WorkerDiedError",
    "embedded_images",
    "find_images",
    "load_volume",
    "loader_speed",
    "preprocess",
    "split_cases",
    "validation_sample",
]
