"""Mixup and cutmix as part of the view: partner, ratio and box are functions of (images, view, seed).

timm ties both to the batch; then a teacher's attention for a mixed image could not be stored. Here every view
has a random pairing of the images of its own, and the two images of a pair are mixed with each other, by the
same ratio, as in timm's mode `pair`: a batch of whole pairs renders nothing twice.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class MixParams(Protocol):
    """What of params.yaml's `views` the mixing depends on."""

    @property
    def mixup(self) -> float: ...
    @property
    def cutmix(self) -> float: ...


@dataclass(frozen=True)
class Mixing:
    """Everything that decides how the views of a set of images are mixed.

    Attributes:
        key: hash of the images' data set and numbers, and of the seed.
        count: number of images.
        size: side of an image in pixels.
        mixup, cutmix: both parameters of the Beta distribution of the ratio (Zhang et al. 2018; Yun et al.
            2019); 0 for never. With both, each pair takes either with probability 1/2, as in timm.
    """

    key: int
    count: int
    size: int
    mixup: float
    cutmix: float

    @classmethod
    def of(
        cls, params: MixParams, *, dataset: str, examples: np.ndarray, seed: int, size: int
    ) -> Mixing | None:
        """The mixing of the images with these numbers in a data set; None if params.yaml asks for none."""
        if params.mixup == 0 and params.cutmix == 0:
            return None
        numbers = hashlib.sha256(np.ascontiguousarray(examples, dtype=np.int64).tobytes()).hexdigest()
        digest = hashlib.sha256(f"mixing/{dataset}/{numbers}/{seed}".encode()).digest()
        return cls(int.from_bytes(digest[:8], "little"), len(examples), size, params.mixup, params.cutmix)


@dataclass(frozen=True)
class Mix:
    """How one view of all images is mixed.

    Attributes:
        partners: int64 (count,), a pairing: the partner's partner is the image itself. Of an odd number one
            image is its own partner.
        shares: float32 (count,), the image's own share of its mixed label, equal within a pair.
        boxes: int64 (count, 4): top, bottom, left, right of what is cut from the partner; empty for mixup.
    """

    partners: np.ndarray
    shares: np.ndarray
    boxes: np.ndarray


@functools.lru_cache(maxsize=4)
def draw(mixing: Mixing, view: int) -> Mix:
    """The mix of one view."""
    random = np.random.Generator(np.random.Philox(key=np.array([mixing.key, view], np.uint64)))
    shuffled = random.permutation(mixing.count)
    partners = np.arange(mixing.count)
    half = mixing.count // 2
    first, second = shuffled[:half], shuffled[half : 2 * half]
    partners[first], partners[second] = second, first

    cuts = random.random(mixing.count) < (0.5 if mixing.mixup and mixing.cutmix else float(mixing.cutmix > 0))
    ratios = np.where(
        cuts,
        random.beta(mixing.cutmix or 1.0, mixing.cutmix or 1.0, mixing.count),
        random.beta(mixing.mixup or 1.0, mixing.mixup or 1.0, mixing.count),
    )
    # A box of the other's share, around any pixel, cut off at the border.
    side = (mixing.size * np.sqrt(1 - ratios)).astype(np.int64)
    starts, ends = [], []
    for _ in ("rows", "columns"):
        centre = random.integers(0, mixing.size, mixing.count)
        starts.append(np.clip(centre - side // 2, 0, mixing.size))
        ends.append(np.clip(centre + side // 2, 0, mixing.size))
    boxes = np.stack([starts[0], ends[0], starts[1], ends[1]], axis=1)
    boxes[~cuts] = 0
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    shares = np.where(cuts, 1 - area / mixing.size**2, ratios).astype(np.float32)

    leader = np.minimum(np.arange(mixing.count), partners)  # whose numbers count for both of a pair
    return Mix(partners, shares[leader], boxes[leader])


def mix(mixing: Mix, rows: np.ndarray, own: Tensor, other: Tensor) -> Tensor:
    """Mixed images (batch, channels, size, size) of these rows, from their own and their partners' views."""
    boxes = torch.from_numpy(mixing.boxes[rows])
    pixels = torch.arange(own.shape[-1])

    def inside(start: Tensor, end: Tensor) -> Tensor:
        return (pixels >= start[:, None]) & (pixels < end[:, None])

    top, bottom, left, right = boxes.unbind(dim=1)
    cut = inside(top, bottom)[:, None, :, None] & inside(left, right)[:, None, None, :]
    shares = torch.from_numpy(mixing.shares[rows]).view(-1, 1, 1, 1)
    is_cut = (bottom > top) & (right > left)
    blended = torch.where(is_cut.view(-1, 1, 1, 1), own, shares * own + (1 - shares) * other)
    return torch.where(cut, other, blended)
