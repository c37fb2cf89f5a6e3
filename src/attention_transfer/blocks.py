"""Attention maps block by block, so that what is made of them stays in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_BYTES = 2**20  # of maps at a time


def is_small(tokens: int, head_dim: int) -> bool:
    """Whether a map is no larger than its layer's queries, keys, values and result together."""
    return tokens <= 4 * head_dim


def blocks(maps: int, queries: int, keys: int, room: int) -> Iterator[tuple[slice, slice]]:
    """Which maps, and which of their rows, to make at a time: whole maps if one fits, at least one row.

    Args:
        maps: how many there are, of (queries, keys).
        room: for that many of a map's elements.
    """
    lines = max(1, min(queries, room // keys))
    together = max(1, min(maps, room // (queries * keys))) if lines == queries else 1
    for first in range(0, maps, together):
        for top in range(0, queries, lines):
            yield slice(first, min(first + together, maps)), slice(top, min(top + lines, queries))
