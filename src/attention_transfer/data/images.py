"""Image sets on disk: arrays, uint8 (examples, channels, height, width), or an index of files; beside int64 labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.errors import StudyError, repro
from attention_transfer.files import atomic, fingerprint, read_sealed, write_sealed

DESCRIPTION = "dataset.json"
FILES = "_files.npz"  # index of a split whose images stay in their files


@dataclass(frozen=True)
class ImageSet:
    """One split.

    Attributes:
        images: uint8 (examples, channels, size, size), in memory, or decoded when they are asked for.
        labels: int64 (examples,).
    """

    images: np.ndarray | FilePixels
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> ImageSet:
        """Some of them."""
        images = self.images[rows] if isinstance(self.images, np.ndarray) else self.images.take(rows)
        return ImageSet(images, self.labels[rows])


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
        if isinstance(images.images, FilePixels):
            images.images.save(folder / f"{split}{FILES}")
            checksums[f"{split}{FILES}"] = images.images.checksum
        else:
            checksums[f"{split}_images.npy"] = _save(folder / f"{split}_images.npy", images.images)
        checksums[f"{split}_labels.npy"] = _save(folder / f"{split}_labels.npy", images.labels)
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


def _save(path: Path, array: np.ndarray) -> str:
    with atomic(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.ascontiguousarray(array))
    return checksum(array)


def describe(folder: Path) -> Description:
    """Reads dataset.json.

    Raises:
        StudyError: it is missing or damaged.
    """
    return Description(**read_sealed(folder / DESCRIPTION, made_by="data"))


def load(folder: Path, split: str) -> ImageSet:
    """Loads one split and checks every byte of it; of images in files the index, and each when it is shown.

    Raises:
        StudyError: a file is missing, truncated or changed.
    """
    checksums = describe(folder).checksums
    labels = _load(folder / f"{split}_labels.npy", checksums)
    if f"{split}{FILES}" in checksums:
        return ImageSet(_load_index(folder / f"{split}{FILES}", checksums), labels)
    return ImageSet(_load(folder / f"{split}_images.npy", checksums), labels)


def _load_index(path: Path, checksums: dict[str, str]) -> FilePixels:
    try:
        pixels = FilePixels.load(path)
        found = pixels.checksum
    except StudyError:
        raise
    except Exception as error:  # as in `_load`
        raise _damaged(path, f"cannot be read: {error}") from error
    if found != checksums[path.name]:
        raise _damaged(path, "is damaged: its checksum is not the recorded one")
    return pixels


def _load(path: Path, checksums: dict[str, str]) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
        found = checksum(array)
    except Exception as error:  # numpy passes on whatever the parser of a damaged header raises
        raise _damaged(path, f"cannot be read: {error}") from error
    if found != checksums.get(path.name):
        raise _damaged(path, "is damaged: its checksum is not the recorded one")
    return array


def _damaged(path: Path, problem: str) -> StudyError:
    return StudyError(problem, where=str(path), remedy=f"make it anew: {repro('data', again=True)}")


def statistics(pixels: np.ndarray | FilePixels) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, of pixels scaled to 0..1, in float64.

    Over 10,000 evenly spaced images: the statistics of a large set, in one pass of memory.
    """
    step = max(1, len(pixels) // 10_000)
    if isinstance(pixels, FilePixels):
        return pixels.take(np.arange(0, len(pixels), step)).statistics()
    sample = pixels[::step].astype(np.float64) / 255
    return sample.mean(axis=(0, 2, 3)), sample.std(axis=(0, 2, 3))


def checksum(array: np.ndarray) -> str:
    """xxh3 of an array's bytes, form and type."""
    digest = xxhash.xxh3_64(str((array.dtype.str, array.shape)).encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
