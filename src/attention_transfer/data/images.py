"""Image sets as arrays on disk: uint8 (examples, channels, height, width) beside int64 labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from attention_transfer.errors import StudyError, repro
from attention_transfer.files import atomic, fingerprint, read_sealed, write_sealed

DESCRIPTION = "dataset.json"


@dataclass(frozen=True)
class ImageSet:
    """One split, in memory.

    Attributes:
        images: uint8 (examples, channels, size, size).
        labels: int64 (examples,).
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Description:
    """dataset.json: what the arrays hold.

    Attributes:
        classes: names, in order of their labels.
        mean, std: of the training images, per channel, pixels scaled to 0..1.
        checksums: xxh3 of each array's bytes, by file name.
    """

    source: str
    classes: list[str]
    mean: list[float]
    std: list[float]
    checksums: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Of the arrays: names do not count, and mean and std follow from them."""
        return fingerprint(self.checksums)


def save(folder: Path, source: str, classes: list[str], splits: dict[str, ImageSet]) -> Description:
    """Writes the splits, then the description: a folder without it is unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    checksums = {}
    for split, images in splits.items():
        for part, array in (("images", images.images), ("labels", images.labels)):
            file = f"{split}_{part}.npy"
            with atomic(folder / file) as temporary, temporary.open("wb") as stream:
                np.save(stream, np.ascontiguousarray(array))
            checksums[file] = checksum(array)
    mean, std = statistics(splits["train"].images)
    if not std.all():
        raise StudyError(
            "a channel has the same value in every training image: there is nothing to normalise or to learn",
            where=f"data.source {source}",
            remedy="check the images, or set data.channels: 1",
        )
    description = Description(
        source=source,
        classes=classes,
        mean=[round(float(value), 6) for value in mean],
        std=[round(float(value), 6) for value in std],
        checksums=checksums,
    )
    write_sealed(folder / DESCRIPTION, vars(description))
    return description


def describe(folder: Path) -> Description:
    """Reads dataset.json.

    Raises:
        StudyError: it is missing or damaged.
    """
    return Description(**read_sealed(folder / DESCRIPTION, made_by="data"))


def load(folder: Path, split: str) -> ImageSet:
    """Loads one split and checks every byte of it.

    Raises:
        StudyError: a file is missing, truncated or changed.
    """
    checksums = describe(folder).checksums
    images, labels = (_load(folder / f"{split}_{part}.npy", checksums) for part in ("images", "labels"))
    return ImageSet(images, labels)


def _load(path: Path, checksums: dict[str, str]) -> np.ndarray:
    remedy = f"make it anew: {repro('data', again=True)}"
    try:
        array = np.load(path, allow_pickle=False)
        found = checksum(array)
    except Exception as error:  # numpy passes on whatever the parser of a damaged header raises
        raise StudyError(f"cannot be read: {error}", where=str(path), remedy=remedy) from error
    if found != checksums.get(path.name):
        raise StudyError("is damaged: its checksum is not the recorded one", where=str(path), remedy=remedy)
    return array


def statistics(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, of pixels scaled to 0..1, in float64.

    Over 10,000 evenly spaced images: the statistics of a large set, in one pass of memory.
    """
    sample = pixels[:: max(1, len(pixels) // 10_000)].astype(np.float64) / 255
    return sample.mean(axis=(0, 2, 3)), sample.std(axis=(0, 2, 3))


def checksum(array: np.ndarray) -> str:
    """xxh3 of an array's bytes, form and type."""
    digest = xxhash.xxh3_64(str((array.dtype.str, array.shape)).encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
