"""The methods of pre-training by their names."""

from __future__ import annotations

from typing import Any

from .fcmae import FCMAE
from .masked_autoencoder import MaskedAutoencoder
from .method import Pretext
from .models_genesis import ModelsGenesis
from .spark import SparK
from .swin_unetr import SwinUNETRPretext
from .voco import VoCo
from .volume_fusion import VolumeFusion

METHODS: dict[str, type[Pretext[Any]]] = {
    "s3d": MaskedAutoencoder,
    "spark": SparK,
    "fcmae": FCMAE,
    "models-genesis": ModelsGenesis,
    "volumefusion": VolumeFusion,
    "voco": VoCo,
    "swin-unetr": SwinUNETRPretext,
}
