"""Corruptions against closed forms and naive implementations; shifts against their contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats
from sklearn.datasets import load_digits, load_sample_images

from attention_transfer.config import SHIFTS
from attention_transfer.data import corruptions, shifts
from attention_transfer.errors import StudyError

RANDOM = {
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "motion_blur",
    "fog",
    "snow",
    "elastic",
    "rotate",
    "translate",
}


def photographs(side: int, step: int) -> np.ndarray:
    """Square crops of scikit-learn's two photographs, uint8 (N, 3, side, side)."""
    crops = [
        Image.fromarray(photograph[top : top + 320, left : left + 320]).resize((side, side))
        for photograph in load_sample_images().images
        for top in range(0, 108, step)
        for left in range(0, 321, step)
    ]
    return np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    """Objects on black, as in Fashion-MNIST."""
    return shifts.digits(28, 1)[0][:120]


@pytest.fixture(scope="module")
def colour() -> np.ndarray:
    return photographs(28, 32)


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


# What `corrupt` promises for every shift


def test_every_shift_of_params_yaml_exists() -> None:
    assert set(shifts._CORRUPTIONS) == set(SHIFTS)


@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_change_grows_with_severity(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    images = request.getfixturevalue(kind)
    before = images.copy()
    changes = []
    for severity in shifts.SEVERITIES:
        result = shifts.corrupt(images, name, severity, seed=3)
        assert result.dtype == np.uint8
        assert result.shape == images.shape
        changes.append(np.abs(result.astype(float) - images).mean())
    assert np.array_equal(images, before)
    assert changes[0] > 1
    assert (np.diff(changes) > 0).all(), changes
    assert changes[-1] > 1.4 * changes[0]


@pytest.mark.parametrize("name", SHIFTS)
def test_severity_means_the_same_at_any_size(name: str) -> None:
    """Large enough that pixels are finer than all lengths, and enlarged from one source: no new detail."""
    source = photographs(28, 80)[::4].astype(np.float32) / 255
    change = []
    for side in (112, 224):
        images = np.rint(255 * corruptions.resize(source, side)).astype(np.uint8)
        shifted = [shifts.corrupt(images, name, severity, seed=0) for severity in (1, 5)]
        change.append([np.abs(result.astype(float) - images).mean() for result in shifted])
    assert change[1][1] > 1.4 * change[1][0]
    if name not in ("pixelate", "jpeg"):  # these act on pixels: milder where images are smooth
        assert change[1] == pytest.approx(change[0], rel=0.25)


@pytest.mark.parametrize("name", [name for name in SHIFTS if name not in ("rotate", "translate")])
def test_strong_shift_is_more_image_than_corruption(name: str, grey: np.ndarray) -> None:
    """Seen from afar, a strongly shifted digit resembles its own original more than most others.

    Not for shifts that move the object away: comparing place by place does not see them.
    """
    shifted = shifts.corrupt(grey, name, 5, seed=0)
    clean, seen = (
        ndimage.gaussian_filter(images.astype(float), (0, 0, 2, 2)).reshape(len(grey), -1)
        for images in (grey, shifted)
    )
    similarity = np.corrcoef(clean, seen)[: len(grey), len(grey) :]
    others_closer = (similarity > np.diag(similarity)).mean()
    assert others_closer < 0.2  # 0.5 is chance


@pytest.mark.parametrize("name", SHIFTS)
def test_same_call_same_bytes_and_random_ones_follow_the_seed(name: str, colour: np.ndarray) -> None:
    images = colour[:20]
    first, again, other = (shifts.corrupt(images, name, 3, seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) != (name in RANDOM)


@pytest.mark.parametrize("name", SHIFTS)
def test_an_image_depends_on_its_position_and_not_on_its_neighbours(
    name: str, colour: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = colour[:9]
    whole = shifts.corrupt(images, name, 4, seed=1)
    assert np.array_equal(shifts.corrupt(images[:5], name, 4, seed=1), whole[:5])
    others = images[::-1].copy()
    others[4] = images[4]
    assert np.array_equal(shifts.corrupt(others, name, 4, seed=1)[4], whole[4])
    twins = shifts.corrupt(np.repeat(images[:1], 9, axis=0), name, 4, seed=1)
    assert (len(np.unique(twins, axis=0)) > 1) == (name in RANDOM)
    monkeypatch.setattr(shifts, "BLOCK_VALUES", 2 * images[0].size)
    assert np.array_equal(shifts.corrupt(images, name, 4, seed=1), whole)


def test_streams_differ_by_seed_name_severity_and_draw() -> None:
    keys = [
        (0, "fog", 1, "a"),
        (1, "fog", 1, "a"),
        (0, "snow", 1, "a"),
        (0, "fog", 2, "a"),
        (0, "fog", 1, "b"),
    ]
    values = [shifts.Draws(seed, name, severity).normal(draw, 100) for seed, name, severity, draw in keys]
    correlation = np.corrcoef(values) - np.eye(len(keys))
    assert np.abs(correlation).max() < 0.45


@st.composite
def batches(draw: st.DrawFn) -> np.ndarray:
    """uint8 (N, C, S, S): black, white or random images."""
    side = draw(st.integers(shifts.SMALLEST_SIDE, 41))
    shape = (draw(st.integers(0, 3)), draw(st.sampled_from([1, 3])), side, side)
    low, high = draw(st.sampled_from([(0, 0), (255, 255), (0, 255)]))
    return np.random.default_rng(0).integers(low, high, shape, np.uint8, endpoint=True)


@example(np.zeros((1, 1, 16, 16), np.uint8), "jpeg", 2, 0)
@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(SHIFTS), st.sampled_from(shifts.SEVERITIES), st.integers(0, 2**31 - 1))
def test_any_size_any_content(images: np.ndarray, name: str, severity: int, seed: int) -> None:
    result = shifts.corrupt(images, name, severity, seed=seed)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    average = ("defocus_blur", "motion_blur", "zoom_blur", "pixelate", "jpeg", "elastic", "contrast")
    if images.size and np.ptp(images) == 0 and name in average:
        room = 2 if name == "jpeg" else 0  # JPEG rounds a block's mean: black becomes 2 at severities 2 and 3
        assert np.abs(result.astype(int) - images.astype(int)).max() <= room


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_unknown_severity(severity: int, grey: np.ndarray) -> None:
    with pytest.raises(StudyError, match=r"(?s)severity.*1, 2, 3, 4, 5"):
        shifts.corrupt(grey, "fog", severity, seed=0)


def test_unknown_shift_names_the_known(grey: np.ndarray) -> None:
    with pytest.raises(StudyError, match=r"(?s)frost.*gaussian_noise.*translate"):
        shifts.corrupt(grey, "frost", 1, seed=0)


def test_too_small_images_are_the_users_business() -> None:
    with pytest.raises(StudyError, match=r"(?s)data.image_size.*16"):
        shifts.corrupt(np.zeros((1, 1, 15, 15), np.uint8), "fog", 1, seed=0)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 1, 28, 28), np.float32),
        np.zeros((2, 2, 28, 28), np.uint8),
        np.zeros((1, 28, 28), np.uint8),
        np.zeros((2, 1, 28, 30), np.uint8),
    ],
)
def test_other_arrays_are_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="images: expected"):
        shifts.corrupt(images, "fog", 1, seed=0)


