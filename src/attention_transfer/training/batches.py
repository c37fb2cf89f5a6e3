"""Which images a step sees: functions of seed, epoch and step alone."""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np
from torch import Tensor


class Render(Protocol):
    """Views of images by row."""

    def __call__(self, rows: np.ndarray, view: int) -> Tensor:
        """Rows of the training images and a view number to normalised images (batch, channels, size, size)."""

    def begin(self, rows: np.ndarray, view: int) -> None:
        """Says that these will be asked for soon; what they are does not depend on it."""


class Images(Protocol):
    """Labelled images, of which every view number shows each in another way."""

    @property
    def examples(self) -> np.ndarray:
        """int64 (count,): the images' numbers in their data set."""

    def __len__(self) -> int: ...

    def partners(self, view: int) -> np.ndarray | None:
        """int64 (count,): with which row each row is mixed in this view; None if with none."""

    def render(self, rows: np.ndarray, view: int) -> Tensor:
        """(batch, channels, size, size)."""

    def begin(self, rows: np.ndarray, view: int) -> None:
        """Says that these will be rendered soon; what they are does not depend on it."""

    def targets(self, rows: np.ndarray, view: int) -> Tensor:
        """Labels (batch,), or the classes' shares (batch, classes)."""


@functools.lru_cache(maxsize=2)
def order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's examples: a function of seed and epoch alone, the same for every method."""
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(count)


def paired(rows: np.ndarray, partners: np.ndarray) -> np.ndarray:
    """The same rows with each beside its partner, at the place of the first of the two: pairs stay in a batch.

    Args:
        rows: int64 (count,), a permutation.
        partners: int64 (count,), a pairing; a row without a partner is its own, and comes last.
    """
    place = np.empty(len(rows), np.int64)
    place[rows] = np.arange(len(rows))
    single = partners == np.arange(len(rows))
    first = np.where(single, len(rows), np.minimum(place, place[partners]))
    return np.lexsort((place, first))
