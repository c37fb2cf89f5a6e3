"""Images of random fractals: to pre-train on without natural images, labels or anybody's data.

Kataoka et al., Pre-training without Natural Images, ACCV 2020. There, images of one system are a class; a
masked autoencoder needs no classes, so here each image has a system of its own.
"""

from __future__ import annotations

import hashlib

import numpy as np
from tqdm import tqdm

from attention_transfer.data import function_systems
from attention_transfer.data.function_systems import FunctionSystems
from attention_transfer.data.views import uniforms

SMALLEST_SIZE = 8  # on fewer pixels nothing of a fractal is left
POINTS_PER_PIXEL = 16  # fewer make grain, more only time
WALKERS = 128  # points that walk at once, in one image
WARM_UP = 24  # steps until a walker's place does not tell where it started
CARDS = 256  # steps in which a map's probability is told
FRAME = 2.0  # standard deviations from the centre: leaves out far spikes, which would make the rest small
LOWEST_DIMENSION = 1.6  # of a figure that covers size^dimension pixels
BLOCK_POINTS = 2**19  # of all images at once: bounds the memory, does not change the result


def generate(count: int, *, size: int, channels: int, seed: int) -> np.ndarray:
    """Fractals that fill the frame, brighter where the chaos game comes more often.

    For a size, channel c of image i is a pure function of (seed, i, c). A candidate that covers too few
    pixels gives way to the next candidate of the same image.

    Args:
        count: number of images, at least 1.
        size: side of the images in pixels, at least `SMALLEST_SIZE`.
        channels: 1 or 3; they have one figure in different tones.
        seed: of all random numbers.

    Returns:
        uint8 (count, channels, size, size), black where no point fell; each channel reaches 255.

    Raises:
        ValueError: an argument is out of its range.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if size < SMALLEST_SIZE:
        raise ValueError(f"size: expected at least {SMALLEST_SIZE} pixels, got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    cards = deal(seed, size)
    images = np.empty((count, channels, size, size), np.uint8)
    block = max(1, BLOCK_POINTS // cards.size)
    with tqdm(total=count, desc="fractals", unit="image", mininterval=1.0, delay=2) as progress:
        for start in range(0, count, block):
            examples = np.arange(start, min(start + block, count))
            hits = _figures(examples, cards, size, seed)
            images[examples] = _shade(hits, uniforms(_key(seed, "tones"), examples, 0, channels))
            progress.update(len(examples))
    return images


def deal(seed: int, size: int) -> np.ndarray:
    """The cards that decide which map each walker takes at each step: int64 (steps, WALKERS), below `CARDS`.

    All images share them: the chaos game needs an order of maps that is random, not one that differs between
    images. In each image, every map has its own share of the cards.
    """
    steps = WARM_UP + -(-POINTS_PER_PIXEL * size**2 // WALKERS)
    return (CARDS * uniforms(_key(seed, "cards"), np.arange(steps), 0, WALKERS)).astype(np.int64)


def walk(systems: FunctionSystems, cards: np.ndarray) -> np.ndarray:
    """The chaos game: points of each system's attractor, as dense as its invariant measure.

    Barnsley, Fractals Everywhere, 1988. Every walker starts at the fixed point of its system's first map,
    which is on the attractor; so are all points that it comes to.

    Args:
        systems: of the images.
        cards: see `deal`.

    Returns:
        float64 (2, images, points), x and y.
    """
    ends = np.cumsum(systems.probabilities, axis=1)[:, None, :-1]
    of_card = (ends <= (np.arange(CARDS)[:, None] + 0.5) / CARDS).sum(axis=2)
    a, b, c = (np.take_along_axis(part, of_card, axis=1) for part in (systems.a, systems.b, systems.c))
    z = np.repeat(_fixed_point(systems)[:, None], WALKERS, axis=1)
    places = np.empty((2, len(systems), len(cards) - WARM_UP, WALKERS))
    for step, drawn in enumerate(cards, start=-WARM_UP):
        z = a.take(drawn, axis=1) * z + b.take(drawn, axis=1) * z.conj() + c.take(drawn, axis=1)
        if step >= 0:
            places[0, :, step], places[1, :, step] = z.real, z.imag
    return places.reshape(2, len(systems), -1)


def _fixed_point(systems: FunctionSystems) -> np.ndarray:
    """Of each first map: z = a z + b conj(z) + c and its conjugate, solved for z. Complex128 (images,)."""
    a, b, c = systems.a[:, 0], systems.b[:, 0], systems.c[:, 0]
    return np.asarray(((1 - a.conj()) * c + b * c.conj()) / (np.abs(1 - a) ** 2 - np.abs(b) ** 2))


def count_hits(places: np.ndarray, size: int) -> np.ndarray:
    """Points on each pixel of the frame: int64 (images, size, size).

    Along each axis by itself, the frame spans the points but leaves out those that are further than `FRAME`
    standard deviations from their mean.

    Args:
        places: (2, images, points), x and y; the array is overwritten.
        size: of the images.
    """
    centre, spread = places.mean(axis=-1, keepdims=True), FRAME * places.std(axis=-1, keepdims=True)
    low = np.maximum(places.min(axis=-1, keepdims=True), centre - spread)
    high = np.minimum(places.max(axis=-1, keepdims=True), centre + spread)
    # A margin of one pixel takes what lies outside. The furthest point itself is inside.
    places -= low
    places *= size * (1 - 1e-9) / np.where(high > low, high - low, 1)
    places += 1
    columns, rows = np.clip(places, 0, size + 1, out=places).astype(np.int64)
    images, side = places.shape[1], size + 2
    pixels = (np.arange(images)[:, None] * side + rows) * side + columns
    hits = np.bincount(pixels.ravel(), minlength=images * side**2).reshape(images, side, side)
    return hits[:, 1:-1, 1:-1]


def _figures(examples: np.ndarray, cards: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`count_hits` of each image's first candidate that is not degenerate."""
    figures = np.zeros((len(examples), size, size), np.int64)
    pending, attempt, key = np.arange(len(examples)), 0, _key(seed, "systems")
    while len(pending):
        systems = function_systems.draw(key, examples[pending], attempt)
        figures[pending] = hits = count_hits(walk(systems, cards), size)
        pending = pending[(hits > 0).sum(axis=(1, 2)) < size**LOWEST_DIMENSION]
        attempt += 1
    return figures


def _shade(hits: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """Grey values by the logarithm of hits, of which some pixels have a hundred times as many as others.

    Args:
        hits: (images, size, size).
        tones: (images, channels) in [0, 1); the gamma goes from 1/2 to 2.
    """
    light = np.log1p(hits) / np.log1p(hits.max(axis=(1, 2), keepdims=True))
    gamma = 2.0 ** (2 * tones.astype(np.float64) - 1)
    return np.asarray(np.rint(255 * light[:, None] ** gamma[:, :, None, None])).astype(np.uint8)


def _key(seed: int, purpose: str) -> int:
    """Root of the random numbers for one purpose."""
    return int.from_bytes(hashlib.sha256(f"fractals/{purpose}/{seed}".encode()).digest()[:8], "little")
