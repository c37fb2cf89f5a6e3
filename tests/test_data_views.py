"""Views: pure functions of (data set, i, k, seed), against a naive float64 renderer."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from attention_transfer.data import views
from attention_transfer.data.views import CLEAN, ViewRecipe, render, uniforms


@dataclass(frozen=True)
class Params:
    """The part of params.yaml's views that a recipe reads."""

    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.5
    erase: float = 0.5
    erase_with: Literal["mean", "noise"] = "mean"
    rand_augment: str | None = None


WHOLE = Params(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, erase=0.0)
COUNT = 96


def recipe(params: Params = Params(), dataset: str = "d", seed: int = 0, channels: int = 3) -> ViewRecipe:
    mean, std = [0.3, 0.4, 0.5][:channels], [0.2, 0.25, 0.3][:channels]
    return ViewRecipe.of(params, dataset=dataset, seed=seed, mean=mean, std=std)


def pictures(size: int = 12, channels: int = 3, count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


IMAGES, EXAMPLES = pictures(), np.arange(COUNT) * 7


# A view depends on nothing else


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=40),
    view=st.integers(0, 2**40),
    size=st.sampled_from([5, 8, 12, 28]),
    channels=st.sampled_from([1, 3]),
)
def test_a_row_does_not_depend_on_its_batch(rows: list[int], view: int, size: int, channels: int) -> None:
    """To the bit: alone, in any company, in any order, of any number."""
    images, the = pictures(size, channels), recipe(channels=channels)
    together = render(the, images[rows], EXAMPLES[rows], view)
    everything = render(the, images, EXAMPLES, view)
    assert torch.equal(together, everything[rows])
    first = slice(rows[0], rows[0] + 1)
    assert torch.equal(together[:1], render(the, images[first], EXAMPLES[first], view))


def test_a_batch_may_mix_view_numbers() -> None:
    numbers = np.arange(COUNT) % 5
    mixed = render(recipe(), IMAGES, EXAMPLES, numbers)
    for number in range(5):
        rows = numbers == number
        assert torch.equal(mixed[rows], render(recipe(), IMAGES, EXAMPLES, number)[rows])


def test_threads_do_not_matter() -> None:
    threads = torch.get_num_threads()
    images, examples = pictures(28, 3, 256), np.arange(256)
    try:
        torch.set_num_threads(1)
        one = render(recipe(), images, examples, 3)
        torch.set_num_threads(2)
        assert torch.equal(one, render(recipe(), images, examples, 3))
    finally:
        torch.set_num_threads(threads)


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = render(recipe(), IMAGES, EXAMPLES, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, render(recipe(), IMAGES, EXAMPLES, 3))


def test_images_are_not_changed_and_may_be_any_slice() -> None:
    before = IMAGES.copy()
    strided = np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert torch.equal(render(recipe(), strided, EXAMPLES, 1), render(recipe(), IMAGES, EXAMPLES, 1))
    assert np.array_equal(IMAGES, before)


def test_each_of_image_view_seed_and_dataset_gives_another_view() -> None:
    """The same pixels everywhere, so that a difference can only come from the random numbers."""
    same = np.repeat(IMAGES[:1], 50, axis=0)
    base = render(recipe(), same, np.arange(50), 0)
    for other in (
        render(recipe(), same, np.arange(50) + 50, 0),
        render(recipe(), same, np.arange(50), 1),
        render(recipe(seed=1), same, np.arange(50), 0),
        render(recipe(dataset="e"), same, np.arange(50), 0),
    ):
        assert not (base == other).flatten(1).all(dim=1).any()
    assert len(torch.unique(base, dim=0)) == 50


def test_the_key_is_a_hash_of_dataset_and_seed() -> None:
    assert recipe().key == int.from_bytes(hashlib.sha256(b"views/d/0").digest()[:8], "little")
    assert recipe(dataset="d/1", seed=0).key != recipe(dataset="d", seed=10).key


def test_a_view_of_this_version_is_that_of_the_next() -> None:
    """Pinned: other numbers make every attention cache of every user stale."""
    found = uniforms(12345, np.array([0, 1, 2**40]), np.array([0, 7, 3]), 2)
    expected = [scalar_uniforms(12345, i, k, 2) for i, k in ((0, 0), (1, 7), (2**40, 3))]
    assert found.tolist() == expected
    assert found.tolist()[0] == PINNED


PINNED = [0.14857202768325806, 0.2769145965576172]


# Random numbers


