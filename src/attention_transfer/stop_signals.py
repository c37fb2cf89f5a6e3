"""SIGTERM and SIGINT as requests to stop at the next good moment."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def awaited(at_once: Callable[[], None] | None = None) -> Iterator[Callable[[], int]]:
    """Gives a function that tells the number of the stop signal that has come, 0 if none.

    Args:
        at_once: what is done as soon as one comes.
    """
    received = 0

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        if at_once is not None:
            at_once()

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
