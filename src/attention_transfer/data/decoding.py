"""Single images through Pillow: decoded, augmented at their own resolution, brought to the study's size.

The view contract holds here too: what a view shows is a function of (data set, image, view, seed). Crops and flips
come from the counters of `views`; timm's RandAugment, which draws from the global generators of `random` and NumPy,
runs in processes that do nothing else, seeded anew for every view.
"""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from attention_transfer.data import views
from attention_transfer.data.image_files import Entry, Shape
from attention_transfer.data.views import CLEAN, ViewRecipe
from attention_transfer.errors import StudyError

TRIES = 10  # of a crop that fits into the image, as in torchvision; then the largest central one
_NUMBERS = (
    2 * TRIES + 5
)  # uniform numbers that a view takes: area and ratio a try, place, flip, seed of RandAugment
TRANSLATE = 0.45  # of the image's side: RandAugment's largest shift, as timm sets it


Picture = Entry | np.ndarray
"""An image's file, or its pixels, uint8 (channels, size, size)."""


def render(
    pictures: Sequence[Picture],
    shape: Shape,
    recipe: ViewRecipe | None,
    examples: np.ndarray,
    view: int,
    *,
    pixels: np.ndarray,
) -> None:
    """Views, or clean images, one after another.

    Args:
        recipe: of the views; None where `view` is CLEAN.
        examples: int64 (count,), the images' numbers in their data set.
        pixels: uint8 (count, channels, size, size), where they go.

    Raises:
        StudyError: a file has changed or cannot be decoded.
    """
    if recipe is None or view == CLEAN:
        for row, picture in enumerate(pictures):
            pixels[row] = _array(clean(opened(picture, shape), shape))
        return
    numbers = views.uniforms(recipe.key, examples, view, _NUMBERS, skip=views.SKIPPED["picture"])
    for row, (picture, drawn) in enumerate(zip(pictures, numbers.tolist(), strict=True)):
        image = crop_and_flip(opened(picture, shape), recipe, shape.size, drawn)
        if recipe.rand_augment is not None:
            image = augmented(image, recipe, shape, drawn[-2:])
        pixels[row] = _array(image)


def opened(picture: Picture, shape: Shape) -> Image.Image:
    """Decoded, with the channels of the study."""
    if isinstance(picture, np.ndarray):
        return Image.fromarray(
            picture[0] if shape.channels == 1 else np.ascontiguousarray(picture.transpose(1, 2, 0))
        )
    try:
        with Image.open(io.BytesIO(picture.read())) as image:
            image.load()
            # Pillow would copy what has these channels already.
            return image if image.mode == shape.mode else image.convert(shape.mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StudyError(
            f"cannot be decoded: {error}", where=picture.where, remedy="replace or remove this file"
        ) from error


def clean(image: Image.Image, shape: Shape) -> Image.Image:
    """Shorter side to `resize`, then the centre, as torchvision's Resize and CenterCrop, bicubic."""
    width, height = image.size
    if min(width, height) != shape.resize:
        # torchvision cuts the longer side to whole pixels.
        larger = int(shape.resize * max(width, height) / min(width, height))
        sides = (shape.resize, larger) if width <= height else (larger, shape.resize)
        image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (round((side - shape.size) / 2.0) for side in image.size)
    return image.crop((left, top, left + shape.size, top + shape.size))


def crop_and_flip(image: Image.Image, recipe: ViewRecipe, size: int, drawn: list[float]) -> Image.Image:
    """Random resized crop, bicubic, and horizontal flip (Szegedy et al. 2015; torchvision's rule).

    Args:
        drawn: uniform numbers of this view.
    """
    box = crop_box(image.size, recipe, drawn)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn[2 * TRIES + 2] < recipe.flip else image


def crop_box(sides: tuple[int, int], recipe: ViewRecipe, drawn: list[float]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom: the first of ten random rectangles that fits into the image, else the centre."""
    width, height = sides
    smallest, largest = recipe.crop_scale
    low, high = recipe.crop_ratio
    across, down = drawn[2 * TRIES : 2 * TRIES + 2]
    for area, ratio in zip(drawn[0 : 2 * TRIES : 2], drawn[1 : 2 * TRIES : 2], strict=True):
        wanted = width * height * (smallest + area * (largest - smallest))
        chosen = low * (high / low) ** ratio  # uniform in its logarithm
        w, h = round((wanted * chosen) ** 0.5), round((wanted / chosen) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width < low * height:
        h = round(width / low)
    elif width > high * height:
        w = round(height * high)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def augmented(image: Image.Image, recipe: ViewRecipe, shape: Shape, drawn: list[float]) -> Image.Image:
    """RandAugment by timm, seeded by this view's numbers; grey images are augmented as colour ones."""
    assert recipe.rand_augment is not None
    seed = (int(drawn[0] * 2**24) << 24) | int(drawn[1] * 2**24)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (timm draws from this one)
    policy = rand_augment(recipe.rand_augment, recipe.mean, shape.size)
    return policy(image.convert("RGB")).convert(shape.mode)


@functools.cache
def rand_augment(policy: str, mean: tuple[float, ...], size: int) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment with the settings that its training transform gives it.

    Raises:
        ValueError: timm does not know what the policy says.
    """
    from timm.data.auto_augment import rand_augment_transform  # 3 s, and few studies need it

    colours = mean if len(mean) == 3 else mean * 3
    settings = {
        "translate_const": int(size * TRANSLATE),
        "img_mean": tuple(min(255, round(255 * value)) for value in colours),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        transform = rand_augment_transform(policy, settings)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm does not know the policy {policy!r}: {error}") from error
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = functools.partial(_posterized, operation.aug_fn)
    return transform


def _posterized(timms: Callable[..., Image.Image], image: Image.Image, bits: int, **more: Any) -> Image.Image:
    """At the largest magnitude timm keeps no bits of a pixel; Pillow from 13 on refuses what used to be black."""
    return Image.new(image.mode, image.size) if bits == 0 else timms(image, bits, **more)


def _array(image: Image.Image) -> np.ndarray:
    """uint8 (channels, height, width)."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