def mix(value: int) -> int:
    """SplitMix64's finaliser in Python's integers."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def scalar_uniforms(key: int, example: int, view: int, count: int) -> list[float]:
    """`uniforms` for one (example, view), number by number."""
    state = mix((key + mix(example)) % 2**64)
    state = mix(state ^ mix((view + 0x5851F42D4C957F2D) % 2**64))
    return [(mix((state + n * 0x9E3779B97F4A7C15) % 2**64) >> 40) / 2**24 for n in range(1, count + 1)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**62), st.integers(0, 2**62))
def test_numbers_are_those_of_plain_integers(key: int, example: int, view: int) -> None:
    found = uniforms(key, np.array([example]), view, 10)
    assert found.dtype == np.float32
    assert found.tolist() == [scalar_uniforms(key, example, view, 10)]


def test_numbers_are_uniform_and_uncorrelated() -> None:
    """1e5 numbers; neighbours in image, view and draw. Fixed numbers: p-values are no matter of luck."""
    grid = np.stack(
        [uniforms(7, np.arange(100), view, 10) for view in range(100)], axis=1
    )  # image, view, draw
    assert grid.size == 100_000
    assert ((grid >= 0) & (grid < 1)).all()
    assert stats.kstest(grid.ravel(), "uniform").pvalue > 0.01
    for draw in range(10):
        assert stats.kstest(grid[:, :, draw].ravel(), "uniform").pvalue > 0.001
    for axis in range(3):
        first = np.take(grid, range(grid.shape[axis] - 1), axis).ravel()
        second = np.take(grid, range(1, grid.shape[axis]), axis).ravel()
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(first.size)
        # Pairs fill the square: no pattern that the correlation would miss.
        cells, _, _ = np.histogram2d(first, second, bins=16, range=[[0, 1], [0, 1]])
        assert stats.chisquare(cells.ravel()).pvalue > 0.001
    assert np.unique(grid).size > 99_000


def test_neighbouring_keys_are_unrelated() -> None:
    first, second = (uniforms(key, np.arange(10_000), 0, 1).ravel() for key in (7, 8))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert (first == second).mean() < 0.001
    # key + 1 at image i must not be key at image i + 1
    assert not np.isin(first[:100], second).any()


# Closed forms


def normalised(images: np.ndarray, the: ViewRecipe) -> np.ndarray:
    mean, std = (np.array(values)[:, None, None] for values in (the.mean, the.std))
    return np.asarray((images / 255 - mean) / std)


def test_clean_is_plain_normalisation() -> None:
    the = recipe()
    clean = render(the, IMAGES, EXAMPLES, CLEAN)
    assert clean.dtype == torch.float32
    assert torch.equal(clean, views.normalise(the, IMAGES))
    np.testing.assert_allclose(clean, normalised(IMAGES, the), atol=1e-5)
    assert torch.equal(clean, render(the, IMAGES, EXAMPLES, np.full(COUNT, CLEAN)))


def test_clean_and_augmented_do_not_mix() -> None:
    with pytest.raises(ValueError, match="cannot be rendered in one batch"):
        render(recipe(), IMAGES, EXAMPLES, np.where(np.arange(COUNT) % 2, CLEAN, 0))


@pytest.mark.parametrize("size", [7, 12, 28])
def test_the_whole_image_is_the_identity(size: int) -> None:
    images = pictures(size)
    the = recipe(WHOLE)
    np.testing.assert_allclose(
        render(the, images, EXAMPLES, 4), render(the, images, EXAMPLES, CLEAN), atol=2e-4
    )


def test_flip_0_never_and_1_always_mirrors() -> None:
    never = render(recipe(replace(Params(), flip=0.0, erase=0.0)), IMAGES, EXAMPLES, 2)
    always = render(recipe(replace(Params(), flip=1.0, erase=0.0)), IMAGES, EXAMPLES, 2)
    np.testing.assert_allclose(always, never.flip(-1), atol=2e-4)
    mirrored = render(recipe(replace(WHOLE, flip=1.0)), IMAGES, EXAMPLES, 2)
    np.testing.assert_allclose(mirrored, render(recipe(), IMAGES, EXAMPLES, CLEAN).flip(-1), atol=2e-4)


def same(first: Tensor, second: Tensor) -> np.ndarray:
    return np.asarray((first - second).abs().flatten(1).amax(dim=1) < 1e-3)


def test_flip_mirrors_its_share() -> None:
    images, examples = np.repeat(IMAGES[:1], 4000, axis=0), np.arange(4000)
    flipped = ~same(
        render(recipe(replace(WHOLE, flip=0.3)), images, examples, 0),
        render(recipe(WHOLE), images, examples, 0),
    )
    assert abs(flipped.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)


def test_erased_area_is_within_its_bounds() -> None:
    """Between 2 and 33 % of the image, a rectangle, of the mean colour, in every channel alike."""
    size, count = 64, 400
    images = np.full((count, 3, size, size), 255, np.uint8)
    the = recipe(replace(WHOLE, erase=1.0))
    erased = (render(the, images, np.arange(count), 0) == 0).numpy()
    assert (erased == erased[:, :1]).all()
    rows, columns = erased[:, 0].any(axis=2).sum(axis=1), erased[:, 0].any(axis=1).sum(axis=1)
    area = erased[:, 0].sum(axis=(1, 2))
    assert (area == rows * columns).all()
    # A side of s pixels covers the centres of floor(s) to ceil(s) pixels.
    assert ((rows + 1) * (columns + 1) > 0.02 * size**2).all()
    assert ((rows - 1) * (columns - 1) < 0.33 * size**2).all()
    assert stats.kstest(area / size**2, stats.uniform(0.02, 0.31).cdf).pvalue > 0.001
    ratio = np.log(columns / rows)
    assert ratio.min() < -0.9 < 0.9 < ratio.max()
    assert (np.abs(ratio) < math.log(3.3 / 0.3)).all()


@pytest.mark.parametrize("erase", [0.0, 0.25, 1.0])
def test_erase_happens_in_its_share(erase: float) -> None:
    images, examples = np.full((4000, 1, 8, 8), 255, np.uint8), np.arange(4000)
    rendered = render(recipe(replace(WHOLE, erase=erase), channels=1), images, examples, 0)
    share = (rendered == 0).flatten(1).any(dim=1).double().mean().item()
    assert abs(share - erase) <= 4 * math.sqrt(erase * (1 - erase) / 4000) + (0.03 if erase else 0)


# A naive renderer


def reflected(place: float, size: int) -> float:
    """A place in pixels, mirrored at the outer edges of the border pixels, then kept on their centres."""
    place = abs(place + 0.5) % (2 * size)
    place = min(place, 2 * size - place) - 0.5
    return min(max(place, 0.0), size - 1.0)


def naive(the: ViewRecipe, image: np.ndarray, example: int, view: int) -> np.ndarray:
    """One view in float64, pixel by pixel, from the definition of a random resized crop."""
    area, ratio, across, down, flip, happens, *erased = scalar_uniforms(the.key, example, view, 10)
    size = image.shape[-1]
    source = normalised(image, the)

    def sides(
        area: float, ratio: float, areas: tuple[float, float], ratios: tuple[float, float]
    ) -> list[float]:
        area = areas[0] + area * (areas[1] - areas[0])
        ratio = math.exp(math.log(ratios[0]) + ratio * math.log(ratios[1] / ratios[0]))
        return [min(1.0, math.sqrt(area * ratio)) * size, min(1.0, math.sqrt(area / ratio)) * size]

    width, height = sides(area, ratio, the.crop_scale, the.crop_ratio)
    left, top = across * (size - width), down * (size - height)
    result = np.zeros_like(source)
    for row in range(size):
        for column in range(size):
            shown = size - 1 - column if flip < the.flip else column
            x = reflected(left + (shown + 0.5) * width / size - 0.5, size)
            y = reflected(top + (row + 0.5) * height / size - 0.5, size)
            x0, y0 = min(int(x), size - 2), min(int(y), size - 2)
            right, below = x - x0, y - y0
            result[:, row, column] = (
                source[:, y0, x0] * (1 - right) * (1 - below)
                + source[:, y0, x0 + 1] * right * (1 - below)
                + source[:, y0 + 1, x0] * (1 - right) * below
                + source[:, y0 + 1, x0 + 1] * right * below
            )
    if happens < the.erase:
        width, height = sides(erased[0], erased[1], (0.02, 0.33), (0.3, 3.3))
        left, top = erased[2] * (size - width), erased[3] * (size - height)
        for row in range(size):
            for column in range(size):
                if left <= column + 0.5 < left + width and top <= row + 0.5 < top + height:
                    result[:, row, column] = 0
    return result


@pytest.mark.parametrize(
    "params",
    [Params(), WHOLE, Params((0.05, 0.2), (0.2, 5.0), 1.0, 1.0), Params((0.9, 1.0), (0.1, 10.0), 0.5, 0.0)],
    ids=["usual", "whole", "small", "extreme"],
)
@pytest.mark.parametrize(("size", "channels"), [(9, 3), (14, 1)])
def test_views_agree_with_the_naive_renderer(params: Params, size: int, channels: int) -> None:
    the, images = recipe(params, channels=channels), pictures(size, channels, 24)
    examples = np.arange(24) + 1000
    rendered = render(the, images, examples, 5)
    for row, example in enumerate(examples):
        expected = naive(the, images[row], int(example), 5)
        np.testing.assert_allclose(rendered[row], expected, atol=1e-3)
