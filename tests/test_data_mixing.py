"""Mixup and cutmix: part of the view, the same in any batch, as timm mixes pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import timm.data.mixup
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attention_transfer.data import views
from attention_transfer.data.labelled import LabelledViews
from attention_transfer.data.mixing import Mixing, draw
from attention_transfer.data.rendering import Render, views_of
from attention_transfer.training.batches import order, paired

SIZE, CLASSES = 12, 4


@dataclass(frozen=True)
class Params:
    """The part of params.yaml's views that is read."""

    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.5
    erase: float = 0.0
    erase_with: Literal["mean", "noise"] = "mean"
    rand_augment: str | None = None
    mixup: float = 0.8
    cutmix: float = 1.0


def single(params: Params, pixels: np.ndarray, seed: int = 0, dataset: str = "d") -> Render:
    recipe = views.ViewRecipe.of(params, dataset=dataset, seed=seed, mean=[0.4], std=[0.3])
    return views_of(recipe, pixels, np.arange(len(pixels)) * 3)


def images(params: Params = Params(), count: int = 21, seed: int = 0, dataset: str = "d") -> LabelledViews:
    random = np.random.default_rng(0)
    examples = np.arange(count) * 3
    pixels = random.integers(0, 256, (count, 1, SIZE, SIZE), dtype=np.uint8)
    return LabelledViews(
        single=single(params, pixels, seed, dataset),
        mixing=Mixing.of(params, dataset=dataset, examples=examples, seed=seed, size=SIZE),
        labels=random.integers(0, CLASSES, count),
        examples=examples,
        classes=CLASSES,
        device=torch.device("cpu"),
    )


def of(count: int, mixup: float = 0.8, cutmix: float = 1.0, key: int = 5) -> Mixing:
    return Mixing(key, count, SIZE, mixup, cutmix)


parameters = pytest.mark.parametrize(
    "params", [Params(cutmix=0.0), Params(mixup=0.0), Params()], ids=["mixup", "cutmix", "both"]
)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 60), view=st.integers(0, 10**6), key=st.integers(0, 2**64 - 1))
def test_every_view_pairs_all_images_but_an_odd_one(count: int, view: int, key: int) -> None:
    mix = draw(of(count, key=key), view)
    rows = np.arange(count)
    np.testing.assert_array_equal(mix.partners[mix.partners], rows)
    assert (mix.partners == rows).sum() == count % 2
    np.testing.assert_array_equal(mix.shares, mix.shares[mix.partners])
    np.testing.assert_array_equal(mix.boxes, mix.boxes[mix.partners])
    assert ((mix.shares >= 0) & (mix.shares <= 1)).all()
    assert ((mix.boxes >= 0) & (mix.boxes <= SIZE)).all()


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 20), min_size=1, max_size=30), view=st.integers(0, 50))
def test_a_row_does_not_depend_on_its_batch(rows: list[int], view: int) -> None:
    the, everything = images(), np.arange(21)
    assert torch.equal(the.render(np.array(rows), view), the.render(everything, view)[rows])
    assert torch.equal(the.targets(np.array(rows), view), the.targets(everything, view)[rows])


