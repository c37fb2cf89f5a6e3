"""Memory that processes share, lent to one batch after another: its pages take longer to get than to write."""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

KEPT = 4  # blocks that nobody uses here; and those that a worker has mapped

_lock = threading.Lock()
_free: deque[Tensor] = deque(maxlen=KEPT)
_mapped: deque[Tensor] = deque(maxlen=KEPT)


@dataclass(frozen=True)
class SharedPixels:
    """An array of images that several processes write to.

    Attributes:
        shape: count, channels, size, size.
        block: uint8, at least as long; it ends with its last reference, in whatever process.
    """

    shape: tuple[int, int, int, int]
    block: Tensor

    def rows(self, rows: slice) -> Tensor:
        """Some of them, uint8 (rows, channels, size, size)."""
        size = math.prod(self.shape[1:])
        return self.block[rows.start * size : rows.stop * size].view(-1, *self.shape[1:])

    def give_back(self) -> None:
        """The next one who asks has the block; nobody may write there any more."""
        with _lock:
            _free.append(self.block)

    def keep_mapped(self) -> None:
        """In a worker: when the same block comes again, it is not mapped again."""
        if all(self.block.data_ptr() != known.data_ptr() for known in _mapped):
            _mapped.append(self.block)


def lend(shape: tuple[int, int, int, int]) -> SharedPixels:
    """Room for so many images."""
    size = math.prod(shape)
    with _lock:
        for number, block in enumerate(_free):
            if len(block) >= size:
                del _free[number]
                return SharedPixels(shape, block)
    return SharedPixels(shape, torch.empty(size, dtype=torch.uint8).share_memory_())
