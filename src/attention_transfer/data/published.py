"""Image sets that others have published as shifts of a task: in folders, beside the task's own images.

ImageNet-V2, -A, -R, -Sketch, -C and ObjectNet are of four layouts. No list of classes stands here: which classes a set
has is what its folders say, or a file that comes with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attention_transfer.config import Evaluation, PublishedSet
from attention_transfer.data import image_files
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.image_files import Shape
from attention_transfer.errors import StudyError
from attention_transfer.files import atomic

LEFT_OUT = -1  # group of a class that a set does not have
EXPECTED = {
    "class_names": "<folder>/<class name>/<image>, with the class names of the training images, all or some of them",
    "class_numbers": "<folder>/<number>/<image>, with the numbers of the training images' sorted classes, from 0",
    "mapped_names": "<folder>/<name>/<image>, with `mapping`, a JSON file that gives each name its training classes",
    "corruptions": "<folder>/<corruption>/<severity>/<class name>/<image>, with severities 1 to 5",
}


@dataclass(frozen=True)
class Published:
    """One set, found on disk.

    Attributes:
        pixels: of its images.
        labels: int64 (count,), the images' groups.
        groups: int64 (classes,), for each class of the task the group that it counts as, or LEFT_OUT: a model is judged
            by its largest logit among the classes that the set has.
    """

    pixels: FilePixels
    labels: np.ndarray
    groups: np.ndarray

    def save(self, path: Path) -> None:
        """Writes an index; the images stay where they are."""
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **self.pixels.arrays(), labels=self.labels, groups=self.groups)


def wanted(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """By set name what each is found by; a folder of corruptions is as many sets as it has severities."""
    found: dict[str, dict[str, Any]] = {}
    for name, given in evaluation.published.items() if "published" in evaluation.sets else ():
        values = given.model_dump(mode="json")
        if given.layout != "corruptions":
            found[name] = {"published": name, **values}
            continue
        for corruption in given.corruptions:
            for severity in evaluation.severities:
                folder = str(Path(given.folder) / corruption / str(severity))
                found[f"{name}-{corruption}-{severity}"] = {
                    **{"published": name, "corruption": corruption, "severity": severity},
                    **{**values, "layout": "class_names", "folder": folder, "corruptions": []},
                }
    return found


def condition(what: dict[str, Any]) -> str:
    """What a set's scores are called: its name, and of a corruption also which."""
    return f"{what['published']}/{what['corruption']}" if "corruption" in what else str(what["published"])


def missing(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By set name the folder that is not there, and what is expected in it.

    Args:
        sets: of `wanted`; others among them are left alone.
    """
    return {
        name: f"{what['folder']} is not there: expected is {EXPECTED[layout]}"
        for name, what in sets.items()
        if "published" in what and not Path(what["folder"]).exists()
        for layout in ["corruptions" if "corruption" in what else what["layout"]]
    }


def find(what: dict[str, Any], classes: list[str], form: Shape, *, seed: int) -> Published:
    """Indexes a set's files and finds out which classes it has.

    Args:
        what: of `wanted`.
        classes: of the task, in order of their labels.
        seed: of the draw, where so many images are asked for.

    Raises:
        StudyError: the folder holds no images, or classes that the task has not.
    """
    given = PublishedSet.model_validate({key: what[key] for key in PublishedSet.model_fields}, strict=False)
    folder = Path(given.folder)
    names, labels, files = image_files.index(folder, classes=None, progress=f"index {folder.name}")
    groups = _groups(given, folder, names, classes)
    labels = np.array([groups[1][name] for name in names])[labels]
    pixels = FilePixels(files, np.arange(len(files)), form)
    if given.images is not None and given.images < len(labels):
        chosen = _drawn(labels, given.images, seed)
        pixels, labels = pixels.kept(chosen), labels[chosen]
    return Published(pixels, labels, groups[0])


def _groups(
    given: PublishedSet, folder: Path, names: list[str], classes: list[str]
) -> tuple[np.ndarray, dict[str, int]]:
    """For each class of the task its group, and for each folder of the set."""
    numbers = {name: number for number, name in enumerate(classes)}
    if given.layout == "class_numbers":
        members = {name: [int(name)] if name.isdecimal() else [-1] for name in names}
    elif given.layout == "mapped_names":
        members = _mapping(given, names, numbers)
    else:
        members = {name: [numbers.get(name, -1)] for name in names}
    if unknown := sorted(
        name for name, chosen in members.items() if not all(0 <= c < len(classes) for c in chosen)
    ):
        raise StudyError(
            f"has {len(unknown)} folders that are no classes of the task: {', '.join(unknown[:5])}",
            where=str(folder),
            remedy=f"expected is {EXPECTED[given.layout]}",
        )
    groups = np.full(len(classes), LEFT_OUT)
    for group, chosen in enumerate(members.values()):
        groups[chosen] = group
    if given.layout == "mapped_names":
        # A model that sees a class without a name here is wrong: these stay, as one group more.
        groups[groups == LEFT_OUT] = len(members)
    return groups, {name: group for group, name in enumerate(members)}


def _mapping(given: PublishedSet, names: list[str], numbers: dict[str, int]) -> dict[str, list[int]]:
    assert given.mapping is not None  # config
    path = Path(given.mapping)
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
        found = {name: [numbers.get(str(other), -1) for other in mapping[name]] for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"does not give each folder of {given.folder} a list of classes: {type(error).__name__} {error}",
            where=str(path),
            remedy='write {"<folder name>": ["<class of the training images>", ..], ..} into it',
        ) from error
    twice = [number for chosen in found.values() for number in chosen]
    if len(set(twice)) != len(twice):
        raise StudyError(
            "gives a class of the task to two names",
            where=str(path),
            remedy="leave it with one of them",
        )
    return found


def _drawn(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """So many of them, as many of each group as possible: sorted int64 (count,)."""
    random = np.random.Generator(np.random.Philox(seed))
    shuffled = random.permutation(len(labels))
    # Rank of each image within its group; the lowest ranks of all groups come first.
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.searchsorted(labels[order], labels[order], side="left")
    ranks = np.arange(len(labels)) - starts
    return np.sort(order[np.argsort(ranks, kind="stable")[:count]])