@parameters
def test_pairs_are_mixed_as_timm_mixes_them(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own code for pairs, given our pairs, ratios and boxes."""
    the = images(params, count=20)
    assert the.mixing is not None
    mix = draw(the.mixing, 3)
    leaders = np.flatnonzero(np.arange(20) < mix.partners)
    arranged = np.concatenate([leaders, mix.partners[leaders][::-1]])  # i is mixed with the i-th from the end
    single = the.single(arranged, 3)
    boxes, shares = mix.boxes[leaders], mix.shares[leaders]
    cuts = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
    given_boxes = iter([box for box, cut in zip(boxes.tolist(), cuts, strict=True) if cut])
    monkeypatch.setattr(
        timm.data.mixup,
        "cutmix_bbox_and_lam",
        lambda shape, lam, **_: (next(given_boxes), lam),
    )
    mixup = timm.data.mixup.Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, mode="pair", num_classes=CLASSES)
    monkeypatch.setattr(mixup, "_params_per_elem", lambda count: (shares.copy(), cuts))
    mixup.label_smoothing = 0.0
    labels = torch.from_numpy(the.labels[arranged])
    expected, targets = mixup(single.clone(), labels)
    torch.testing.assert_close(the.render(arranged, 3), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(the.targets(arranged, 3), targets.float(), atol=1e-6, rtol=1e-6)


@parameters
def test_the_share_of_a_label_is_that_of_the_image(params: Params) -> None:
    """White images mixed with black ones: the mean brightness is the white label's share."""
    params = replace(params, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    the = images(params, count=40)
    assert the.mixing is not None
    partners = draw(the.mixing, 0).partners
    white = np.arange(40) < partners
    pixels = np.where(white[:, None, None, None], 255, 0) * np.ones((40, 1, SIZE, SIZE))
    the = replace(the, single=single(params, pixels.astype(np.uint8)), labels=white.astype(np.int64))
    brightness = the.render(np.arange(40), 0) * 0.3 + 0.4
    torch.testing.assert_close(
        brightness.mean(dim=(1, 2, 3)), the.targets(np.arange(40), 0)[:, 1], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_ratios_follow_the_beta_distribution(alpha: float) -> None:
    mix = draw(of(20_000, mixup=alpha, cutmix=0.0), 0)
    leaders = np.arange(20_000) < mix.partners
    assert stats.kstest(mix.shares[leaders], stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert (mix.boxes == 0).all()


def test_boxes_have_the_area_of_the_other_label_and_lie_anywhere() -> None:
    mix = draw(of(20_000, mixup=0.0), 0)
    height, width = mix.boxes[:, 1] - mix.boxes[:, 0], mix.boxes[:, 3] - mix.boxes[:, 2]
    np.testing.assert_allclose(mix.shares, 1 - height * width / SIZE**2, atol=1e-6)
    covered = np.zeros((SIZE, SIZE))
    for top, bottom, left, right in mix.boxes[:4000]:
        covered[top:bottom, left:right] += 1
    assert covered.min() > 0.05 * 4000  # corners too, though less often


def test_with_both_each_pair_takes_one_of_them() -> None:
    mix = draw(of(20_000), 0)
    cut = (mix.boxes[:, 1] > mix.boxes[:, 0]) | (mix.boxes[:, 3] > mix.boxes[:, 2])
    assert abs(cut.mean() - 0.5) < 0.05  # an eleventh of the boxes is empty: too small for one pixel


def test_each_of_view_seed_data_set_and_images_gives_other_pairs() -> None:
    base = images().mixing
    assert base is not None
    others = [images(seed=1).mixing, images(dataset="e").mixing, images(count=22).mixing]
    assert len({base.key, *(other.key for other in others if other)}) == 4
    assert not np.array_equal(draw(base, 0).partners, draw(base, 1).partners)


def test_without_mixing_a_view_is_the_single_one_and_a_target_its_label() -> None:
    the, rows = images(Params(mixup=0.0, cutmix=0.0)), np.array([4, 0, 9])
    assert the.mixing is None
    assert the.partners(3) is None
    assert torch.equal(the.render(rows, 3), the.single(rows, 3))
    assert the.targets(rows, 3).tolist() == the.labels[rows].tolist()


def test_an_image_without_a_partner_stays_itself() -> None:
    the = images()
    partners = the.partners(2)
    assert partners is not None
    (alone,) = np.flatnonzero(partners == np.arange(21))
    single = the.single(np.array([alone]), 2)
    torch.testing.assert_close(the.render(np.array([alone]), 2), single, atol=1e-6, rtol=1e-6)
    assert the.targets(np.array([alone]), 2)[0, the.labels[alone]].item() == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 60), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_batches_hold_whole_pairs(count: int, seed: int, epoch: int) -> None:
    partners = draw(of(count), epoch).partners
    rows = paired(order(count, seed=seed, epoch=epoch), partners)
    assert sorted(rows) == list(range(count))
    whole = rows[: count // 2 * 2].reshape(-1, 2)
    np.testing.assert_array_equal(partners[whole[:, 0]], whole[:, 1])


def test_a_batch_of_pairs_renders_each_view_once(monkeypatch: pytest.MonkeyPatch) -> None:
    the = images(count=20)
    rendered: list[int] = []
    partners = the.partners(0)
    assert partners is not None
    rows = paired(order(20, seed=0, epoch=0), partners)[:8]
    render = views.render
    monkeypatch.setattr(views, "render", lambda *given: rendered.append(len(given[2])) or render(*given))
    the.render(rows, 0)
    assert rendered == [8]
