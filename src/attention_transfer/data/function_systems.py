"""Random iterated function systems: sets of contractions of the plane, each of which has one fractal.

The plane is that of complex numbers, where every affine map is z -> a z + b conj(z) + c, and its singular
values are |a| + |b| and ||a| - |b||.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from attention_transfer.data.views import uniforms

MOST_MAPS = 8
DRAWS = 2 + 7 * MOST_MAPS  # random numbers of a system


@dataclass(frozen=True)
class FunctionSystems:
    """Systems of 2 to `MOST_MAPS` maps; a system of fewer has maps of probability 0 at its end.

    Attributes:
        a, b, c: complex128 (systems, MOST_MAPS), the maps z -> a z + b conj(z) + c.
        probabilities: float64 (systems, MOST_MAPS), how often the chaos game applies each map.
    """

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.a)


def draw(key: int, examples: np.ndarray, attempt: int) -> FunctionSystems:
    """Random systems, each a pure function of (key, example, attempt).

    Every map is contractive: its singular values s1 >= s2 lie in (0, 1). The sum of s1 + 2 s2 over a system's
    N maps is uniform between (5 + N) / 2 and (6 + N) / 2, where fractals are neither dust nor blots (Anderson
    & Farrell, Improving Fractal Pre-training, WACV 2022, where it is the sigma-factor). They draw one singular
    value after the other within what the sum leaves; here all are drawn at once, uniform, and then raised to
    the one power that gives the sum, which treats all maps alike. Rotations, reflections and translations (up
    to 1 along each axis) are uniform. A map is as probable as its share of the area that all maps keep
    (Barnsley, Fractals Everywhere, 1988), which spreads points evenly.

    Args:
        key: root of the random numbers.
        examples: int64 (systems,).
        attempt: number of the candidate for each example.
    """
    random = uniforms(key, examples, attempt, DRAWS).astype(np.float64) + 2**-25  # strictly within (0, 1)
    maps = 2 + np.floor((MOST_MAPS - 1) * random[:, :1])
    exists = np.arange(MOST_MAPS) < maps
    total = (5 + maps + random[:, 1:2]) / 2
    larger, smaller, turn_a, turn_b, mirrored, x, y = np.moveaxis(
        random[:, 2:].reshape(-1, MOST_MAPS, 7), 2, 0
    )
    larger, smaller = np.maximum(larger, smaller), np.minimum(larger, smaller)
    larger, smaller = _with_sum(np.stack([larger, smaller]), np.stack([exists, 2 * exists]), total)
    kept, lost = (larger + smaller) / 2, (larger - smaller) / 2
    reflects = mirrored < 0.5
    # At least 0.01, of a sum that cannot reach 2.5: a map onto a line, too, is chosen once in 256 steps.
    area = exists * np.maximum(larger * smaller, 0.01)
    return FunctionSystems(
        a=np.where(reflects, lost, kept) * np.exp(2j * math.pi * turn_a),
        b=np.where(reflects, kept, lost) * np.exp(2j * math.pi * turn_b),
        c=2 * x - 1 + 1j * (2 * y - 1),
        probabilities=area / area.sum(axis=1, keepdims=True),
    )


def _with_sum(values: np.ndarray, weights: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Values in (0, 1), (2, systems, maps), to the power at which their weighted sum is `total` (systems, 1)."""
    logs, power = np.log(values), np.zeros_like(total)
    for _ in range(30):  # Newton's method on the logarithm of the sum, which is convex: it cannot overshoot
        terms = weights * np.exp(power * logs)
        sums, slopes = (part.sum(axis=(0, 2))[:, None] for part in (terms, terms * logs))
        power = power - np.log(sums / total) * sums / slopes
    return np.asarray(np.exp(power * logs))
