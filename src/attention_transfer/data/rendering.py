"""What shows images: views and clean ones, of arrays in memory or of files, by row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from attention_transfer.data import views
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.image_files import Shape
from attention_transfer.data.views import ViewRecipe

Render = Callable[[np.ndarray, int], Tensor]
"""Rows of a set of images and a view number to normalised views (batch, channels, size, size)."""


def views_of(recipe: ViewRecipe, pixels: np.ndarray | FilePixels, examples: np.ndarray) -> Render:
    """Gives views of images by row.

    Images in memory are cropped and flipped as one batch; files, and whatever RandAugment is asked for, one by one
    by Pillow in other processes.

    Args:
        pixels: uint8 (count, channels, size, size).
        examples: int64 (count,), the images' numbers in their data set.
    """
    if isinstance(pixels, np.ndarray) and recipe.rand_augment is None:
        return lambda rows, view: views.render(recipe, pixels[rows], examples[rows], view)
    from attention_transfer.data import workers

    def render(rows: np.ndarray, view: int) -> Tensor:
        if isinstance(pixels, np.ndarray):
            size = pixels.shape[-1]
            pictures, shape = list(pixels[rows]), Shape(pixels.shape[1], resize=size, size=size)
        else:
            pictures, shape = pixels.entries(rows), pixels.form
        drawn = workers.render(pictures, shape, recipe, examples[rows], view)
        return views.erase(recipe, views.normalise(recipe, drawn), examples[rows], view)

    return render
