"""Images that stay in their files: an index of a folder, a tar or Parquet shards, with a checksum of every image.

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
from typing import NamedTuple

import numpy as np
import xxhash
from PIL import Image
from tqdm import tqdm

from attention_transfer.data import annotation_file, parquet_files
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
        path: of the file, or of the tar or the Parquet shard that holds it.
        name: for messages.
        offset: in the tar; LOOSE for a file of its own; in a shard what `parquet_files` makes of its row.
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
            content = self._content()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise StudyError(f"cannot be read: {reason}", where=self.where, remedy=remedy) from error
        if xxhash.xxh3_64_intdigest(content) != self.checksum:
            raise StudyError(
                "is not what was indexed: its bytes have changed", where=self.where, remedy=remedy
            )
        return content

    def _content(self) -> bytes:
        if self.offset >= parquet_files.OFFSET:
            return parquet_files.image(self.path, self.offset)
        with open(self.path, "rb") as file:  # noqa: PTH123 (a million times: Path.open takes longer)
            if self.offset != LOOSE:
                file.seek(self.offset)
            return file.read(-1 if self.offset == LOOSE else self.size)

    @property
    def where(self) -> str:
        if self.offset >= parquet_files.OFFSET:
            return f"{self.path}: row {self.name.rpartition('/')[2]}"
        return self.path if self.offset == LOOSE else f"{self.path}: {self.name}"


@dataclass(frozen=True)
class ImageFiles:
    """The images of one split.

    Attributes:
        root: folder, also of shards, or tar; not part of what they are: a folder that is moved holds the same images.
        names: relative to the folder, or in the tar; in a shard `<shard>/<number of the row>`.
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
                _file(root, name, offset),
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


class Found(NamedTuple):
    """An image: `Entry`'s values, and its class."""

    class_name: str
    name: str
    offset: int
    size: int
    checksum: int | None


def index(
    root: Path, *, classes: list[str] | None, progress: str, labelled: bool = True
) -> tuple[list[str], np.ndarray, ImageFiles]:
    """Reads every image of a folder or a tar of class folders, of Parquet shards, or of an annotation file once.

    Args:
        root: folder; tar; `.parquet`, or a folder of such or a pattern with `*`; `.json`, of COCO's layout.
        classes: names of the classes, in order of their labels; None: those that are there. Class folders are sorted.
        progress: label of the progress bar.
        labelled: whether images have to lie in class folders.

    Returns:
        Class names, labels int64 (count,), and the files; sorted by class and name.

    Raises:
        StudyError: there are no images; or a class that is not one of `classes`; or a file that is no image.
    """
    if shards := parquet_files.shards(root):
        root = shards[0].parent
        names, found = _in_shards(shards, progress)
    elif root.suffix == ".json":
        names, listed = annotation_file.read(root)
        root = root.parent
        found = [Found(kind, name, LOOSE, _size(root / name), None) for name, kind in listed]
    else:
        found = [
            Found(class_of(name), name, offset, size, None)
            for name, offset, size in (_in_tar(root) if root.is_file() else _in_folder(root))
        ]
        names = sorted({each.class_name for each in found})
    if not found:
        raise StudyError(
            "holds no images",
            where=str(root),
            remedy=f"put them there as <class>/<name>, with one of the endings {', '.join(ENDINGS)}",
        )
    if labelled and (loose := next((each.name for each in found if not each.class_name), None)):
        raise StudyError(
            f"holds an image in no class folder: {loose}",
            where=str(root),
            remedy="put every image there as <class>/<name>",
        )
    if classes is None:
        classes = names
    elif unknown := sorted(set(names) - set(classes)):
        raise StudyError(
            f"has {len(unknown)} class folders that the training images lack: {', '.join(unknown[:5])}",
            where=str(root),
            remedy="give both splits the same class folders",
        )
    numbers = {name: number for number, name in enumerate(classes)}
    found.sort(key=lambda each: (numbers[each.class_name], each.name))
    files = ImageFiles(
        root,
        [each.name for each in found],
        np.array([each.offset for each in found], np.int64),
        np.array([each.size for each in found], np.int64),
        np.array([each.checksum or 0 for each in found], np.uint64),
    )
    labels = np.array([numbers[each.class_name] for each in found], np.int64)
    if shards:  # read already, since labels are beside the images
        return classes, labels, files
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


def count(root: Path) -> int:
    """Images in a folder or a tar, none of which is read."""
    return sum(1 for _ in (_in_tar(root) if root.is_file() else _in_folder(root)))


def class_of(name: str) -> str:
    """The folder that an image lies in."""
    return name.rpartition("/")[0].rpartition("/")[2]


def _file(root: str, name: str, offset: int) -> str:
    """The file that holds an image."""
    if offset >= parquet_files.OFFSET:
        name = name.rpartition("/")[0]
    elif offset != LOOSE:
        return root
    return os.path.join(root, name)  # noqa: PTH118 (as in `read`)


def _rows(start: int, files: ImageFiles) -> np.ndarray:
    return np.arange(start, min(start + 4096, len(files)))


def _in_folder(root: Path) -> Iterable[tuple[str, int, int]]:
    for folder, below, names in os.walk(root, followlinks=True):
        below.sort()
        for name in names:
            if name.lower().endswith(ENDINGS):
                path = Path(folder) / name
                yield str(path.relative_to(root)), LOOSE, path.stat().st_size


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StudyError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            remedy="unpack the images into the folder of the annotation file that names this one",
        ) from error


def _in_shards(shards: list[Path], progress: str) -> tuple[list[str], list[Found]]:
    """Class names, and every image, read group by group."""
    for path in shards:
        parquet_files.check_columns(path)
    names = parquet_files.class_names(shards)

    def of_group(group: tuple[Path, int]) -> list[Found]:
        path, found = group[0], []
        for row in parquet_files.rows(*group):
            if row.label >= len(names):
                raise StudyError(
                    f"has the label {row.label} in row {row.number}, but there are {len(names)} class names",
                    where=str(path),
                    remedy="correct the label, or name every class",
                )
            name = f"{path.name}/{row.number:09d}"
            entry = Entry(str(path), name, row.offset, len(row.content), 0)
            checksum = _checked(row.content, entry.where)
            found.append(Found(names[row.label], name, row.offset, len(row.content), checksum))
        return found

    groups = [group for path in shards for group in parquet_files.groups(path)]
    with ThreadPoolExecutor(READERS // 4) as readers:  # each holds a row group
        parts = readers.map(of_group, groups)
        return names, [
            each
            for part in tqdm(parts, total=len(groups), desc=progress, unit="group", mininterval=5)
            for each in part
        ]


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
    except OSError as error:
        raise _no_image(entry.where, error) from error
    return _checked(content, entry.where)


def _checked(content: bytes, where: str) -> int:
    try:
        with Image.open(io.BytesIO(content)):
            pass
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _no_image(where, error) from error
    return xxhash.xxh3_64_intdigest(content)


def _no_image(where: str, error: Exception) -> StudyError:
    return StudyError(
        f"is no image that can be read: {error}", where=where, remedy="replace or remove this file"
    )
