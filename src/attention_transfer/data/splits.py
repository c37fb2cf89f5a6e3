"""Which images are labelled, which validate, which pre-train: drawn once, kept as index files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from attention_transfer.config import Data
from attention_transfer.errors import StudyError, repro
from attention_transfer.files import atomic

NAMES = ("labelled", "validation", "pretrain")


def draw(labels: np.ndarray, data: Data) -> dict[str, np.ndarray]:
    """Draws disjoint, stratified index sets from the training images.

    Args:
        labels: int64 (examples,), of all training images.

    Returns:
        Sorted int64 indices: `validation`; `pretrain`, everything else; and `labelled`, a part of
        `pretrain`. The first two do not change with the number of labels.
    """
    from sklearn.model_selection import train_test_split  # 1 s, and `load` needs none of it

    classes = len(np.unique(labels))
    smallest = int(np.bincount(labels)[np.unique(labels)].min())
    for key, wanted in (("labelled", data.labelled), ("validation", data.validation)):
        if wanted < classes:
            raise StudyError(
                f"{wanted} images cannot hold each of the {classes} classes",
                where=f"data.{key}",
                remedy=f"set it to {classes} or more",
            )
    if data.labelled + data.validation > len(labels):
        raise StudyError(
            f"{data.labelled} labelled and {data.validation} validation images are more than the "
            f"{len(labels)} training images",
            where="data.labelled, data.validation",
            remedy="ask for fewer",
        )
    everything = np.arange(len(labels))
    try:
        pretrain, validation = train_test_split(
            everything, test_size=data.validation, stratify=labels, random_state=data.seed
        )
        labelled, _ = (
            (pretrain, None)
            if data.labelled == len(pretrain)
            else train_test_split(
                pretrain, train_size=data.labelled, stratify=labels[pretrain], random_state=data.seed + 1
            )
        )
    except ValueError as error:
        raise StudyError(
            f"no stratified split: {error} (the smallest class has {smallest} images)",
            where="data.labelled, data.validation",
            remedy="ask for fewer images, or bring more images of the rare classes",
        ) from error
    return {
        "labelled": np.sort(labelled),
        "validation": np.sort(validation),
        "pretrain": np.sort(pretrain),
    }


def save(folder: Path, splits: dict[str, np.ndarray]) -> None:
    """Writes one index file a split, one number a line: a text file that `diff` can compare."""
    for name in NAMES:
        with atomic(folder / f"{name}.txt") as temporary:
            np.savetxt(temporary, splits[name], fmt="%d", footer=_footer(splits[name]))


def _footer(indices: np.ndarray) -> str:
    """The last line: a truncated file is never taken for a small split, an edited one for the drawn one."""
    return f"{len(indices)} indices, xxh3 {xxhash.xxh3_64_hexdigest(indices.astype('<i8').tobytes())}"


def load(folder: Path, name: str) -> np.ndarray:
    """Reads the indices of one split.

    Raises:
        StudyError: the file is missing or damaged.
    """
    path = folder / f"{name}.txt"
    remedy = f"make it anew: {repro('split', again=True)}"
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        indices = np.array([int(line) for line in lines[:-1]], np.int64)
    except (OSError, ValueError) as error:
        raise StudyError(f"cannot be read: {error}", where=str(path), remedy=remedy) from error
    if not lines or lines[-1] != f"# {_footer(indices)}":
        raise StudyError(
            "is damaged: its last line is not the checksum of its indices", where=str(path), remedy=remedy
        )
    return indices
