"""Training views: the k-th view of image i is a pure function of (data set, i, k, seed).

Nothing else enters: not the run, the batch, the order or the process. So a teacher's attention for a
view can be stored and shared, and a resumed run sees the same images. The random numbers are a hash
of a counter (SplitMix64; Steele, Lea & Flood 2014), which gives a whole batch at once without a
generator per image.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CLEAN = -1
"""The number that stands for the image itself, without augmentation."""

_CACHED = 2**18  # numbers, 1 MiB
_ERASED_AREA = (0.02, 0.33)  # share of the image; Zhong et al. 2020, the defaults of torchvision and timm
_ERASED_RATIO = (0.3, 3.3)
# Where each use of a view's stream of random numbers begins, so that no two take the same ones.
SKIPPED = {"crop": 0, "rectangle": 5, "picture": 16, "noise": 2**32}


class ViewParams(Protocol):
    """What of params.yaml's `views` a single view depends on."""

    @property
    def crop_scale(self) -> tuple[float, float]: ...
    @property
    def crop_ratio(self) -> tuple[float, float]: ...
    @property
    def flip(self) -> float: ...
    @property
    def erase(self) -> float: ...
    @property
    def erase_with(self) -> Literal["mean", "noise"]: ...
    @property
    def rand_augment(self) -> str | None: ...


@dataclass(frozen=True)
class PretrainingViews:
    """Views of a masked autoencoder: nothing but crops and flips (He et al. 2022, appendix A.1)."""

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    erase: float = 0.0
    erase_with: Literal["mean", "noise"] = "mean"
    rand_augment: str | None = None


@dataclass(frozen=True)
class ViewRecipe:
    """Everything that decides a view's pixels, beside the image.

    Attributes:
        key: hash of data set and seed, the root of all random numbers.
        mean, std: per channel, of pixels scaled to 0..1.
    """

    key: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    erase: float
    erase_with: Literal["mean", "noise"]
    rand_augment: str | None

    def record(self) -> dict[str, object]:
        """As a JSON-like value; what a study does not ask for is left out, and moves nothing."""
        neutral = {"erase_with": "mean", "rand_augment": None}
        return {
            key: value for key, value in asdict(self).items() if key not in neutral or value != neutral[key]
        }

    @classmethod
    def of(
        cls, params: ViewParams, *, dataset: str, seed: int, mean: list[float], std: list[float]
    ) -> ViewRecipe:
        """The recipe for a data set's fingerprint and the study's seed."""
        digest = hashlib.sha256(f"views/{dataset}/{seed}".encode()).digest()
        return cls(
            key=int.from_bytes(digest[:8], "little"),
            mean=tuple(mean),
            std=tuple(std),
            crop_scale=params.crop_scale,
            crop_ratio=params.crop_ratio,
            flip=params.flip,
            erase=params.erase,
            erase_with=params.erase_with,
            rand_augment=params.rand_augment,
        )


def uniforms(
    key: int, examples: np.ndarray, views: np.ndarray | int, count: int, *, skip: int = 0
) -> np.ndarray:
    """`count` numbers in [0, 1) for each (example, view), behind the first `skip`: float32 (batch, count)."""
    counters = np.arange(skip + 1, skip + count + 1, dtype=np.uint64)
    return _uniforms(_states(key, examples, views)[:, None], counters)


def _states(key: int, examples: np.ndarray, views: np.ndarray | int) -> np.ndarray:
    """Where each (example, view) begins to count: uint64 (batch,)."""
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(key) + _mix(np.asarray(examples).astype(np.uint64)))
        return _mix(state ^ _mix(np.asarray(views).astype(np.uint64) + np.uint64(0x5851F42D4C957F2D)))


def _uniforms(states: np.ndarray, counters: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        counted = states + counters * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(counted) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: each input bit changes each output bit with probability 1/2."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def render(recipe: ViewRecipe, images: np.ndarray, examples: np.ndarray, views: np.ndarray | int) -> Tensor:
    """Renders views.

    Args:
        images: uint8 (batch, channels, size, size).
        examples: int64 (batch,), the images' numbers in their data set.
        views: view numbers, one or (batch,); all `CLEAN` for the images themselves.

    Returns:
        float32 (batch, channels, size, size), normalised. Row b depends on images[b], examples[b] and
        views[b] alone, to the bit.
    """
    pixels = normalise(recipe, images)
    views = np.broadcast_to(np.asarray(views, np.int64), examples.shape)
    if np.all(views == CLEAN):
        return pixels
    if np.any(views < 0):
        raise ValueError("clean and augmented views cannot be rendered in one batch")
    random = torch.from_numpy(uniforms(recipe.key, examples, views, 5))
    return erase(recipe, _crop_and_flip(recipe, pixels, random), examples, views)


def normalise(recipe: ViewRecipe, images: np.ndarray | Tensor, *, into: Tensor | None = None) -> Tensor:
    """uint8 pixels to float32 with zero mean and unit deviation over the training images.

    Args:
        into: float32 like the images, where they go; None for a new tensor.
    """
    shape = (1, -1, 1, 1)
    mean = torch.tensor(recipe.mean).view(shape) * 255
    std = torch.tensor(recipe.std).view(shape) * 255
    pixels = images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))
    normalised = torch.empty(pixels.shape) if into is None else into
    few = _few(pixels)
    for start in range(0, len(pixels), few):
        normalised[start : start + few].copy_(pixels[start : start + few]).sub_(mean).div_(std)
    return normalised