# Each corruption against an oracle of its own


def test_gaussian_noise_has_its_standard_deviation() -> None:
    images = np.full((20, 1, 64, 64), 128, np.uint8)
    noise = (shifts.corrupt(images, "gaussian_noise", 2, seed=0) - 128.0) / 255
    assert noise.std() == pytest.approx(0.12, rel=0.01)
    assert abs(noise.mean()) < 0.002


@pytest.mark.parametrize("photons", [3, 60])
def test_shot_noise_is_the_poisson_quantile(photons: int) -> None:
    images = (np.random.default_rng(0).integers(0, 256, (2, 1, 24, 24)) / 255).astype(np.float32)
    uniform = random_images(2, 1, 24, 24, seed=1)
    levels = np.rint(images * 255).astype(float)
    expected = stats.poisson.ppf(uniform.astype(float), photons * levels / 255)
    expected = np.where((levels == 0) | (uniform == 0), 0, expected)
    assert corruptions.shot_noise(images, uniform, photons) * photons == pytest.approx(expected, abs=1e-4)


def test_shot_noise_has_poisson_moments() -> None:
    white = np.ones((10, 1, 64, 64), np.float32)
    noisy = corruptions.shot_noise(white, random_images(*white.shape), 5)
    assert noisy.mean() == pytest.approx(1, abs=0.01)
    assert noisy.var() == pytest.approx(1 / 5, rel=0.03)


