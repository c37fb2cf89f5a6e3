"""Image corruptions as pure functions: every random number comes in as an array.

After ImageNet-C (Hendrycks & Dietterich, 2019, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations") and MNIST-C (Mu & Gilmer, 2019); where a function differs from them,
its docstring says how. `images` is float32 of shape (N, C, S, S) in [0, 1]; the result has the same
shape and may leave [0, 1], the caller clips. Lengths are in units of the image side S, so that a
strength means the same picture at 28 and at 224 pixels. All work on a whole batch at once.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import fft, signal, special

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
GREY_LEVELS = 256


def impulse_noise(images: np.ndarray, uniform: np.ndarray, amount: float) -> np.ndarray:
    """Salt and pepper: a share `amount` of the values turns black or white, half each.

    Args:
        images: (N, C, S, S).
        uniform: random in [0, 1), shape of `images`.
        amount: share of the values that is replaced.
    """
    return np.where(uniform < amount / 2, 0, np.where(uniform >= 1 - amount / 2, 1, images))


def shot_noise(images: np.ndarray, uniform: np.ndarray, photons: float) -> np.ndarray:
    """Counting noise: a value v becomes Poisson(photons * v) / photons.

    The count is the Poisson quantile of `uniform`: one random number for each value, so that an
    image's noise does not depend on how many numbers the images before it used up.

    Args:
        images: (N, C, S, S), multiples of 1/255.
        uniform: random in [0, 1), shape of `images`.
        photons: mean count of a white pixel; fewer are noisier.
    """
    counts = np.arange(math.ceil(photons + 10 * math.sqrt(photons) + 10))
    grey = np.arange(GREY_LEVELS)
    cumulative = special.pdtr(counts, photons * grey[:, None] / (GREY_LEVELS - 1))
    cumulative[:, -1] = 1
    # Row g is shifted to [g, g + 1], which makes one sorted table and one search of all of them.
    level = np.rint(images * (GREY_LEVELS - 1)).astype(np.int64)
    position = np.searchsorted(
        (cumulative + grey[:, None]).ravel(), uniform.astype(np.float64) + level, "right"
    )
    return (position - level * len(counts)) / np.float32(photons)


def defocus_blur(images: np.ndarray, radius: float) -> np.ndarray:
    """Convolution with a disk of `radius` image sides."""
    pixels = radius * images.shape[-1]
    steps = np.linspace(-pixels, pixels, 2 * max(16, math.ceil(4 * pixels)) + 1)
    rows, columns = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
    inside = np.hypot(rows, columns) <= pixels
    return _convolve(images, _kernels(rows[None, inside], columns[None, inside]))


def motion_blur(images: np.ndarray, length: float, degrees: np.ndarray) -> np.ndarray:
    """Convolution with a straight line of `length` image sides.

    ImageNet-C's line is one-sided and fades out; this one is centred and even, so it does not shift
    the image.

    Args:
        images: (N, C, S, S).
        length: of the line, in image sides.
        degrees: (N,), direction of the line; 0 is horizontal, 90 vertical.
    """
    pixels = length * images.shape[-1]
    steps = np.linspace(-pixels / 2, pixels / 2, 2 * math.ceil(pixels) + 1)
    angle = np.radians(degrees.astype(np.float64))[:, None]
    return _convolve(images, _kernels(-np.sin(angle) * steps, np.cos(angle) * steps))


def zoom_blur(images: np.ndarray, zoom: float) -> np.ndarray:
    """Mean of the image enlarged about its centre by factors evenly spaced from 1 to `zoom`."""
    side = images.shape[-1]
    factors = np.linspace(1, zoom, 2 + math.ceil(side * (zoom - 1) / 2))  # steps of a pixel at most
    centre = (side - 1) / 2
    total = np.zeros_like(images)
    for factor in factors:
        positions = centre + (np.arange(side) - centre) / factor
        total += _interpolate(_interpolate(images, positions, axis=-2), positions, axis=-1)
    return total / len(factors)


def fog(images: np.ndarray, white: np.ndarray, density: float, decay: float) -> np.ndarray:
    """White plasma clouds: (image + density * clouds) / (1 + density), with clouds from 0 to 1.

    ImageNet-C draws the clouds by diamond-square; here they are noise with the power law that this
    algorithm approximates. White is 1 for every image, where ImageNet-C takes the image's maximum.

    Args:
        images: (N, C, S, S).
        white: standard normal, (N, S, S).
        density: weight of the clouds.
        decay: factor by which the clouds' detail weakens when its scale halves.
    """
    clouds = random_field(white, lambda cycles: cycles ** -(1 + math.log2(decay)))
    low, high = (extreme(clouds, axis=(-2, -1), keepdims=True) for extreme in (np.min, np.max))
    clouds = ((clouds - low) / (high - low)).astype(np.float32)
    return (images + density * clouds[:, None]) / (1 + density)


def snow(
    images: np.ndarray, white: np.ndarray, degrees: np.ndarray, cover: float, whiten: float
) -> np.ndarray:
    """Falling flakes, streaked by their motion, over a scene that turns paler.

    Args:
        images: (N, C, S, S).
        white: standard normal, (N, S, S).
        degrees: (N,), direction in which the flakes fall; 90 is vertical.
        cover: share of the image that flakes cover, before their motion streaks them.
        whiten: weight of the paler scene.
    """
    size = 0.018  # standard deviation of a flake in image sides: half a pixel of 28
    flakes = random_field(white, lambda cycles: np.exp(-2 * (math.pi * size * cycles) ** 2))
    flakes = np.clip(2 * (flakes - special.ndtri(1 - cover)), 0, 1).astype(np.float32)[:, None]
    pale = np.maximum(images, 1.5 * luma(images) + 0.5)
    return (1 - whiten) * images + whiten * pale + 1.5 * motion_blur(flakes, 0.09, degrees)


def brightness(images: np.ndarray, amount: float) -> np.ndarray:
    """Adds `amount` to the value of HSV (the largest channel), at the same hue and saturation."""
    value = images.max(axis=1, keepdims=True)
    raised = np.minimum(value + amount, 1)
    dark = value == 0
    return np.where(dark, raised, images * (raised / np.where(dark, 1, value)))


def contrast(images: np.ndarray, factor: float) -> np.ndarray:
    """Scales the distance from each image's and channel's mean by `factor`."""
    mean = images.mean(axis=(-2, -1), keepdims=True)
    return (images - mean) * factor + mean


def pixelate(images: np.ndarray, ratio: float) -> np.ndarray:
    """Averages over square cells, `ratio` * S of them on a side.

    A ratio as in ImageNet-C, not a length in image sides: like noise, it acts on pixels.
    """
    side = images.shape[-1]
    cells = max(1, round(ratio * side))
    edges = np.linspace(0, side, cells + 1)
    pixels = np.arange(side)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    average = np.clip(overlap, 0, None) * cells / side
    enlarge = ((pixels + 0.5) * cells / side).astype(np.int64)
    blocks = average[enlarge].astype(np.float32)
    return blocks @ images @ blocks.T


def jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    """Compresses and expands each image with libjpeg, colour subsampled 4:2:0."""
    pixels = np.rint(images * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    expanded = np.empty_like(pixels)
    for index, image in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            buffer, "JPEG", quality=quality, subsampling="4:2:0"
        )
        with Image.open(buffer) as decoded:
            expanded[index] = np.asarray(decoded).reshape(image.shape)
    return expanded.transpose(0, 3, 1, 2) / np.float32(255)


def elastic(images: np.ndarray, white: np.ndarray, shift: float) -> np.ndarray:
    """Moves every pixel by a smooth random field; mirrored at the border (Simard et al., 2003).

    Only the field of ImageNet-C's elastic transform, without its random affine map: rotation and
    translation are shifts of their own here.

    Args:
        images: (N, C, S, S).
        white: standard normal, (N, 2, S, S), for rows and columns.
        shift: root mean square of the displacement along each axis, in image sides.
    """
    side = images.shape[-1]
    smoothness = 0.07  # standard deviation of the smoothing Gaussian, in image sides
    field = random_field(white, lambda cycles: np.exp(-2 * (math.pi * smoothness * cycles) ** 2))
    places = np.arange(side) + np.zeros((side, 1))
    rows, columns = (
        _mirror(base + shift * side * field[:, axis], side) for axis, base in enumerate((places.T, places))
    )
    return warp(images, rows, columns)


def rotate(images: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Turns image n anticlockwise about its centre by `degrees[n]`; what comes in is black."""
    side = images.shape[-1]
    places = np.arange(side) - (side - 1) / 2
    angle = np.radians(degrees.astype(np.float64))[:, None, None]
    rows = np.cos(angle) * places[:, None] + np.sin(angle) * places
    columns = np.cos(angle) * places - np.sin(angle) * places[:, None]
    return warp(images, rows + (side - 1) / 2, columns + (side - 1) / 2)


