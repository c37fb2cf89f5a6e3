"""Fractals: pure functions of (seed, i), against a naive chaos game and attractors that are known."""

from __future__ import annotations

import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attention_transfer.data import fractals, function_systems
from attention_transfer.data.function_systems import MOST_MAPS, FunctionSystems
from attention_transfer.data.views import uniforms

SIZE, SEED = 12, 3
KEYS = st.integers(0, 2**64 - 1)


def generate(count: int, size: int = SIZE, channels: int = 1, seed: int = SEED) -> np.ndarray:
    return fractals.generate(count, size=size, channels=channels, seed=seed)


# An image depends on nothing else


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 40), at_once=st.integers(1, 50), channels=st.sampled_from([1, 3]), seed=st.integers()
)
def test_an_image_does_not_depend_on_count_block_or_channels(
    count: int, at_once: int, channels: int, seed: int
) -> None:
    everything = generate(40, size=8, channels=3, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fractals, "BLOCK_POINTS", at_once * fractals.deal(seed, 8).size)
        some = generate(count, size=8, channels=channels, seed=seed)
    assert np.array_equal(some, everything[:count, :channels])


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    np.random.seed(1)  # noqa: NPY002
    first = generate(3)
    drawn = np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert np.random.random() == drawn  # noqa: NPY002
    assert np.array_equal(generate(3), first)


def test_seeds_are_unrelated() -> None:
    first, second = (generate(60, seed=seed).reshape(60, -1) for seed in (0, 1))
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 120


def test_images_of_this_version_are_those_of_the_next() -> None:
    """Pinned: with other images, a study's teachers are others."""
    assert hashlib.sha256(generate(16, channels=3).tobytes()).hexdigest()[:16] == PINNED


PINNED = "df0c185101546523"


def test_memory_grows_by_the_images_alone() -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        size = generate(count, size=8).nbytes
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most - size

    peak(1)  # what is imported or built once
    block = fractals.BLOCK_POINTS // fractals.deal(SEED, 8).size
    assert peak(3 * block) < 1.1 * peak(block)


# What the images look like


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    return generate(2000, channels=3)


def test_images_are_bytes_from_black_to_white(many: np.ndarray) -> None:
    assert many.shape == (2000, 3, SIZE, SIZE)
    assert many.dtype == np.uint8
    assert (many.max(axis=(2, 3)) == 255).all()
    assert (many.min(axis=(1, 2, 3)) == 0).mean() > 0.99


def test_no_image_is_blank(many: np.ndarray) -> None:
    covered = (many[:, 0] > 0).sum(axis=(1, 2))
    assert covered.min() >= SIZE**1.6
    assert many.std(axis=(2, 3)).min() > 10
    assert np.mean([len(np.unique(image)) for image in many[:200, 0]]) > 15  # more than figure and ground


def test_figures_fill_the_frame(many: np.ndarray) -> None:
    figures = many.max(axis=1) > 0
    for axis in (1, 2):
        rows = figures.any(axis=axis)
        assert (rows[:, 0] & rows[:, -1]).mean() > 0.95
    mean = figures.mean(axis=0)  # no part of the frame is always empty or always full
    assert 0.1 < mean.min() < mean.max() < 0.95


def test_images_are_different(many: np.ndarray) -> None:
    """Figures have a bright middle in common, and little else."""
    correlations = np.corrcoef(many[:, 0].reshape(len(many), -1))[np.triu_indices(len(many), 1)]
    assert abs(correlations.mean()) < 0.2
    assert correlations.max() < 0.95
    centred = many[:, 0] - many[:, 0].mean(axis=0)
    correlations = np.corrcoef(centred.reshape(len(many), -1))[np.triu_indices(len(many), 1)]
    assert abs(correlations.mean()) < 0.02


def test_channels_show_one_figure_in_different_tones(many: np.ndarray) -> None:
    first, second = (many[:, channel].reshape(len(many), -1).astype(int) for channel in (0, 1))
    assert (first != second).any(axis=1).mean() > 0.95
    brighter = first.sum(axis=1) > second.sum(axis=1)
    assert (np.where(brighter[:, None], first >= second, first <= second)).all()
    assert 0.45 < brighter.mean() < 0.55


# A naive chaos game


