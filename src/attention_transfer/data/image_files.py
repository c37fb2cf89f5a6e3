"""Images that stay in their files: an index of a folder or a tar, with a checksum of every file.

For data sets that memory does not hold. The bytes of an image are read, and checked, whenever it is shown.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image
from tqdm import tqdm

from attention_transfer.errors import StudyError, repro

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LOOSE = -1  # offset of an image that is a file of its own
READERS = 16  # threads: disks and file servers answer many at once


@dataclass(frozen=True)
class Shape:
    """What images are brought to.

    Attributes:
        channels: 1 or 3.
        resize: shorter side of a clean image before its centre is cut out, in pixels.
        size: side of what is shown, in pixels.
    """

    channels: int
    resize: int
    size: int

    @property
    def mode(self) -> str:
        """Pillow's name for the channels."""
        return "L" if self.channels == 1 else "RGB"


@dataclass(frozen=True)
class Entry:
    """Where an image's bytes lie; small, since it goes to the process that decodes it.

    Attributes:
        path: of the file, or of the tar that holds it.
        name: for messages.
        offset: in the tar; LOOSE for a file of its own.
        size: in bytes.
        checksum: xxh3 of these bytes.
    """

    path: str
    name: str
    offset: int
    size: int
    checksum: int

    def read(self) -> bytes:
        """The bytes, which are those that were indexed.

        Raises:
            StudyError: the file is gone, cut short or changed.
        """
        remedy = f"bring the file back, or index what is there now: {repro('data', again=True)}"
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123 (a million times: Path.open takes longer)
                if self.offset != LOOSE:
                    file.seek(self.offset)
                content = file.read(-1 if self.offset == LOOSE else self.size)
        except OSError as error:
            raise StudyError(f"cannot be read: {error.strerror}", where=self.where, remedy=remedy) from error
        if xxhash.xxh3_64_intdigest(content) != self.checksum:
            raise StudyError(
                "is not what was indexed: its bytes have changed", where=self.where, remedy=remedy
            )
        return content

    @property
    def where(self) -> str:
        return self.path if self.offset == LOOSE else f"{self.path}: {self.name}"


@dataclass(frozen=True)
class ImageFiles:
    """The images of one split.

    Attributes:
        root: folder or tar; not part of what they are: a folder that is moved holds the same images.
        names: relative to the folder, or in the tar.
        offsets, sizes: int64 (count,), see `Entry`.
        checksums: uint64 (count,).
    """

    root: Path
    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def entries(self, rows: np.ndarray) -> list[Entry]:
        """Of these images."""
        root = str(self.root)
        return [
            Entry(
                root if offset != LOOSE else os.path.join(root, name),  # noqa: PTH118 (as in `read`)
                name,
                offset,
                size,
                checksum,
            )
            for name, offset, size, checksum in zip(
                [self.names[row] for row in rows],
                self.offsets[rows].tolist(),
                self.sizes[rows].tolist(),
                self.checksums[rows].tolist(),
                strict=True,
            )
        ]

    def parts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Offsets, sizes and checksums of these images."""
        return self.offsets[rows], self.sizes[rows], self.checksums[rows]

    def arrays(self) -> dict[str, np.ndarray]:
        """As arrays without Python objects, for a file."""
        text = {"root": str(self.root.absolute()), "names": "\n".join(self.names)}
        return {
            **{key: np.frombuffer(value.encode(), np.uint8) for key, value in text.items()},
            **{key: getattr(self, key) for key in ("offsets", "sizes", "checksums")},
        }

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> ImageFiles:
        """What `arrays` gave."""
        root, names = (arrays[key].tobytes().decode() for key in ("root", "names"))
        return cls(Path(root), names.split("\n"), *(arrays[key] for key in ("offsets", "sizes", "checksums")))


def index(
    root: Path, *, classes: list[str] | None, progress: str
) -> tuple[list[str], np.ndarray, ImageFiles]:
    """Reads every file of a folder or a tar of class folders once.

    Args:
        classes: names of the class folders, in order of their labels; None: those that are there, sorted.
        progress: label of the progress bar.

    Returns:
        Class names, labels int64 (count,), and the files; sorted by class and name.

    Raises:
        StudyError: there are no images; or a class folder that is not one of `classes`; or a file that is no image.
    """
    found = list(_in_tar(root) if root.is_file() else _in_folder(root))
    if not found:
        raise StudyError(
            "holds no images",
            where=str(root),
            remedy=f"put them there as <class>/<name>, with one of the endings {', '.join(ENDINGS)}",
        )
    folders = sorted({class_of(name) for name, _, _ in found})
    if classes is None:
        classes = folders
    elif unknown := sorted(set(folders) - set(classes)):
        raise StudyError(
            f"has {len(unknown)} class folders that the training images lack: {', '.join(unknown[:5])}",
            where=str(root),
            remedy="give both splits the same class folders",
        )
    numbers = {name: number for number, name in enumerate(classes)}
    found.sort(key=lambda entry: (numbers[class_of(entry[0])], entry[0]))
    files = ImageFiles(
        root,
        [name for name, _, _ in found],
        np.array([offset for _, offset, _ in found], np.int64),
        np.array([size for _, _, size in found], np.int64),
        np.zeros(len(found), np.uint64),
    )
    labels = np.array([numbers[class_of(name)] for name in files.names], np.int64)
    with ThreadPoolExecutor(READERS) as readers:
        every = (
            entry for start in range(0, len(files), 4096) for entry in files.entries(_rows(start, files))
        )
        checked = readers.map(_checksum, every, chunksize=64)
        for row, checksum in enumerate(
            tqdm(checked, total=len(files), desc=progress, unit="file", mininterval=5)
        ):
            files.checksums[row] = checksum
    return classes, labels, files


def class_of(name: str) -> str:
    """The folder that an image lies in."""
    return name.rpartition("/")[0].rpartition("/")[2]


def _rows(start: int, files: ImageFiles) -> np.ndarray:
    return np.arange(start, min(start + 4096, len(files)))


def _in_folder(root: Path) -> Iterable[tuple[str, int, int]]:
    for folder, below, names in os.walk(root, followlinks=True):
        below.sort()
        for name in names:
            if name.lower().endswith(ENDINGS):
                path = Path(folder) / name
                yield str(path.relative_to(root)), LOOSE, path.stat().st_size


def _in_tar(root: Path) -> Iterable[tuple[str, int, int]]:
    """Members of an uncompressed tar, which can be read from anywhere in it."""
    try:
        with tarfile.open(root, "r:") as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith(ENDINGS):
                    yield member.name.removeprefix("./"), member.offset_data, member.size
    except (OSError, tarfile.TarError) as error:
        raise StudyError(
            f"is no whole, uncompressed tar: {error}",
            where=str(root),
            remedy="unpack it: gunzip, or extract it into a folder of that name without .tar",
        ) from error


def _checksum(entry: Entry) -> int:
    """Of the bytes of an image, whose header can be read."""
    try:
        with Path(entry.path).open("rb") as file:
            file.seek(max(entry.offset, 0))
            content = file.read(entry.size)
        with Image.open(io.BytesIO(content)):
            pass
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StudyError(
            f"is no image that can be read: {error}",
            where=entry.where,
            remedy="replace or remove this file",
        ) from error
    return xxhash.xxh3_64_intdigest(content)