def translate(images: np.ndarray, distance: float, degrees: np.ndarray) -> np.ndarray:
    """Moves image n by `distance` image sides towards `degrees[n]` (0 right, 90 up); black comes in."""
    side = images.shape[-1]
    angle = np.radians(degrees.astype(np.float64))[:, None, None]
    places = np.arange(side) + np.zeros((side, 1))
    rows = places.T + distance * side * np.sin(angle)
    columns = places - distance * side * np.cos(angle)
    return warp(images, rows, columns)


def luma(images: np.ndarray) -> np.ndarray:
    """Grey value of (N, 3, S, S) images, shape (N, 1, S, S); grey images are returned as they are."""
    return images if images.shape[1] == 1 else np.einsum("nchw,c->nhw", images, LUMA)[:, None]


def resize(images: np.ndarray, side: int) -> np.ndarray:
    """Bilinear resize of (N, C, S, S) to (N, C, side, side): pixel centres at half-integers, no smoothing."""
    old = images.shape[-1]
    positions = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
    return _interpolate(_interpolate(images, positions, axis=-2), positions, axis=-1)


def warp(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Reads images bilinearly at given places; all outside is black.

    Args:
        images: (N, C, S, S).
        rows, columns: (N, S, S), in pixels from 0 to S - 1; pixel (i, j) of the result is read there.
    """
    number, channels, side, _ = images.shape
    framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    flat = framed.reshape(number, channels, -1)
    rows, columns = (np.clip(places + 1, 0, side + 1) for places in (rows, columns))
    top, left = (np.minimum(places.astype(np.int64), side) for places in (rows, columns))
    down, right = ((a - b).astype(np.float32)[:, None] for a, b in ((rows, top), (columns, left)))
    start = (top * (side + 2) + left).reshape(number, 1, -1)

    def read(offset: int) -> np.ndarray:
        return np.take_along_axis(flat, start + offset, axis=-1).reshape(images.shape)

    upper = read(0) * (1 - right) + read(1) * right
    lower = read(side + 2) * (1 - right) + read(side + 3) * right
    return upper * (1 - down) + lower * down


def random_field(white: np.ndarray, amplitude: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Periodic Gaussian noise of mean 0 and expected variance 1 with a given spectrum.

    Args:
        white: standard normal, (..., S, S).
        amplitude: relative amplitude at a frequency in cycles per image side.

    Returns:
        float64, shape of `white`.
    """
    side = white.shape[-1]
    cycles = fft.fftfreq(side, 1 / side)
    frequency = np.hypot(cycles[:, None], cycles)
    frequency[0, 0] = 1
    spectrum = amplitude(frequency)
    spectrum[0, 0] = 0
    spectrum /= np.sqrt(np.mean(spectrum**2))
    # In double precision the rounding that depends on the batch stays far below one grey level.
    transformed = fft.rfft2(white.astype(np.float64)) * spectrum[:, : side // 2 + 1]
    return np.asarray(fft.irfft2(transformed, s=(side, side)))


def _kernels(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Kernels (N, 1, K, K) that average over points (N, P) given in pixels from the centre.

    Each point spreads over its four neighbours as in bilinear interpolation, so that strokes shorter
    than a pixel still blur.
    """
    reach = math.ceil(max(np.abs(rows).max(), np.abs(columns).max()))
    grid = np.arange(-reach, reach + 1)
    vertical = np.clip(1 - np.abs(grid[:, None] - rows[:, None, :]), 0, None)
    horizontal = np.clip(1 - np.abs(columns[:, :, None] - grid), 0, None)
    return ((vertical @ horizontal) / rows.shape[1])[:, None]


def _convolve(images: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Images (N, C, S, S) with kernels (N or 1, 1, K, K), K odd; mirrored at the border."""
    reach = kernels.shape[-1] // 2
    padded = np.pad(images, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="symmetric")
    blurred = signal.fftconvolve(padded.astype(np.float64), kernels, mode="valid", axes=(-2, -1))
    return blurred.astype(np.float32)


def _interpolate(images: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation along one axis at `positions`, in pixels from 0 to S - 1."""
    first = np.clip(positions.astype(np.int64), 0, images.shape[axis] - 2)
    weight = np.expand_dims((positions - first).astype(np.float32), tuple(range(1, -axis)))
    return images.take(first, axis) * (1 - weight) + images.take(first + 1, axis) * weight


def _mirror(places: np.ndarray, side: int) -> np.ndarray:
    """Folds places in pixels back into [0, side - 1], mirrored at the centres of the border pixels."""
    period = 2 * (side - 1)
    return (side - 1) - np.abs(np.mod(places, period) - (side - 1))
