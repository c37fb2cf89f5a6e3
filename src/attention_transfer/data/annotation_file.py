"""Images whose classes stand in an annotation file of COCO's layout, as those of iNaturalist 2017, 2018 and 2019."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attention_transfer.errors import StudyError


def read(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Class names in order of their ids, each `<id> <name>`; and for each image its file's name and its class.

    Names of files are relative to the folder of the annotation file.

    Raises:
        StudyError: it is no such file, or gives an image no class or several.
    """
    try:
        content: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
        classes = {entry["id"]: f"{entry['id']} {entry['name']}" for entry in content["categories"]}
        files = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        given = [(entry["image_id"], entry["category_id"]) for entry in content["annotations"]]
        found = {image: (files[image], classes[category]) for image, category in given}
        order = [classes[number] for number in sorted(classes)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(
            f"is no annotation file with images, annotations and categories: {type(error).__name__} {error}",
            where=str(path),
            remedy="bring the file that comes with the images: a test set has none of its classes",
        ) from error
    if len(set(given)) != len(found):
        raise StudyError(
            "gives an image several classes",
            where=str(path),
            remedy="bring annotations with one class an image; without labels, a folder of images is enough "
            "to pre-train on (docs/imagenet.md)",
        )
    if unlabelled := [name for number, name in files.items() if number not in found]:
        raise StudyError(
            f"gives {len(unlabelled)} images no class: {unlabelled[0]}",
            where=str(path),
            remedy="remove these images from it, or add their annotations",
        )
    return order, list(found.values())