def _few(images: Tensor) -> int:
    """How many stay in the processor's cache from one operation to the next."""
    return max(1, _CACHED // max(1, images[:1].numel()))


def _crop_and_flip(recipe: ViewRecipe, pixels: Tensor, random: Tensor) -> Tensor:
    """Random resized crop and horizontal flip as one bilinear resampling, reflected at the border."""
    area, ratio, across, down, flip = random.unbind(1)
    area = recipe.crop_scale[0] + area * (recipe.crop_scale[1] - recipe.crop_scale[0])
    low, high = np.log(recipe.crop_ratio)
    ratio = torch.exp(low + ratio * (high - low))
    # Sides as shares of the image, at most the whole of it, as in Szegedy et al. 2015.
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    mirror = torch.where(flip < recipe.flip, -1.0, 1.0)
    # Axis by axis, which is faster than torch's `affine_grid`, whose matrices could rotate too.
    size = pixels.shape[-1]
    centres = torch.linspace(-1, 1, size) * (size - 1) / size
    columns = (width * mirror)[:, None] * centres + ((2 * across - 1) * (1 - width))[:, None]
    rows = height[:, None] * centres + ((2 * down - 1) * (1 - height))[:, None]
    grid = torch.empty(len(pixels), size, size, 2)
    grid[..., 0], grid[..., 1] = columns[:, None, :], rows[:, :, None]
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def erase(recipe: ViewRecipe, pixels: Tensor, examples: np.ndarray, views: np.ndarray | int) -> Tensor:
    """Random erasing (Zhong et al. 2020): with probability `erase` one rectangle of a view is replaced.

    Args:
        pixels: normalised views, (batch, channels, size, size), which are changed.

    Returns:
        The same with the mean colour, which is 0 here, in the rectangle; or with normal noise in each value of it, as
        timm's mode `pixel`, which He et al. (2022) fine-tune with.
    """
    if recipe.erase == 0:
        return pixels
    random = torch.from_numpy(uniforms(recipe.key, examples, views, 5, skip=SKIPPED["rectangle"]))
    happens, area, ratio, across, down = random.unbind(1)
    low, high = _ERASED_AREA
    area = low + area * (high - low)
    low, high = np.log(_ERASED_RATIO)
    ratio = torch.exp(low + ratio * (high - low))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    centres = (torch.arange(pixels.shape[-1]) + 0.5) / pixels.shape[-1]

    def inside(start: Tensor, length: Tensor) -> Tensor:
        return (centres >= start[:, None]) & (centres < (start + length)[:, None])

    columns, rows = inside(across * (1 - width), width), inside(down * (1 - height), height)
    if recipe.erase_with == "mean":
        erased = rows[:, :, None] & columns[:, None, :] & (happens < recipe.erase)[:, None, None]
        return pixels.masked_fill_(erased[:, None], 0.0)
    states = np.broadcast_to(_states(recipe.key, examples, views), examples.shape)
    for chosen in torch.nonzero(happens < recipe.erase).flatten().split(_few(pixels)):
        where = rows[chosen, :, None] & columns[chosen, None, :]
        part = pixels[chosen]
        everywhere = where[:, None].expand(part.shape)
        pixels[chosen] = part.masked_scatter_(everywhere, _noise(states[chosen.numpy()], everywhere))
    return pixels


def _noise(states: np.ndarray, where: Tensor) -> Tensor:
    """A normal number for each chosen value, of (image, view, place in it) alone (Box & Muller 1958)."""
    rows, places = np.divmod(np.flatnonzero(where.numpy()), where.shape[1:].numel())
    states = states[rows]
    counters = np.uint64(SKIPPED["noise"]) + np.uint64(2) * places.astype(np.uint64)
    radius = np.sqrt(-2 * np.log1p(-_uniforms(states, counters)))
    return torch.from_numpy(
        radius * np.cos(np.float32(2 * np.pi) * _uniforms(states, counters + np.uint64(1)))
    )