def test_impulse_noise_replaces_its_share() -> None:
    images = np.full((10, 3, 64, 64), 0.5, np.float32)
    noisy = corruptions.impulse_noise(images, random_images(*images.shape), 0.2)
    assert (noisy == 0).mean() == pytest.approx(0.1, rel=0.05)
    assert (noisy == 1).mean() == pytest.approx(0.1, rel=0.05)
    assert set(np.unique(noisy)) == {0, 0.5, 1}


def test_defocus_spreads_a_point_over_a_disk() -> None:
    point = np.zeros((1, 1, 101, 101), np.float32)
    point[..., 50, 50] = 1
    spread = corruptions.defocus_blur(point, 12 / 101)[0, 0]
    distance = np.hypot(*(np.indices((101, 101)) - 50))
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(spread[distance > 13.5]).max() < 1e-8
    assert spread[distance < 10.5] == pytest.approx(1 / (np.pi * 12**2), rel=0.05)


def test_motion_blur_is_the_mean_of_moved_images() -> None:
    images = random_images(3, 2, 40, 40)
    degrees = np.array([0.0, 30.0, -45.0])
    blurred = corruptions.motion_blur(images, 0.15, degrees)
    steps = np.linspace(-3, 3, 13)
    for image, result, angle in zip(images, blurred, np.radians(degrees), strict=True):
        moved = [
            ndimage.shift(image, (0, -step * np.sin(angle), step * np.cos(angle)), order=1) for step in steps
        ]
        inside = (slice(None), slice(5, -5), slice(5, -5))
        assert result[inside] == pytest.approx(np.mean(moved, axis=0)[inside], abs=1e-5)


def test_border_of_a_blur_is_mirrored() -> None:
    images = random_images(2, 3, 20, 20)
    kernel = np.random.default_rng(1).random((1, 1, 7, 7))
    expected = ndimage.convolve(images.astype(float), kernel, mode="reflect")
    assert corruptions._convolve(images, kernel) == pytest.approx(expected, rel=1e-5)


def test_zoom_blur_is_the_mean_of_enlarged_images() -> None:
    images = random_images(2, 1, 28, 28)
    factors = np.linspace(1, 1.24, 6)
    enlarged = [
        ndimage.affine_transform(
            images, [1, 1, 1 / factor, 1 / factor], [0, 0, *[13.5 * (1 - 1 / factor)] * 2], order=1
        )
        for factor in factors
    ]
    assert corruptions.zoom_blur(images, 1.24) == pytest.approx(np.mean(enlarged, axis=0), abs=1e-5)


def test_fog_is_a_mixture_with_clouds_from_black_to_white() -> None:
    images = random_images(2, 3, 32, 32)
    white = np.random.default_rng(0).standard_normal((2, 32, 32))
    clouds = corruptions.fog(images, white, 1.5, 1.7) * 2.5 - images
    assert clouds.min(axis=(-2, -1)) == pytest.approx(0, abs=1e-5)
    assert clouds.max(axis=(-2, -1)) == pytest.approx(1.5, abs=1e-5)
    assert np.ptp(clouds, axis=1) == pytest.approx(0, abs=1e-5)  # channels share them


