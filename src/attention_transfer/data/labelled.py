"""The labelled images as students see them: views, mixed where the study asks for it, with their targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attention_transfer.data import mixing
from attention_transfer.data.rendering import Render


@dataclass(frozen=True)
class LabelledViews:
    """Views of a fixed set of images, by row of the set and view number.

    Attributes:
        single: gives views of single images.
        mixing: how two of them become one; None for not at all.
        labels: int64 (count,).
        examples: int64 (count,), the images' numbers in their data set.
        classes: number of classes.
        device: where batches go.
    """

    single: Render
    mixing: mixing.Mixing | None
    labels: np.ndarray
    examples: np.ndarray
    classes: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.examples)

    def partners(self, view: int) -> np.ndarray | None:
        """int64 (count,): the row with which each row is mixed in this view; None without mixing."""
        return None if self.mixing is None else mixing.draw(self.mixing, view).partners

    def render(self, rows: np.ndarray, view: int) -> Tensor:
        """Normalised views (batch, channels, size, size); each single view is rendered once."""
        if self.mixing is None:
            return self.single(rows, view).to(self.device)
        mix = mixing.draw(self.mixing, view)
        needed, places = self._needed(rows, view)
        rendered = self.single(needed, view)
        own, other = rendered[places[: len(rows)]], rendered[places[len(rows) :]]
        return mixing.mix(mix, rows, own, other).to(self.device)

    def begin(self, rows: np.ndarray, view: int) -> None:
        """Says that these will be asked for soon; what they are does not depend on it."""
        self.single.begin(rows if self.mixing is None else self._needed(rows, view)[0], view)

    def _needed(self, rows: np.ndarray, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows whose single views these are mixed from, and places in them: of the rows, then of their partners."""
        assert self.mixing is not None
        partners = mixing.draw(self.mixing, view).partners[rows]
        return np.unique(np.concatenate([rows, partners]), return_inverse=True)

    def targets(self, rows: np.ndarray, view: int) -> Tensor:
        """Labels (batch,) int64; of mixed views the classes' shares, float32 (batch, classes)."""
        own = torch.from_numpy(self.labels[rows])
        if self.mixing is None:
            return own.to(self.device)
        mix = mixing.draw(self.mixing, view)
        other = torch.from_numpy(self.labels[mix.partners[rows]])
        shares = torch.from_numpy(mix.shares[rows])[:, None]
        mixed = torch.zeros(len(rows), self.classes).scatter_add_(1, own[:, None], shares)
        return mixed.scatter_add_(1, other[:, None], 1 - shares).to(self.device)
