"""Memory that processes share, lent to one batch after another: its pages take longer to get than to write."""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KEPT = 4  # blocks that nobody uses here; and those that a worker has mapped

_lock = threading.Lock()
_numbers = itertools.count()
_free: deque[SharedPixels] = deque(maxlen=KEPT)
_mapped: OrderedDict[int, Tensor] = OrderedDict()  # in a worker: blocks by number


class UnknownBlockError(Exception):
    """A worker was told the number of a block that it has not got, or not kept."""


@dataclass(frozen=True)
class SharedPixels:
    """An array of images that several processes write to.

    Attributes:
        shape: count, channels, size, size.
        number: of the block, in the process that lends it.
        block: uint8, at least as long; it ends with its last reference, in whatever process. None where it is only
            told of: to send it takes a millisecond, a photograph two or three.
        lent: how often the block has been lent before.
    """

    shape: tuple[int, int, int, int]
    number: int
    block: Tensor | None
    lent: int = 0

    def rows(self, rows: slice) -> Tensor:
        """Some of them, uint8 (rows, channels, size, size).

        Raises:
            UnknownBlockError: in a worker, which has not got the block.
        """
        if (block := self.block if self.block is not None else _mapped.get(self.number)) is None:
            raise UnknownBlockError(self.number)
        size = math.prod(self.shape[1:])
        return block[rows.start * size : rows.stop * size].view(-1, *self.shape[1:])

    def to_send(self) -> SharedPixels:
        """Without the block, once the workers should have it."""
        return replace(self, block=None) if self.lent else self

    def give_back(self) -> None:
        """The next one who asks has the block; nobody may write there any more."""
        with _lock:
            _free.append(replace(self, lent=self.lent + 1))

    def keep_mapped(self) -> None:
        """In a worker: from now on it can be told of."""
        if self.block is not None:
            _mapped[self.number] = self.block
            while len(_mapped) > KEPT:
                _mapped.popitem(last=False)


def lend(shape: tuple[int, int, int, int]) -> SharedPixels:
    """Room for so many images."""
    size = math.prod(shape)
    with _lock:
        for place, free in enumerate(_free):
            assert free.block is not None
            if len(free.block) >= size:
                del _free[place]
                return replace(free, shape=shape)
        number = next(_numbers)
    return SharedPixels(shape, number, torch.empty(size, dtype=torch.uint8).share_memory_())
