"""What a segmentation model must know of its data: kept in its checkpoint, made by `planning`, read by all others."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from s3d.model import Network, NetworkShape, build_network

Voxels = tuple[int, int, int]  # (depth, height, width)
Millimetres = tuple[float, float, float]  # (depth, height, width)


@dataclass(frozen=True)
class Normalization:
    """How intensities of a channel are normalised, as in nnU-Net.

    Attributes:
        scheme: "zscore": mean and standard deviation of the cropped volume; "ct": cut to [low, high], then the mean and
            standard deviation of the data set.
        low, high: 0.5 and 99.5 % of the intensities in the data set's foreground; of "ct" only.
        mean, std: of the same; of "ct" only.
    """

    scheme: Literal["zscore", "ct"]
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    std: float | None = None


@dataclass(frozen=True)
class SegmentationPlan:
    """Data set, grid, normalisation and network of a segmentation model. Axes are those of `s3d.data.volume.Volume`.

    Attributes:
        dataset: its name.
        channel_names: of the images, in the order of their files `_0000`, `_0001`, ...
        class_names: the name of label value k is class_names[k]; the first is the background.
        file_ending: of images and labels, such as ".nii.gz".
        kind: "fixed": the grid of the pre-training; "dynamic": planned from the data.
        spacing_mm: that cases are resampled to.
        patch_size: that the network is trained on, and the window of inference.
        normalization: of each channel.
        network: shape of the ResEnc U-Net.
    """

    dataset: str
    channel_names: tuple[str, ...]
    class_names: tuple[str, ...]
    file_ending: str
    kind: Literal["fixed", "dynamic"]
    spacing_mm: Millimetres
    patch_size: Voxels
    normalization: tuple[Normalization, ...]
    network: NetworkShape

    def build_network(self, deep_supervision: bool = False) -> Network:
        """A new network, initialised as nnU-Net does. [N, channels, D, H, W] -> logits [N, classes, D, H, W]."""
        return build_network(
            self.network, len(self.channel_names), len(self.class_names), deep_supervision=deep_supervision
        )

    def plain(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))

    @staticmethod
    def from_plain(values: dict[str, Any]) -> SegmentationPlan:
        """The plan of plain JSON types, as a checkpoint has them."""
        return SegmentationPlan(
            **{
                **_tuples(values),
                "normalization": tuple(Normalization(**channel) for channel in values["normalization"]),
                "network": NetworkShape(**_tuples(values["network"])),
            }
        )


def _tuples(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _tuples(value) for name, value in values.items()}
    return tuple(_tuples(value) for value in values) if isinstance(values, list) else values
