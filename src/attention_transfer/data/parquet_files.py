"""Images in Parquet, in the layout of Hugging Face's data sets: columns `image` {bytes, path} and `label`.

A row group is what can be read from anywhere in a shard: it is read for every image that is shown out of order.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attention_transfer.errors import StudyError

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

COLUMNS = ("image", "label")
CLASSES = "classes.txt"
OFFSET = 1 << 62
"""From here on an offset is that of a row: the number of its group, then 31 bits for the row in it."""
_ROWS = 31


class Row(NamedTuple):
    """An image of a shard.

    Attributes:
        number: in the shard, from 0.
        offset: what finds it again.
        content: the image's bytes.
    """

    number: int
    offset: int
    label: int
    content: bytes


def shards(root: Path) -> list[Path]:
    """The shards of a split: a folder's, a pattern's, or one; none if this is something else."""
    if "*" in root.name:
        return sorted(root.parent.glob(root.name))
    if root.is_dir():
        return sorted(root.glob("*.parquet"))
    return [root] if root.suffix == ".parquet" else []


def class_names(paths: list[Path]) -> list[str]:
    """In order of the labels: of classes.txt beside the shards, else of what `datasets` has written into them.

    Raises:
        StudyError: neither names them, or a shard names others than the first.
    """
    beside = paths[0].parent / CLASSES
    if beside.exists():
        names = beside.read_text(encoding="utf-8").splitlines()
        if len(set(names)) != len(names):
            raise StudyError(
                "names a class twice",
                where=str(beside),
                remedy="give each label a name of its own, one a line",
            )
        return names
    found = [_names_in(path) for path in paths]
    for path, names in zip(paths, found, strict=True):
        if not names:
            raise StudyError(
                "does not say what its classes are called",
                where=str(path),
                remedy=f"write their names into {beside}, one a line, in order of the labels",
            )
        if names != found[0]:
            raise StudyError(
                f"has other classes than {paths[0].name}",
                where=str(path),
                remedy="bring shards of one data set",
            )
    return found[0]


def groups(path: Path) -> list[tuple[Path, int]]:
    """The row groups of a shard."""
    return [(path, number) for number in range(_opened(path).num_row_groups)]


def check_columns(path: Path) -> None:
    """Raises StudyError: a shard is no whole Parquet file, or has other columns."""
    from pyarrow import types

    schema = _opened(path).schema.to_arrow_schema()
    for name in COLUMNS:
        if name not in schema.names:
            raise StudyError(
                f"has no column {name!r} but {', '.join(schema.names)}",
                where=str(path),
                remedy=f"rename its columns to {' and '.join(COLUMNS)}",
            )
    image, label = (schema.field(name).type for name in COLUMNS)
    if not types.is_struct(image) or "bytes" not in [field.name for field in image]:
        raise StudyError(
            f"has no bytes in its column 'image', which is {image}",
            where=str(path),
            remedy="store images as {bytes, path}, as `datasets` does",
        )
    if not types.is_integer(label):
        raise StudyError(
            f"has no numbers in its column 'label', which is {label}",
            where=str(path),
            remedy="store labels as numbers, as `datasets` does",
        )


def rows(path: Path, group: int) -> Iterator[Row]:
    """Every image of a row group.

    Raises:
        StudyError: the shard is damaged, or has an image without bytes or a label.
    """
    metadata = _opened(path)
    before = sum(metadata.row_group(number).num_rows for number in range(group))
    try:
        table = _read(path, group, ["image.bytes", "label"])
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    contents, labels = _bytes(table), table.column("label").to_pylist()
    for row, (content, label) in enumerate(zip(contents, labels, strict=True)):
        if content.as_py() is None or label is None or label < 0:
            raise StudyError(
                f"has no {'image' if content.as_py() is None else 'label'} in row {before + row}",
                where=str(path),
                remedy="remove this row, or take a split that has labels",
            )
        yield Row(before + row, OFFSET | group << _ROWS | row, label, content.as_py())


def image(path: str, offset: int) -> bytes:
    """The bytes of one image.

    Raises:
        OSError, ValueError: the shard is gone or damaged.
    """
    group, row = divmod(offset - OFFSET, 1 << _ROWS)
    state = os.stat(path)  # noqa: PTH116 (a million times)
    contents = _contents(path, group, state.st_mtime_ns, state.st_size)
    if row >= len(contents):
        raise ValueError(f"row group {group} has {len(contents)} rows")
    return contents[row].as_py()


@functools.lru_cache(maxsize=2)
def _contents(path: str, group: int, changed: int, size: int) -> Any:
    """Of a row group, while the file is the same."""
    return _bytes(_read(Path(path), group, ["image.bytes"], _metadata(path, changed, size)))


@functools.lru_cache(maxsize=1024)
def _metadata(path: str, changed: int, size: int) -> FileMetaData:
    from pyarrow import parquet

    with open(path, "rb") as file:  # noqa: PTH123 (as above)
        return parquet.read_metadata(file)


def _read(path: Path, group: int, columns: list[str], metadata: FileMetaData | None = None) -> Any:
    from pyarrow import parquet

    with path.open("rb") as file:
        return parquet.ParquetFile(file, metadata=metadata).read_row_group(
            group, columns=columns, use_threads=False
        )


def _bytes(table: Any) -> Any:
    return table.column("image").combine_chunks().field("bytes")


def _opened(path: Path) -> FileMetaData:
    try:
        state = path.stat()
        return _metadata(str(path), state.st_mtime_ns, state.st_size)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _names_in(path: Path) -> list[str]:
    """Of the column `label`, in the metadata that `datasets` writes; none where there are none."""
    written = (_opened(path).metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(written).get("info", {}).get("features", {})
        return list(features.get("label", {}).get("names") or [])
    except (ValueError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> StudyError:
    return StudyError(
        f"cannot be read as Parquet: {' '.join(str(error).split())[:200]}",
        where=str(path),
        remedy="bring this shard again",
    )
