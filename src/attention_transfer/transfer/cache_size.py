"""What a cache takes on disk, to the byte, before anything is written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attention_transfer.transfer.cache_layout import Layout
from attention_transfer.transfer.cache_manifest import Entry, Manifest, write_manifest
from attention_transfer.transfer.shards import (
    MANIFEST,
    SHARD_BYTES,
    file_bytes,
    json_like,
    safetensors_bytes,
    shard_name,
)

_DIGEST = "0" * 16  # every checksum and fingerprint has this length


def exact_bytes(
    rows: int, layout: Layout, recipe: Mapping[str, Any], *, shard_bytes: int = SHARD_BYTES
) -> int:
    """Bytes of all files of a finished cache: shards, keys, manifest.

    Args:
        rows: number of (example, view) pairs.
        layout: shape and number format of a row.
        recipe: as given to `CacheWriter`; of its values only the lengths count.
        shard_bytes: as given to `CacheWriter`.
    """
    per_shard = layout.rows_per_shard(shard_bytes)
    counts = [min(per_shard, rows - start) for start in range(0, rows, per_shard)]
    shards = sum(counts.count(count) * file_bytes(layout, count) for count in set(counts))
    keys = {"keys": {"dtype": "I64", "shape": [rows, 2], "data_offsets": [0, 16 * rows]}}
    return shards + safetensors_bytes(keys) + _manifest_bytes(rows, counts, layout, recipe)


def _manifest_bytes(rows: int, counts: list[int], layout: Layout, recipe: Mapping[str, Any]) -> int:
    """Of the file that is written for as many shards, without keys."""
    entries = tuple(Entry(shard_name(index), count, _DIGEST) for index, count in enumerate(counts))
    manifest = Manifest(_DIGEST, json_like(recipe), layout, np.empty((0, 2), np.int64), entries, bias=None)
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), manifest)
        written = (Path(folder) / MANIFEST).stat().st_size
    return written - len("0") + len(str(rows))  # its entry `rows` counts the keys
