"""Images to pre-train on: what they are, and that they are described as the task's images are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attention_transfer.data import fractals, images, pretraining_images, shifts, views
from attention_transfer.data.pretraining_images import SOURCES, PretrainingImages

ARGUMENTS = {"size": 12, "channels": 1, "count": 40, "seed": 0}


def load(source: str, **changes: int) -> PretrainingImages:
    return pretraining_images.load(source, **{**ARGUMENTS, **changes})


def test_fractals_are_the_fractals() -> None:
    found = load("fractals", channels=3, seed=5)
    assert np.array_equal(found.pixels, fractals.generate(40, size=12, channels=3, seed=5))
    assert len(found) == 40


def test_digits_are_those_of_scikit_learn_as_the_shifted_sets_hold_them() -> None:
    expected, _ = shifts.digits(12, 3)
    found = load("digits", channels=3, count=1797, seed=5)
    assert np.array_equal(found.pixels, expected)
    assert len(found) == 1797


def test_some_digits_are_a_choice_by_the_seed() -> None:
    everything = [image.tobytes() for image in shifts.digits(12, 1)[0]]
    chosen = [[everything.index(image.tobytes()) for image in load("digits", seed=s).pixels] for s in (0, 1)]
    for rows in chosen:
        assert len(set(rows)) == 40
        assert rows == sorted(rows)
    assert chosen[0] != chosen[1]
    assert max(chosen[0]) > 1000  # not the first ones


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("channels", [1, 3])
def test_they_are_described_as_the_task_images_would_be(source: str, channels: int, tmp_path: Path) -> None:
    found = load(source, channels=channels)
    task = images.ImageSet(found.pixels, np.zeros(len(found), np.int64))
    saved = images.save(tmp_path, source, [], {"train": task})
    assert found.description.mean == saved.mean
    assert found.description.std == saved.std
    assert found.description.checksums == {"images": saved.checksums["train_images.npy"]}
    assert found.description.source == source


def test_statistics_of_many_are_those_of_every_nth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20_500, 1, 8, 8), dtype=np.uint8)
    monkeypatch.setattr(fractals, "generate", lambda *_, **__: pixels)
    found = load("fractals").description
    task = images.ImageSet(pixels, np.zeros(len(pixels), np.int64))
    saved = images.save(tmp_path, "fractals", [], {"train": task})
    assert (found.mean, found.std) == (saved.mean, saved.std)
    assert found.mean != [round(float(pixels.mean()) / 255, 6)]


@pytest.mark.parametrize("source", SOURCES)
def test_the_fingerprint_tells_images_apart(source: str) -> None:
    base = load(source).description.fingerprint
    assert load(source).description.fingerprint == base
    others = [{"size": 13}, {"channels": 3}, {"count": 41}, {"seed": 1}]
    prints = {load(source, **changes).description.fingerprint for changes in others}
    assert len(prints | {base}) == 5


@pytest.mark.parametrize("source", SOURCES)
def test_views_of_them_have_mean_0_and_deviation_1(source: str) -> None:
    found = load(source, channels=3)
    described = found.description
    recipe = views.ViewRecipe.of(
        views.PretrainingViews((0.5, 1.0)),
        dataset=described.fingerprint,
        seed=0,
        mean=described.mean,
        std=described.std,
    )
    clean = views.render(recipe, found.pixels, np.arange(len(found)), views.CLEAN).double()
    np.testing.assert_allclose(clean.mean(dim=(0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(clean.std(dim=(0, 2, 3), correction=0), 1, atol=1e-4)
    assert views.render(recipe, found.pixels, np.arange(len(found)), 0).shape == (40, 3, 12, 12)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("letters", {}, "source: expected one of digits, fractals, got 'letters'"),
        ("digits", {"count": 1798}, "count: expected 1 to 1797 digits, got 1798"),
        ("digits", {"count": 0}, "count: expected 1 to 1797 digits, got 0"),
        ("digits", {"size": 7}, "size: expected at least 8 pixels, got 7"),
        ("digits", {"channels": 2}, "channels: expected 1 or 3, got 2"),
        ("fractals", {"count": 0}, "count: expected at least 1, got 0"),
        ("fractals", {"size": 7}, "size: expected at least 8 pixels, got 7"),
        ("fractals", {"channels": 4}, "channels: expected 1 or 3, got 4"),
    ],
)
def test_errors(source: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(source, **changes)
