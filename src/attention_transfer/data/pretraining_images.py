"""Images to pre-train a teacher on that are not the task's: handwritten digits, fractals, or files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attention_transfer.data import fractals, image_files
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.image_files import Shape
from attention_transfer.data.images import Description, checksum, statistics
from attention_transfer.errors import StudyError

SOURCES = ("digits", "fractals")
DIGITS = 1797  # scikit-learn's


@dataclass(frozen=True)
class PretrainingImages:
    """Images without labels.

    A teacher is pre-trained on these images less their own mean, over their own deviation. Afterwards it sees
    the task's images, normalised by the task's mean and deviation. So its inputs have mean 0 and deviation 1
    in each channel both times, as with a public teacher that is used with the statistics of new data; but the
    same grey value is another input before and after.

    Attributes:
        pixels: uint8 (count, channels, size, size), in memory, or decoded when they are asked for.
        description: mean, deviation and fingerprint, for a `views.ViewRecipe` as of the task's images; it has
            no classes.
    """

    pixels: np.ndarray | FilePixels
    description: Description

    def __len__(self) -> int:
        return len(self.pixels)


def load(source: str, *, size: int, channels: int, count: int, seed: int) -> PretrainingImages:
    """Makes the images; the same arguments give the same ones.

    Args:
        source: "digits", those of scikit-learn, resized from 8 x 8 pixels; or "fractals", see `fractals`.
        size: side of the images in pixels, at least 8.
        channels: 1 or 3; those of digits are all the same.
        count: number of images; of digits there are 1,797.
        seed: of the fractals; of the choice of digits, if not all are taken.

    Raises:
        ValueError: an argument is out of its range.
    """
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {source!r}")
    if size < fractals.SMALLEST_SIZE:
        raise ValueError(f"size: expected at least {fractals.SMALLEST_SIZE} pixels, got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    pixels = (
        fractals.generate(count, size=size, channels=channels, seed=seed)
        if source == "fractals"
        else _digits(count, size=size, channels=channels, seed=seed)
    )
    return _described(source, pixels, checksum(pixels))


def in_files(root: Path, form: Shape) -> PretrainingImages:
    """All images of a folder or a tar, in class folders or not; they stay there.

    Args:
        form: of the task's images.

    Raises:
        StudyError: it is not there, or holds no images, or a file that is none.
    """
    _require(root)
    _, _, files = image_files.index(root, classes=None, progress=f"index {root.name}", labelled=False)
    pixels = FilePixels(files, np.arange(len(files)), form)
    return _described(str(root), pixels, pixels.checksum)


def count_in_files(root: Path) -> int:
    """Images of such a folder or tar, none of which is read.

    Raises:
        StudyError: it is not there.
    """
    _require(root)
    return image_files.count(root)


def _require(root: Path) -> None:
    if not root.exists():
        raise StudyError(
            "is not there",
            where=str(root),
            remedy="put the images there, or correct the teacher's key `images`",
        )


def _described(source: str, pixels: np.ndarray | FilePixels, checksum: str) -> PretrainingImages:
    mean, std = statistics(pixels)
    return PretrainingImages(
        pixels,
        Description(
            source=source,
            classes=[],
            mean=[round(float(value), 6) for value in mean],
            std=[round(float(value), 6) for value in std],
            checksums={"images": checksum},
        ),
    )


def _digits(count: int, *, size: int, channels: int, seed: int) -> np.ndarray:
    """Some of the digits, in their own order: uint8 (count, channels, size, size)."""
    from attention_transfer.data import shifts  # scipy and scikit-learn take a second to import

    pixels, _ = shifts.digits(size, channels)
    if not 1 <= count <= len(pixels):
        raise ValueError(f"count: expected 1 to {len(pixels)} digits, got {count}")
    chosen = np.random.default_rng(seed).choice(len(pixels), count, replace=False)
    return np.asarray(pixels[np.sort(chosen)])