def matrices(systems: FunctionSystems, row: int) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Each map of a system as a real matrix, a translation and its probability: images of 0, 1 and i."""
    result = []
    for a, b, c, probability in zip(
        systems.a[row], systems.b[row], systems.c[row], systems.probabilities[row], strict=True
    ):
        one, i = a + b, a * 1j + b * -1j
        matrix = np.array([[one.real, i.real], [one.imag, i.imag]])
        result.append((matrix, np.array([c.real, c.imag]), float(probability)))
    return result


def key(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"fractals/{purpose}/{SEED}".encode()).digest()[:8], "little")


def naive_hits(example: int, attempt: int, size: int) -> np.ndarray:
    """Hits of one candidate, walker by walker, in real numbers."""
    maps = matrices(function_systems.draw(key("systems"), np.array([example]), attempt), 0)
    steps = 24 + math.ceil(16 * size**2 / 128)
    numbers = uniforms(key("cards"), np.arange(steps), 0, 128).tolist()
    points = []
    for walker in range(128):
        matrix, shift, _ = maps[0]
        place = np.linalg.solve(np.eye(2) - matrix, shift)
        for step in range(steps):
            card, end = (math.floor(256 * numbers[step][walker]) + 0.5) / 256, 0.0
            for matrix, shift, probability in maps:  # noqa: B007  # the one that it breaks at is applied
                end += probability
                if card < end:
                    break
            place = matrix @ place + shift
            if step >= 24:
                points.append(place)
    return naive_histogram(np.array(points), size)


def naive_histogram(points: np.ndarray, size: int) -> np.ndarray:
    """NumPy's own, within two deviations and within the figure: rows are y, columns x."""
    deviation = 2 * points.std(axis=0)
    low = np.maximum(points.min(axis=0), points.mean(axis=0) - deviation)
    high = np.minimum(points.max(axis=0), points.mean(axis=0) + deviation)
    x, y = points.T
    hits, _, _ = np.histogram2d(y, x, bins=size, range=[(low[1], high[1]), (low[0], high[0])])
    return np.asarray(hits)


@pytest.mark.parametrize("dimension", [1.6, 1.78], ids=["usual", "choosy"])
def test_images_are_those_of_a_naive_chaos_game(dimension: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fractals, "LOWEST_DIMENSION", dimension)
    images, attempts = generate(5, channels=3), []
    for example, image in enumerate(images):
        attempts.append(0)
        while ((hits := naive_hits(example, attempts[-1], SIZE)) > 0).sum() < SIZE**dimension:
            attempts[-1] += 1
        light = np.log(1 + hits) / np.log(1 + hits.max())
        for channel, tone in enumerate(uniforms(key("tones"), np.array([example]), 0, 3)[0].tolist()):
            # Python rounds ties to even, as NumPy does.
            expected = [
                [round(255 * value ** (2 ** (2 * tone - 1))) for value in row] for row in light.tolist()
            ]
            assert image[channel].tolist() == expected
    assert (max(attempts) > 0) == (dimension > 1.6)


# Attractors that are known


def test_sierpinski_triangle() -> None:
    """Corners 0, 1 and i: the binary digits of x and y are never 1 at the same place."""
    absent = np.zeros(MOST_MAPS - 3)
    system = FunctionSystems(
        a=np.full((1, MOST_MAPS), 0.5 + 0j),
        b=np.zeros((1, MOST_MAPS), complex),
        c=np.array([[0, 0.5, 0.5j, *absent]]),
        probabilities=np.array([[1 / 3, 1 / 3, 1 / 3, *absent]]),
    )
    (x,), (y,) = fractals.walk(system, fractals.deal(0, 28))
    assert len(x) == 98 * 128
    columns, rows = (np.floor(values * 2**30).astype(int) for values in (x, y))
    assert not (columns & rows).any()
    cells, hits = np.unique((columns >> 26) * 16 + (rows >> 26), return_counts=True)
    assert len(cells) == 3**4  # of the 256 squares of this depth
    assert stats.chisquare(hits).pvalue > 0.001


def test_one_map_alone_stays_at_its_fixed_point() -> None:
    systems = function_systems.draw(1, np.arange(50), 0)
    first = np.zeros_like(systems.probabilities)
    first[:, 0] = 1
    alone = FunctionSystems(systems.a, systems.b, systems.c, first)
    places = fractals.walk(alone, fractals.deal(0, 8))
    for row in range(50):
        matrix, shift, _ = matrices(alone, row)[0]
        expected = np.linalg.solve(np.eye(2) - matrix, shift)
        np.testing.assert_allclose(places[:, row], np.tile(expected[:, None], places.shape[2]), rtol=1e-9)


def test_mean_place_is_that_of_the_invariant_measure() -> None:
    """mean = sum over maps of p (A mean + t), which is linear in the mean."""
    systems = function_systems.draw(2, np.arange(30), 0)
    places = fractals.walk(systems, fractals.deal(0, 64))
    for row in range(30):
        maps = matrices(systems, row)
        rest = np.eye(2) - sum(p * matrix for matrix, _, p in maps)
        mean = np.linalg.solve(rest, sum(p * shift for _, shift, p in maps))
        # 65,536 points of walkers that need some steps to forget, and probabilities in 256ths
        error = np.abs(places[:, row].mean(axis=1) - mean) / places[:, row].std(axis=1)
        assert error.max() < 0.05