def test_random_field_has_its_power_law_and_variance_one() -> None:
    white = np.random.default_rng(0).standard_normal((400, 32, 32))
    field = corruptions.random_field(white, lambda cycles: cycles**-1.5)
    assert field.mean(axis=(-2, -1)) == pytest.approx(0, abs=1e-9)
    assert field.var() == pytest.approx(1, rel=0.05)
    power = (np.abs(np.fft.fft2(field)) ** 2).mean(axis=0)
    frequencies = np.arange(1, 13)
    slope = np.polyfit(np.log(frequencies), np.log(power[0, frequencies]), 1)[0]
    assert slope == pytest.approx(-3, abs=0.15)


def test_snow_brightens_only_and_covers_more_than_its_flakes() -> None:
    images = np.zeros((50, 1, 28, 28), np.float32)
    white = np.random.default_rng(0).standard_normal((50, 28, 28))
    upright = np.full(50, 90.0)
    snowy = corruptions.snow(images, white, upright, 0.1, 0.0)
    assert snowy.min() > -1e-6
    assert 0.1 < (snowy > 0.05).mean() < 0.5
    along, across = (np.abs(np.diff(snowy, axis=axis)).mean() for axis in (-2, -1))
    assert along < 0.6 * across  # streaks are vertical
    assert corruptions.snow(images, white, upright, 1e-9, 0.2) == pytest.approx(0.1, abs=1e-6)


def test_brightness_adds_to_the_value_of_hsv() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16)).astype(np.float32) / 255
    pixels[..., 0, 0] = 0
    bright = np.clip(corruptions.brightness(pixels, 0.25), 0, 1)
    assert bright.max(axis=1) == pytest.approx(np.minimum(pixels.max(axis=1) + 0.25, 1), abs=1e-6)
    seen = pixels.max(axis=1) > 0
    saturation = [1 - (a.min(axis=1)[seen] / a.max(axis=1)[seen]) for a in (pixels, bright)]
    assert saturation[0] == pytest.approx(saturation[1], abs=1e-5)
    assert bright[0, :, 0, 0] == pytest.approx(0.25)  # black becomes grey
    grey = random_images(1, 1, 16, 16)
    assert corruptions.brightness(grey, 0.25) == pytest.approx(np.minimum(grey + 0.25, 1), abs=1e-6)


def test_contrast_keeps_the_mean_and_scales_the_deviation() -> None:
    images = random_images(4, 3, 20, 20)
    flat = corruptions.contrast(images, 0.3)
    assert flat.mean(axis=(2, 3)) == pytest.approx(images.mean(axis=(2, 3)), abs=1e-6)
    assert flat.std(axis=(2, 3)) == pytest.approx(0.3 * images.std(axis=(2, 3)), rel=1e-4)


def test_pixelate_against_pillow() -> None:
    images = random_images(2, 1, 28, 28)
    for ratio, cells in ((0.7, 20), (0.5, 14), (0.25, 7)):
        expected = [
            np.asarray(
                Image.fromarray(image[0])
                .resize((cells,) * 2, Image.Resampling.BOX)
                .resize((28, 28), Image.Resampling.NEAREST)
            )
            for image in images
        ]
        result = corruptions.pixelate(images, ratio)[:, 0]
        if 28 % cells == 0:  # otherwise Pillow rounds a cell's edges to whole pixels
            assert result == pytest.approx(np.stack(expected), abs=1e-5)
        assert len(np.unique(np.round(result[0], 6))) == cells**2
        assert result.mean() == pytest.approx(images.mean(), abs=0.02)


def test_jpeg_at_top_quality_returns_nearly_the_image(colour: np.ndarray) -> None:
    images = colour[:4, :1].astype(np.float32) / 255
    assert np.abs(corruptions.jpeg(images, 100) - images).max() < 3 / 255
    assert np.abs(corruptions.jpeg(images, 7) - images).mean() > 3 / 255
    # Colour: a flat patch survives, in the right order of channels.
    flat = np.broadcast_to(np.array([0.8, 0.2, 0.4], np.float32)[:, None, None], (1, 3, 16, 16))
    assert corruptions.jpeg(flat, 90) == pytest.approx(flat, abs=0.03)


