"""The files of the attention cache: safetensors shards whose every row has a checksum.

A shard holds `rows` (n, *layout.stored_shape) and `xxh3` (n,), the 64-bit xxh3 of each row's bytes.
Its metadata holds a fingerprint of recipe, layout, bias and of the keys of its rows, so that a shard
of another teacher, or of other images, is never mistaken for this one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from attention_transfer import files
from attention_transfer.errors import StudyError, repro
from attention_transfer.transfer.cache_layout import Layout

SHARD_BYTES = 64 * 2**20
MANIFEST = "manifest.json"
KEYS = "keys.safetensors"
BIAS = "bias.safetensors"
STAGE = "cache"  # the stage of the pipeline that writes the cache
REMEDY = f"make it anew (intact shards are kept): {repro(STAGE, again=True)}"
Checksums = np.ndarray[Any, np.dtype[np.uint64]]
_FORMAT = 1  # raised when the files' meaning changes: older files are then written anew
_SAFETENSORS = {"float16": "F16", "float32": "F32", "int8": "U8"}  # names of the stored dtypes


class Shard:
    """An opened shard, whose rows are read where they lie, in any order and by any number of threads.

    Not memory-mapped: a row comes in one request of its size, which a disk serves faster than a page at a time,
    and a file that another program cuts short is an error instead of the end of the process.

    Args:
        start: where the first row begins.
    """

    def __init__(self, path: Path, *, start: int, row_bytes: int, checksums: Checksums) -> None:
        self.path, self.start, self.row_bytes, self.checksums = path, start, row_bytes, checksums
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, row: int, target: memoryview, *, first: int = 0) -> None:
        """Fills `target`, of bytes, with a row's, from its byte `first` on.

        Raises:
            StudyError: the file has become shorter, or cannot be read.
        """
        offset = self.start + row * self.row_bytes + first
        try:
            while (count := _read_at(self._descriptor, target, offset)) < len(target):
                if not count:
                    raise _bad(self.path, "has been truncated since it was opened")
                target, offset = target[count:], offset + count
        except OSError as error:
            raise _bad(self.path, f"cannot be read: {error.strerror or error}") from error

    def intact(self, row: int, content: memoryview) -> bool:
        """Whether what was read of a row, all of it, has the row's checksum."""
        return bool(xxh3_64_intdigest(content) == self.checksums[row])

    def damaged(self) -> list[int]:
        """Rows that differ from their checksums; reads every byte."""
        content = memoryview(bytearray(self.row_bytes))
        found = []
        for row in range(len(self.checksums)):
            self.read(row, content)
            if not self.intact(row, content):
                found.append(row)
        return found


def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], offset)
    content = os.pread(descriptor, len(target), offset)  # macOS: by way of a copy
    target[: len(content)] = content
    return len(content)


def shard_name(index: int) -> str:
    """File name of a shard, counted from 0."""
    return f"shard-{index:05d}.safetensors"


def json_like(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """`recipe` as it reads back from JSON: tuples become lists. TypeError where JSON lacks a type."""
    value: dict[str, Any] = json.loads(json.dumps(recipe, sort_keys=True, allow_nan=False))
    return value


def cache_fingerprint(recipe: Mapping[str, Any], layout: Layout, bias: str | None) -> str:
    """Equal for caches whose equal keys hold equal rows, and whose biases have equal digests."""
    values = {"format": _FORMAT, "recipe": recipe, "layout": layout.entries()}
    return files.fingerprint(values if bias is None else {**values, "bias": bias})


def shard_fingerprint(cache: str, keys: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    """Fingerprint of a shard of the cache with fingerprint `cache`, for the keys (n, 2) of its rows."""
    return files.fingerprint([cache, digest(keys)])


def checksums(rows: Iterable[Any], *, count: int) -> Checksums:
    """64-bit xxh3 of each of `count` contiguous arrays."""
    return np.fromiter(map(xxh3_64_intdigest, rows), dtype=np.uint64, count=count)


def digest(values: np.ndarray[Any, Any]) -> str:
    """64-bit xxh3 of an array's bytes, in hexadecimal."""
    return xxh3_64_hexdigest(np.ascontiguousarray(values).data)


def write_shard(
    path: Path, rows: np.ndarray[Any, np.dtype[np.uint8]], *, layout: Layout, fingerprint: str
) -> Checksums:
    """Writes `rows` (n, units, bytes of a unit) whole or not at all, and returns their checksums.

    Raises:
        StudyError: the disk is full, or refuses.
    """
    found = checksums(rows, count=len(rows))
    stored = rows.view(layout.stored_dtype).reshape(len(rows), *layout.stored_shape)
    tensors = {"rows": stored, "xxh3": found}
    # Exactly one metadata entry: safetensors writes several in an order that differs between runs.
    metadata = {"fingerprint": fingerprint}
    with files.atomic(path) as temporary:
        try:
            safetensors.numpy.save_file(tensors, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:  # what the disk says, in other words
            told = re.search(r"os error (\d+)", str(error))
            number = int(told[1]) if told else errno.EIO
            raise OSError(number, os.strerror(number)) from error
    return found


def open_shard(path: Path, *, layout: Layout, rows: int, fingerprint: str) -> Shard:
    """Opens a shard without reading its rows.

    Raises:
        StudyError: the shard is missing, truncated, or not the one that is expected.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            # A damaged length must not make us read gigabytes.
            header = file.read(min(header_bytes, size))
        expected = _header(layout, rows, fingerprint)
        if json.loads(header) != expected:
            raise _bad(path, "is damaged, or of another cache: its header is not the expected one")
        data = 8 + header_bytes
        wanted = data + expected["rows"]["data_offsets"][1]
        if size != wanted:
            raise _bad(
                path, f"{'is truncated' if size < wanted else 'is too long'}: {size} bytes, of {wanted}"
            )
        listed = np.fromfile(path, dtype="<u8", count=rows, offset=data)
        rows_at = data + expected["rows"]["data_offsets"][0]
        return Shard(path, start=rows_at, row_bytes=layout.row_bytes, checksums=listed)
    except FileNotFoundError as error:
        raise _bad(path, "is missing") from error
    except ValueError as error:  # json's and numpy's
        raise _bad(path, f"is truncated or damaged: {error}") from error
    except OSError as error:
        raise StudyError(
            f"cannot be opened: {error.strerror or error}",
            where=str(path),
            remedy="make the file readable, or raise the limit of open files (ulimit -n)",
        ) from error


def _header(layout: Layout, rows: int, fingerprint: str) -> dict[str, Any]:
    """The header of an intact shard; safetensors puts the widest type first."""
    start = 8 * rows
    end = start + rows * layout.row_bytes
    shape = [rows, *layout.stored_shape]
    return {
        "__metadata__": {"fingerprint": fingerprint},
        "xxh3": {"dtype": "U64", "shape": [rows], "data_offsets": [0, start]},
        "rows": {"dtype": _SAFETENSORS[layout.dtype], "shape": shape, "data_offsets": [start, end]},
    }


def file_bytes(layout: Layout, rows: int) -> int:
    """Size of the file of a shard with so many rows, to the byte."""
    return safetensors_bytes(_header(layout, rows, fingerprint="0" * 16))


def safetensors_bytes(header: Mapping[str, Any]) -> int:
    """Size of a safetensors file with this header: its length, itself padded to 8 bytes, and the tensors."""
    text = len(json.dumps(header, separators=(",", ":")))
    tensors = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return 8 + math.ceil(text / 8) * 8 + int(tensors)


def _bad(path: Path, problem: str) -> StudyError:
    return StudyError(problem, where=str(path), remedy=REMEDY)
