"""What shows images: views and clean ones, of arrays in memory or of files, by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from attention_transfer.data import views
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.image_files import Shape
from attention_transfer.data.views import CLEAN, ViewRecipe

if TYPE_CHECKING:
    from attention_transfer.data.workers import Begun

AHEAD = 2  # batches that processes may be at, or have done: the one that is waited for, and the next


class Render(Protocol):
    """Gives views of images by row."""

    def __call__(self, rows: np.ndarray, view: int) -> Tensor:
        """Rows of a set of images and a view number, or CLEAN, to normalised views (batch, channels, size, size)."""

    def begin(self, rows: np.ndarray, view: int) -> None:
        """Says that these will be asked for soon; what they are does not depend on it."""


@dataclass(frozen=True)
class CleanImages:
    """Gives normalised images, without augmentation, by row: (batch, channels, size, size)."""

    render: Render
    device: torch.device

    def __call__(self, rows: np.ndarray) -> Tensor:
        return self.render(rows, CLEAN).to(self.device)

    def begin(self, rows: np.ndarray) -> None:
        """Says that these will be asked for soon: those of files are decoded meanwhile."""
        self.render.begin(rows, CLEAN)


def clean_images(recipe: ViewRecipe, pixels: np.ndarray | FilePixels, device: torch.device) -> CleanImages:
    """Gives the images themselves, normalised as the recipe's views are."""
    numbers = np.arange(len(pixels))  # on which clean images do not depend
    if isinstance(pixels, np.ndarray):
        return CleanImages(_InMemory(recipe, pixels, numbers), device)
    return CleanImages(_ByWorkers(recipe, pixels, numbers), device)


def views_of(recipe: ViewRecipe, pixels: np.ndarray | FilePixels, examples: np.ndarray) -> Render:
    """Gives views of images by row.

    Images in memory are cropped and flipped as one batch; files, and whatever RandAugment is asked for, one by one
    by Pillow in other processes.

    Args:
        pixels: uint8 (count, channels, size, size).
        examples: int64 (count,), the images' numbers in their data set.
    """
    if isinstance(pixels, np.ndarray) and recipe.rand_augment is None:
        return _InMemory(recipe, pixels, examples)
    return _ByWorkers(recipe, pixels, examples)


class _InMemory:
    def __init__(self, recipe: ViewRecipe, pixels: np.ndarray, examples: np.ndarray) -> None:
        self.recipe, self.pixels, self.examples = recipe, pixels, examples

    def __call__(self, rows: np.ndarray, view: int) -> Tensor:
        return views.render(self.recipe, self.pixels[rows], self.examples[rows], view)

    def begin(self, rows: np.ndarray, view: int) -> None:
        """Nothing: nobody else works on them."""


class _ByWorkers:
    """Asked by one thread at a time."""

    def __init__(self, recipe: ViewRecipe, pixels: np.ndarray | FilePixels, examples: np.ndarray) -> None:
        self.recipe, self.pixels, self.examples = recipe, pixels, examples
        self._begun: dict[tuple[bytes, int], Begun] = {}

    def __call__(self, rows: np.ndarray, view: int) -> Tensor:
        begun = self._begun.pop((rows.tobytes(), view), None) or self._begin(rows, view)
        normalised = torch.empty(len(rows), *self.pixels.shape[1:])
        for part, drawn in begun.shares():
            views.normalise(self.recipe, drawn, into=normalised[part])
        return (
            normalised if view == CLEAN else views.erase(self.recipe, normalised, self.examples[rows], view)
        )

    def begin(self, rows: np.ndarray, view: int) -> None:
        """Has the processes work on them while this one is at something else; the oldest of too many are dropped."""
        key = rows.tobytes(), view
        if key not in self._begun:
            self._begun[key] = self._begin(rows, view)
        while len(self._begun) > AHEAD:
            self._begun.pop(next(iter(self._begun))).drop()

    def _begin(self, rows: np.ndarray, view: int) -> Begun:
        from attention_transfer.data import workers

        if isinstance(self.pixels, np.ndarray):
            size = self.pixels.shape[-1]
            pictures, shape = list(self.pixels[rows]), Shape(self.pixels.shape[1], resize=size, size=size)
        else:
            pictures, shape = self.pixels.entries(rows), self.pixels.form
        return workers.begin(pictures, shape, self.recipe, self.examples[rows], view)
