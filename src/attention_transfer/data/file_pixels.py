"""Images in files as if they were an array: decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from attention_transfer.data.image_files import Entry, ImageFiles, Shape
from attention_transfer.files import atomic

BATCH = 100  # images whose statistics are taken at once


@dataclass(frozen=True)
class FilePixels:
    """Like an array, uint8 (count, channels, size, size), of clean images.

    Attributes:
        files: of the whole split.
        chosen: int64 (count,), which of them.
        form: what they are brought to.
    """

    files: ImageFiles
    chosen: np.ndarray
    form: Shape

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self.form.channels, self.form.size, self.form.size

    def take(self, rows: np.ndarray) -> FilePixels:
        """Some of them; none is decoded."""
        return FilePixels(self.files, self.chosen[rows], self.form)

    def entries(self, rows: np.ndarray) -> list[Entry]:
        """Where these lie."""
        return self.files.entries(self.chosen[rows])

    @property
    def checksum(self) -> str:
        """Of the images and of what they are brought to: not of where they lie, in a folder here or in a tar there."""
        digest = xxhash.xxh3_64(repr(self.form).encode())
        digest.update("\n".join(self.files.names).encode())
        digest.update(self.files.sizes.tobytes())
        digest.update(self.files.checksums.tobytes())
        return digest.hexdigest()

    def kept(self, rows: np.ndarray) -> FilePixels:
        """These alone, the others forgotten."""
        entries = self.files.entries(self.chosen[rows])
        files = ImageFiles(
            self.files.root, [entry.name for entry in entries], *self.files.parts(self.chosen[rows])
        )
        return FilePixels(files, np.arange(len(files)), self.form)

    def save(self, path: Path) -> None:
        """Writes the index of the whole split."""
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **self.arrays())

    @classmethod
    def load(cls, path: Path) -> FilePixels:
        """What `save` wrote; the caller compares its checksum."""
        # Opened here: what NumPy opens it leaves open where the file is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return cls.of(arrays)

    def arrays(self) -> dict[str, np.ndarray]:
        """The whole split as arrays without Python objects, for a file."""
        return {
            "form": np.array([self.form.channels, self.form.resize, self.form.size]),
            **self.files.arrays(),
        }

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> FilePixels:
        """What `arrays` gave."""
        files, (channels, resize, size) = ImageFiles.of(arrays), arrays["form"].tolist()
        return cls(files, np.arange(len(files)), Shape(channels, resize, size))

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel, pixels scaled to 0..1: from sums of whole numbers, exact."""
        total, squares = np.zeros((2, self.form.channels), np.int64)
        for start in tqdm(
            range(0, len(self), BATCH), desc="mean and deviation", unit="batch", mininterval=5, delay=2
        ):
            pixels = self[start : start + BATCH].astype(np.int64)
            total += pixels.sum(axis=(0, 2, 3))
            squares += np.square(pixels).sum(axis=(0, 2, 3))
        count = len(self) * self.form.size**2
        mean = total / count
        return mean / 255, np.sqrt(squares / count - mean**2) / 255

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        """Decodes these images, without augmentation."""
        from attention_transfer.data import (
            workers,
        )  # with torch, which whoever asks for labels alone does without

        chosen = np.atleast_1d(self.chosen[rows])
        found = workers.render(self.files.entries(chosen), self.form, None, chosen, 0).numpy()
        return found[0] if np.ndim(self.chosen[rows]) == 0 else found
