"""Where the object is, in images on a plain ground."""

from __future__ import annotations

import numpy as np

TOLERANCE = 25  # grey levels of 255: as much as compression and noise move a plain ground
PLAIN = 0.5  # of the pixels at the edge: with fewer of one colour there is no ground to tell


def objects(images: np.ndarray) -> np.ndarray:
    """What differs from the median colour of an image's edge by more than `TOLERANCE` in some channel.

    Args:
        images: uint8 (examples, channels, height, width).

    Returns:
        bool (examples, height, width); nowhere true for an image whose edge is not plain, nor for an empty one.
    """
    edge = np.concatenate(
        [images[:, :, 0], images[:, :, -1], images[:, :, 1:-1, 0], images[:, :, 1:-1, -1]], axis=2
    )
    ground = np.median(edge, axis=2)[:, :, None]
    plain = (np.abs(edge - ground) <= TOLERANCE).all(axis=1).mean(axis=1) >= PLAIN
    apart = np.abs(images - ground[..., None]) > TOLERANCE
    found: np.ndarray = apart.any(axis=1) & plain[:, None, None]
    return found


def shares(images: np.ndarray, patch_size: int) -> np.ndarray:
    """Of each patch, in reading order, the share of pixels that belong to the object: float64 (examples, patches)."""
    found = objects(images).astype(np.float64)
    count, height, width = found.shape
    rows, columns = height // patch_size, width // patch_size
    patches = found.reshape(count, rows, patch_size, columns, patch_size)
    return patches.mean(axis=(2, 4)).reshape(count, rows * columns)
