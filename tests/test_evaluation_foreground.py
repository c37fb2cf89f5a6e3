"""Objects on a plain ground, found by what their edge looks like."""

from __future__ import annotations

import numpy as np
import pytest

from attention_transfer.evaluation import foreground


def on_ground(ground: int, ink: int, channels: int = 1) -> np.ndarray:
    image = np.full((1, channels, 8, 8), ground, np.uint8)
    image[:, 0, 2:6, 3:5] = ink
    return image


@pytest.mark.parametrize(("ground", "ink"), [(0, 200), (255, 40), (100, 126)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_object_is_what_differs_from_the_ground(ground: int, ink: int, channels: int) -> None:
    expected = np.zeros((1, 8, 8), bool)
    expected[:, 2:6, 3:5] = True
    assert np.array_equal(foreground.objects(on_ground(ground, ink, channels)), expected)


def test_what_is_as_the_ground_but_for_noise_is_none() -> None:
    assert not foreground.objects(on_ground(100, 100 + foreground.TOLERANCE)).any()
    noisy = np.random.default_rng(0).integers(90, 110, (3, 1, 8, 8)).astype(np.uint8)
    assert not foreground.objects(noisy).any()


def test_an_object_that_touches_the_edge_is_found_and_an_image_without_ground_has_none() -> None:
    image = on_ground(0, 200)
    image[:, :, :, 5:] = 200  # 12 of 28 pixels of the edge
    assert foreground.objects(image)[0, :, 5:].all()
    photograph = np.random.default_rng(1).integers(0, 256, (2, 3, 8, 8)).astype(np.uint8)
    assert not foreground.objects(photograph).any()


def test_shares_of_patches_are_in_reading_order() -> None:
    found = foreground.shares(np.concatenate([on_ground(0, 200), on_ground(0, 0)]), patch_size=4)
    # Rows 2 to 5, columns 3 and 4: each quarter of the image holds 2 of its 16 pixels.
    assert found.tolist() == [[0.125] * 4, [0.0] * 4]
    image = np.zeros((1, 1, 8, 8), np.uint8)
    image[:, :, :4, 4:] = 255
    assert foreground.shares(image, patch_size=4).tolist() == [[0, 1, 0, 0]]
