"""The `pretrain_data.json` of nnssl: collection -> data set -> subject -> session -> image with masks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from s3d.data.source import ImageSource


def nnssl_images(listing: Path, collection: dict[str, Any]) -> list[ImageSource]:
    """The images of a collection.

    Paths may begin with a variable of the environment (`$nnssl_raw/...`); relative ones are relative to the list.
    A subject is `collection/data set/subject`, so that equal ids in two data sets stay two people.

    Raises:
        ValueError: something is missing, says where; or a variable is not set, says which.
    """
    name = collection.get("collection_name", listing.parent.name)
    images = []
    try:
        for dataset_id, dataset in collection["datasets"].items():
            for subject_id, subject in dataset["subjects"].items():
                for session_id, session in subject["sessions"].items():
                    for image in session["images"]:
                        masks = image.get("associated_masks") or {}
                        images.append(
                            ImageSource(
                                _path(listing, image["image_path"]),
                                subject=f"{name}/{dataset_id}/{subject_id}",
                                session=str(session_id),
                                anatomy_mask=_optional_path(listing, masks.get("anatomy_mask")),
                                anonymisation_mask=_optional_path(listing, masks.get("anonymization_mask")),
                            )
                        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"inputs: list {str(listing)!r} is not laid out as collection, datasets, subjects, sessions, images with "
            f"image_path: {type(error).__name__} {error}"
        ) from error
    return images


def _optional_path(listing: Path, entry: str | None) -> Path | None:
    return _path(listing, entry) if entry else None


def _path(listing: Path, entry: str) -> Path:
    root, separator, rest = entry.partition("/")
    if root.startswith("$"):
        variable = root[1:].strip("{}")
        if variable not in os.environ:
            raise ValueError(
                f"inputs: list {str(listing)!r} has the path {entry!r}, but the variable {variable} is not set; "
                f"export {variable}=... to the folder it stands for"
            )
        entry = os.environ[variable].rstrip("/") + separator + rest
    return listing.parent / Path(entry).expanduser()
