"""The files of the attention cache: safetensors shards whose every row has a checksum.

A shard holds `rows` (n, 2, layers, heads, tokens, head_dim) and `xxh3` (n,), the 64-bit xxh3 of
each row's bytes. Its metadata holds a fingerprint of recipe, layout and of the keys of its rows,
so that a shard of another teacher, or of other images, is never mistaken for this one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from attention_transfer import files
from attention_transfer.errors import StudyError, repro

SHARD_BYTES = 64 * 2**20
MANIFEST = "manifest.json"
KEYS = "keys.safetensors"
STAGE = "cache"  # the stage of the pipeline that writes the cache
REMEDY = f"make it anew (intact shards are kept): {repro(STAGE, again=True)}"
Checksums = np.ndarray[Any, np.dtype[np.uint64]]
_FORMAT = 1  # raised when the files' meaning changes: older files are then written anew
_STORED = {"float16": ("F16", "<f2"), "float32": ("F32", "<f4")}  # safetensors' and numpy's names


@dataclass(frozen=True)
class Layout:
    """Shape of one row: queries and keys of one (example, view), for all layers of a teacher."""

    layers: int
    heads: int
    tokens: int
    head_dim: int
    dtype: Literal["float16", "float32"]

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.tokens, self.head_dim) < 1 or self.dtype not in _STORED:
            raise ValueError(f"sizes are positive, and dtype is one of {list(_STORED)}: got {self}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(2, layers, heads, tokens, head_dim); index 0 of the first axis holds the queries."""
        return (2, self.layers, self.heads, self.tokens, self.head_dim)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian, as in the files."""
        return np.dtype(_STORED[self.dtype][1])

    @property
    def layer_values(self) -> int:
        """Values of the queries, or of the keys, of one layer."""
        return self.heads * self.tokens * self.head_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, without its checksum."""
        return 2 * self.layers * self.layer_values * self.numpy_dtype.itemsize

    def rows_per_shard(self, shard_bytes: int) -> int:
        """Rows of every shard but the last; a shard holds at least one."""
        return max(1, shard_bytes // self.row_bytes)


@dataclass(frozen=True)
class Shard:
    """An opened shard. `rows` (n, 2 * layers, heads * tokens * head_dim) is memory-mapped, read-only."""

    path: Path
    rows: np.ndarray[Any, np.dtype[Any]]
    checksums: Checksums

    def damaged(self, indices: np.ndarray[Any, np.dtype[np.int64]] | None = None) -> np.ndarray[Any, Any]:
        """Which of the rows `indices` (default: all) differ from their checksums; a subset of `indices`."""
        if indices is None:
            indices = np.arange(len(self.rows))
        # `map` runs row by row in C and hashes the mapped pages without copying them.
        found = checksums(map(self.rows.__getitem__, indices.tolist()), count=len(indices))
        return indices[found != self.checksums[indices]]


def shard_name(index: int) -> str:
    """File name of a shard, counted from 0."""
    return f"shard-{index:05d}.safetensors"


def json_like(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """`recipe` as it reads back from JSON: tuples become lists. TypeError where JSON lacks a type."""
    value: dict[str, Any] = json.loads(json.dumps(recipe, sort_keys=True, allow_nan=False))
    return value


def cache_fingerprint(recipe: Mapping[str, Any], layout: Layout) -> str:
    """Equal for caches whose equal keys hold equal rows."""
    return files.fingerprint({"format": _FORMAT, "recipe": recipe, "layout": asdict(layout)})


def shard_fingerprint(cache: str, keys: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    """Fingerprint of a shard of the cache with fingerprint `cache`, for the keys (n, 2) of its rows."""
    return files.fingerprint([cache, digest(keys)])


def checksums(rows: Iterable[Any], *, count: int) -> Checksums:
    """64-bit xxh3 of each of `count` contiguous arrays."""
    return np.fromiter(map(xxh3_64_intdigest, rows), dtype=np.uint64, count=count)


def digest(values: np.ndarray[Any, Any]) -> str:
    """64-bit xxh3 of an array's bytes, in hexadecimal."""
    return xxh3_64_hexdigest(np.ascontiguousarray(values).data)


def write_shard(path: Path, rows: np.ndarray[Any, Any], *, layout: Layout, fingerprint: str) -> Checksums:
    """Writes `rows` (n, *layout.shape) whole or not at all, and returns their checksums.

    Raises:
        StudyError: the disk is full, or refuses.
    """
    found = checksums(rows.reshape(len(rows), -1), count=len(rows))
    tensors = {"rows": rows.reshape(len(rows), *layout.shape), "xxh3": found}
    # Exactly one metadata entry: safetensors writes several in an order that differs between runs.
    content = safetensors.numpy.save(tensors, metadata={"fingerprint": fingerprint})
    with files.atomic(path) as temporary:
        temporary.write_bytes(content)
    return found


def open_shard(path: Path, *, layout: Layout, rows: int, fingerprint: str) -> Shard:
    """Maps a shard without reading its rows.

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
        checksum_list = np.fromfile(path, dtype="<u8", count=rows, offset=data)
        mapped = np.memmap(
            path,
            dtype=layout.numpy_dtype,
            mode="r",
            offset=data + expected["rows"]["data_offsets"][0],
            shape=(rows, 2 * layout.layers, layout.layer_values),
        )
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
    return Shard(path, np.asarray(mapped), checksum_list)


def _header(layout: Layout, rows: int, fingerprint: str) -> dict[str, Any]:
    """The header of an intact shard; safetensors puts the widest type first."""
    start = 8 * rows
    end = start + rows * layout.row_bytes
    stored = _STORED[layout.dtype][0]
    return {
        "__metadata__": {"fingerprint": fingerprint},
        "xxh3": {"dtype": "U64", "shape": [rows], "data_offsets": [0, start]},
        "rows": {"dtype": stored, "shape": [rows, *layout.shape], "data_offsets": [start, end]},
    }


def _bad(path: Path, problem: str) -> StudyError:
    return StudyError(problem, where=str(path), remedy=REMEDY)