def test_warp_against_scipy() -> None:
    images = random_images(3, 2, 17, 17)
    rows, columns = np.random.default_rng(0).uniform(-3, 20, (2, 3, 17, 17))
    rows[0], columns[0] = np.indices((17, 17))
    result = corruptions.warp(images, rows, columns)
    for n in range(3):
        for c in range(2):
            expected = ndimage.map_coordinates(
                images[n, c].astype(float), [rows[n], columns[n]], order=1, mode="grid-constant"
            )
            assert result[n, c] == pytest.approx(expected, abs=1e-5)
    assert np.array_equal(result[0], images[0])


def test_elastic_is_a_smooth_mirrored_warp_of_its_size() -> None:
    side, shift = 40, 0.03
    ramp = np.broadcast_to(np.arange(side, dtype=np.float32), (60, 1, side, side))
    white = np.random.default_rng(0).standard_normal((60, 2, side, side))
    moved = (corruptions.elastic(ramp, white, shift) - ramp)[..., 8:-8, 8:-8]
    assert np.sqrt(np.mean(moved**2)) == pytest.approx(shift * side, rel=0.05)
    steps = np.diff(moved, axis=-1)
    assert np.sqrt(np.mean(steps**2)) < 0.5 * np.sqrt(np.mean(moved**2))
    assert np.array_equal(corruptions.elastic(ramp, white, 0.0), ramp)


def test_mirror_folds_back() -> None:
    places = np.array([-1.5, 0.0, 3.25, 4.0, 5.5, 8.0, 9.0])
    assert corruptions._mirror(places, 5) == pytest.approx([1.5, 0, 3.25, 4, 2.5, 0, 1])


def test_rotate_by_right_angles_and_against_scipy() -> None:
    images = random_images(5, 2, 18, 18)
    degrees = np.array([0, 90, 180, -90, 25])
    turned = corruptions.rotate(images, degrees)
    for n, quarter in enumerate((0, 1, 2, -1)):
        assert turned[n] == pytest.approx(np.rot90(images[n], quarter, axes=(1, 2)), abs=1e-5)
    expected = ndimage.rotate(
        images[4].astype(float), 25, axes=(2, 1), reshape=False, order=1, mode="grid-constant"
    )
    assert turned[4] == pytest.approx(expected, abs=1e-5)


def test_translate_by_whole_pixels() -> None:
    images = random_images(3, 1, 20, 20)
    moved = corruptions.translate(images, 0.1, np.array([0.0, 90.0, 180.0]))
    right, up, left = (np.zeros((1, 20, 20), np.float32) for _ in range(3))
    right[:, :, 2:], up[:, :-2], left[:, :, :-2] = images[0][:, :, :-2], images[1][:, 2:], images[2][:, :, 2:]
    assert moved == pytest.approx(np.stack([right, up, left]), abs=1e-5)


# The contact sheet and the digits


def test_contact_sheet_shows_clean_then_shifts(colour: np.ndarray) -> None:
    names, severities = ("fog", "rotate", "jpeg"), (1, 5)
    sheet = shifts.contact_sheet(colour[3], names, severities, 11)
    assert sheet.shape == (4, 2, 3, 28, 28)
    assert sheet.dtype == np.uint8
    assert (sheet[0] == colour[3]).all()
    for row, name in enumerate(names, start=1):
        for column, severity in enumerate(severities):
            expected = shifts.corrupt(colour[3:4], name, severity, seed=11)[0]
            assert np.array_equal(sheet[row, column], expected)
    with pytest.raises(ValueError, match="one image"):
        shifts.contact_sheet(colour, names, severities, 11)


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (8, 1)])
def test_digits_against_torch(size: int, channels: int) -> None:
    images, labels = shifts.digits(size, channels)
    source = load_digits()
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(source.images[:, None] * 255 / 16), size=(size, size), mode="bilinear"
    ).numpy()
    assert images.shape == (1797, channels, size, size)
    assert images.dtype == np.uint8
    assert np.abs(images - expected).max() <= 0.5 + 2**-11
    assert labels.dtype == np.int64
    assert np.array_equal(labels, source.target)
    assert images.max() == 255
