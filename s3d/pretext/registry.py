"""The methods of pre-training by their names."""

from __future__ import annotations

from typing import Any

from .masked_autoencoder import MaskedAutoencoder
from .method import Pretext
from .voco import VoCo

METHODS: dict[str, type[Pretext[Any]]] = {
    "s3d": MaskedAutoencoder,
    "voco": VoCo,
}
