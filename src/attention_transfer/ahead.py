"""Batches in order, each announced while the one before it is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def announced(items: Iterable[Item], begin: Callable[[Item], None]) -> Iterator[Item]:
    """The same items, of which `begin` is told once each: the first as it is asked for, the others an item before.

    So whoever prepares them, decoding images say, can be at the next one while the present one is computed.
    """
    waiting: list[Item] = []
    for item in items:
        begin(item)
        if waiting:
            yield waiting.pop()
        waiting.append(item)
    yield from waiting