# Hits


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 20), images=st.integers(1, 4))
def test_hits_are_a_histogram(seed: int, size: int, images: int) -> None:
    random = np.random.default_rng(seed)
    places = random.normal(random.normal(size=(2, images, 1)), 10.0 ** random.normal(), (2, images, 200))
    places[..., 0] += 100  # left out by the frame
    hits = fractals.count_hits(places.copy(), size)
    for image in range(images):
        assert np.array_equal(hits[image], naive_histogram(places[:, image].T, size))


def test_the_furthest_points_are_in_the_frame() -> None:
    corners = np.array([[0.0, 1.0, 0.0, 1.0], [2.0, 2.0, 5.0, 5.0]])[:, None]
    expected = np.zeros((8, 8), int)
    expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 1
    assert np.array_equal(fractals.count_hits(corners, 8)[0], expected)


def test_a_far_point_does_not_shrink_the_rest() -> None:
    random = np.random.default_rng(0).random((2, 1, 1000))
    random[:, 0, 0] = 50
    hits = fractals.count_hits(random, 8)[0]
    assert (hits[:2, :2] > 0).all()
    assert (hits > 0).sum() > 4
    assert hits.sum() == 999  # the far point is out of the frame


def test_points_in_one_place_are_one_pixel() -> None:
    assert (fractals.count_hits(np.full((2, 3, 50), 0.7), 8) > 0).sum() == 3


# Systems


@settings(max_examples=100, deadline=None)
@given(key=KEYS, example=st.integers(0, 2**62), attempt=st.integers(0, 1000))
def test_every_map_is_contractive(key: int, example: int, attempt: int) -> None:
    maps = matrices(function_systems.draw(key, np.array([example]), attempt), 0)
    singular = np.linalg.svd(np.array([matrix for matrix, _, _ in maps]), compute_uv=False)
    probabilities = np.array([probability for _, _, probability in maps])
    exists = probabilities > 0
    number = exists.sum()
    assert 2 <= number <= MOST_MAPS
    assert exists[:number].all()
    assert singular[exists].max() < 1
    total = float((singular[exists] @ [1, 2]).sum())
    assert (5 + number) / 2 - 1e-9 < total < (6 + number) / 2 + 1e-9
    area = np.maximum(singular.prod(axis=1), 0.01) * exists
    np.testing.assert_allclose(probabilities, area / area.sum(), atol=1e-12)
    assert probabilities[exists].min() * fractals.CARDS > 1  # no map goes without a card
    assert np.abs([shift for _, shift, _ in maps]).max() < 1


def test_every_map_is_contractive_in_many_systems() -> None:
    """Also where a number of the draw is close to its bounds."""
    systems = function_systems.draw(7, np.arange(20_000), 0)
    exists = systems.probabilities > 0
    larger = np.abs(systems.a) + np.abs(systems.b)
    smaller = np.abs(np.abs(systems.a) - np.abs(systems.b))
    assert larger[exists].max() < 1
    number = exists.sum(axis=1)
    place = 2 * ((larger + 2 * smaller) * exists).sum(axis=1) - 5 - number
    assert stats.kstest(place, "uniform").pvalue > 0.001
    assert stats.chisquare(np.bincount(number)[2:]).pvalue > 0.001
    reflects = np.abs(systems.b) > np.abs(systems.a)  # a negative determinant
    assert abs(reflects[:, 0].mean() - 0.5) < 0.02
    for turn in (systems.a, systems.b):
        assert stats.kstest(np.angle(turn[:, 1]), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 0.001
    for part in (systems.c.real, systems.c.imag):
        assert stats.kstest(part[:, 0], stats.uniform(-1, 2).cdf).pvalue > 0.001


def test_maps_are_treated_alike() -> None:
    systems = function_systems.draw(8, np.arange(20_000), 0)
    eight = (systems.probabilities > 0).all(axis=1)
    larger = np.abs(systems.a[eight]) + np.abs(systems.b[eight])
    assert stats.ks_2samp(larger[:, 0], larger[:, -1]).pvalue > 0.001


def test_candidates_of_an_image_are_different_and_stay_the_same_in_company() -> None:
    alone = function_systems.draw(9, np.array([4]), 2)
    together = function_systems.draw(9, np.array([7, 4]), 2)
    assert np.array_equal(alone.c[0], together.c[1])
    for other in (together.c[0], function_systems.draw(9, np.array([4]), 3).c[0]):
        assert not (alone.c[0] == other).any()


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"size": 7}, "size: expected at least 8 pixels, got 7"),
        ({"channels": 2}, "channels: expected 1 or 3, got 2"),
    ],
)
def test_errors(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**{"count": 1, **changes})
