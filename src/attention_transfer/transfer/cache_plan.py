"""What an attention cache will take on disk, before anything is written; without torch, for `check`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from attention_transfer.errors import StudyError
from attention_transfer.transfer.cache_layout import Layout
from attention_transfer.transfer.shards import SHARD_BYTES

_ROW_EXTRA = 8 + 16  # checksum and key
_SHARD_EXTRA = 1024  # header, and entry in the manifest
_CACHE_EXTRA = 65536  # recipe, layout and header of the keys


@dataclass(frozen=True)
class Plan:
    """What a cache will take: bytes on disk, rounded up to the headers' largest size, and shards."""

    bytes: int
    shards: int


def plan(
    rows: int,
    layout: Layout,
    *,
    budget_bytes: float | None,
    free_bytes: int,
    where: Path,
    shard_bytes: int = SHARD_BYTES,
    bias_heads: int = 0,
) -> Plan:
    """Size of a cache of `rows` rows, before anything is written.

    Args:
        rows: number of (example, view) pairs.
        layout: content, shape and number format of a row.
        budget_bytes: the largest size allowed by attention.budget_gb; None for no limit.
        free_bytes: free disk room, plus what `where` already holds of this cache.
        where: the cache's folder, for the message.
        shard_bytes: as given to `CacheWriter`.
        bias_heads: heads of the bias given to `CacheWriter`; 0 without one.

    Raises:
        StudyError: over the budget, or over the free disk room; names the two ways out.
    """
    shards = math.ceil(rows / layout.rows_per_shard(shard_bytes))
    bias = 4 * layout.layers * bias_heads * layout.tokens**2
    wanted = rows * (layout.row_bytes + _ROW_EXTRA) + shards * _SHARD_EXTRA + bias + _CACHE_EXTRA
    ways_out = "store fewer views (views.per_image), or store none (attention.source: online)"
    if budget_bytes is not None and wanted > budget_bytes:
        raise StudyError(
            f"the attention cache would take {_size(wanted)}; "
            f"attention.budget_gb allows {_size(budget_bytes)}",
            where=str(where),
            remedy=f"{ways_out}, or raise attention.budget_gb",
        )
    if wanted > free_bytes:
        raise StudyError(
            f"the attention cache would take {_size(wanted)}; the disk has room for {_size(free_bytes)}",
            where=str(where),
            remedy=f"{ways_out}, or free disk room",
        )
    return Plan(bytes=wanted, shards=shards)


def _size(count: float) -> str:
    return f"{count:.0f} bytes ({count / 1e9:.3g} GB)"
