"""Distribution shifts: the corruptions by name and severity, and digits as out-of-distribution set.

Random numbers. Each draw of a corruption (its noise, its angles) has a stream of its own, keyed by
(seed, shift, severity, which draw) and read image after image. So the random numbers of image j depend
on these and on j, its position in the fixed subset of test images (and on the image's shape), but not on
what the images show, nor on how many follow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from attention_transfer.config import SHIFTS
from attention_transfer.data import corruptions
from attention_transfer.errors import StudyError

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 16
BLOCK_VALUES = 2**20
"""Numbers that are corrupted at once: bounds the memory, does not change the result."""


class Draws:
    """Independent streams of random numbers for one (seed, shift, severity)."""

    def __init__(self, seed: int, name: str, severity: int) -> None:
        self._key = f"{seed}/{name}/{severity}"
        self._streams: dict[str, np.random.Generator] = {}

    def normal(self, draw: str, *shape: int) -> np.ndarray:
        """The next standard normal numbers of the stream `draw`, float32."""
        return self._stream(draw).standard_normal(shape, dtype=np.float32)

    def uniform(self, draw: str, *shape: int) -> np.ndarray:
        """The next numbers of the stream `draw`, uniform in [0, 1), float32."""
        return self._stream(draw).random(shape, dtype=np.float32)

    def _stream(self, draw: str) -> np.random.Generator:
        if draw not in self._streams:
            digest = hashlib.blake2b(f"{self._key}/{draw}".encode(), digest_size=16).digest()
            self._streams[draw] = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        return self._streams[draw]


@dataclass(frozen=True)
class _Corruption:
    """A corruption and its strengths at severities 1 to 5."""

    apply: Callable[[np.ndarray, Draws, Any], np.ndarray]
    """Takes images, float32 of shape (N, C, S, S) in [0, 1], draws, and a strength."""
    strengths: tuple[Any, Any, Any, Any, Any]


def _plane(images: np.ndarray) -> tuple[int, int, int]:
    """(N, S, S): the shape of noise that the channels share."""
    number, _, side, _ = images.shape
    return number, side, side


_CORRUPTIONS: dict[str, _Corruption] = {
    "gaussian_noise": _Corruption(
        lambda x, draws, sigma: x + sigma * draws.normal("noise", *x.shape),
        (0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "shot_noise": _Corruption(
        lambda x, draws, photons: corruptions.shot_noise(x, draws.uniform("noise", *x.shape), photons),
        (60, 25, 12, 5, 3),
    ),
    "impulse_noise": _Corruption(
        lambda x, draws, amount: corruptions.impulse_noise(x, draws.uniform("noise", *x.shape), amount),
        (0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    "defocus_blur": _Corruption(
        lambda x, _, radius: corruptions.defocus_blur(x, radius),
        (0.02, 0.03, 0.042, 0.056, 0.075),
    ),
    "motion_blur": _Corruption(
        lambda x, draws, length: corruptions.motion_blur(x, length, 90 * draws.uniform("angle", len(x)) - 45),
        (0.08, 0.12, 0.17, 0.23, 0.30),
    ),
    "zoom_blur": _Corruption(
        lambda x, _, zoom: corruptions.zoom_blur(x, zoom),
        (1.11, 1.17, 1.24, 1.33, 1.45),
    ),
    "fog": _Corruption(
        lambda x, draws, strength: corruptions.fog(x, draws.normal("clouds", *_plane(x)), *strength),
        ((0.4, 2.0), (0.7, 2.0), (1.0, 1.8), (1.4, 1.7), (1.9, 1.6)),  # density, decay
    ),
    "snow": _Corruption(
        lambda x, draws, strength: corruptions.snow(
            x, draws.normal("flakes", *_plane(x)), 90 * draws.uniform("angle", len(x)) + 45, *strength
        ),
        ((0.03, 0.05), (0.05, 0.08), (0.08, 0.12), (0.11, 0.16), (0.15, 0.2)),  # cover, whiten
    ),
    "brightness": _Corruption(
        lambda x, _, amount: corruptions.brightness(x, amount),
        (0.1, 0.2, 0.3, 0.4, 0.5),
    ),
    "contrast": _Corruption(
        lambda x, _, factor: corruptions.contrast(x, factor),
        (0.6, 0.45, 0.3, 0.2, 0.1),
    ),
    "pixelate": _Corruption(
        lambda x, _, ratio: corruptions.pixelate(x, ratio),
        (0.7, 0.5, 0.4, 0.32, 0.25),
    ),
    "jpeg": _Corruption(
        lambda x, _, quality: corruptions.jpeg(x, quality),
        (25, 18, 15, 10, 7),
    ),
    "elastic": _Corruption(
        lambda x, draws, shift: corruptions.elastic(
            x, draws.normal("field", len(x), 2, *x.shape[-2:]), shift
        ),
        (0.01, 0.017, 0.024, 0.032, 0.04),
    ),
    "rotate": _Corruption(
        lambda x, draws, degrees: corruptions.rotate(
            x, np.where(draws.uniform("side", len(x)) < 0.5, -degrees, degrees)
        ),
        (10, 18, 27, 38, 50),
    ),
    "translate": _Corruption(
        lambda x, draws, distance: corruptions.translate(
            x, distance, 360 * draws.uniform("direction", len(x))
        ),
        (0.05, 0.09, 0.14, 0.2, 0.27),
    ),
}


def corrupt(images: np.ndarray, name: str, severity: int, *, seed: int) -> np.ndarray:
    """Images under a distribution shift, in the style of ImageNet-C (Hendrycks & Dietterich, 2019).

    The same call gives the same bytes. Image j's random numbers depend only on (seed, name, severity, j)
    and the images' shape, so any leading part of the subset gets the same result.

    Args:
        images: uint8, (N, C, S, S), with C 1 or 3 and S from 16 up.
        name: one of `config.SHIFTS`.
        severity: 1 (mild) to 5 (strong).
        seed: of the random numbers.

    Returns:
        uint8, shape of `images`.

    Raises:
        StudyError: the shift or the severity is not known, or images are smaller than 16 pixels.
        ValueError: `images` has another dtype or shape.
    """
    if name not in _CORRUPTIONS:
        raise StudyError(
            f"unknown shift {name!r}", where="evaluation.shifts", remedy=f"choose from {', '.join(SHIFTS)}"
        )
    if severity not in SEVERITIES:
        raise StudyError(
            f"unknown severity {severity!r} of shift {name}",
            where="evaluation.severities",
            remedy=f"choose from {', '.join(map(str, SEVERITIES))}",
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected uint8 (N, 1 or 3, S, S), got {images.dtype} {images.shape}")
    side = images.shape[-1]
    if images.shape[-2] != side:
        raise ValueError(f"images: expected square ones, got {images.shape}")
    if side < SMALLEST_SIDE:
        raise StudyError(
            f"images of {side} pixels are too small for distribution shifts",
            where="data.image_size",
            remedy=f"use {SMALLEST_SIDE} pixels or more, or remove shifts from evaluation.sets",
        )
    corruption, draws = _CORRUPTIONS[name], Draws(seed, name, severity)
    block = max(1, BLOCK_VALUES // images[:1].size) if len(images) else 1
    result = np.empty_like(images)
    for start in range(0, len(images), block):
        clean = images[start : start + block].astype(np.float32) / 255
        shifted = corruption.apply(clean, draws, corruption.strengths[severity - 1])
        result[start : start + block] = _to_uint8(shifted)
    return result


def contact_sheet(
    image: np.ndarray, names: Sequence[str], severities: Sequence[int], seed: int
) -> np.ndarray:
    """One image under several shifts, for a figure.

    Args:
        image: uint8, (C, S, S).
        names: of shifts, one row each.
        severities: one column each.
        seed: of the random numbers.

    Returns:
        uint8, (1 + len(names), len(severities), C, S, S); the first row is the clean image, repeated.
    """
    if image.ndim != 3:
        raise ValueError(f"image: expected one image (C, S, S), got {image.shape}")
    clean = image[None]
    rows = [[clean[0]] * len(severities)]
    rows += [[corrupt(clean, name, severity, seed=seed)[0] for severity in severities] for name in names]
    return np.array(rows)


def digits(image_size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits of 8 x 8 pixels (UCI, as in scikit-learn), resized: images of no known class.

    Args:
        image_size: side S of the images, in pixels.
        channels: C; all channels are the same.

    Returns:
        images, uint8 (1797, C, S, S), and labels, int64 (1797,).
    """
    bunch = load_digits()
    images = corruptions.resize(bunch.images[:, None].astype(np.float32) / 16, image_size)
    return _to_uint8(images).repeat(channels, axis=1), bunch.target.astype(np.int64)


def _to_uint8(images: np.ndarray) -> np.ndarray:
    """Clipped and rounded. Ties, frequent in means of few pixels, go up whatever the last bits say."""
    return np.floor(np.clip(images, 0, 1) * 255 + (0.5 + 2**-12)).astype(np.uint8)
