"""Classification of merged classes against a float64 loop, and by what the merging hides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny_pretraining as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_transfer.models.group_classification import GroupClassification
from attention_transfer.models.projections import pooled

KINDS = list(tiny.ENCODERS)
GROUPS = (0, 1, 2, 0, 1, 2, 0, 1)  # of eight patterns


def make(
    kind: str = "plain", *, groups: Sequence[int] = GROUPS, label_smoothing: float = 0.1, **changed: Any
) -> GroupClassification:
    encoder = tiny.make_encoder(kind, **changed)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GroupClassification(encoder, groups=groups, label_smoothing=label_smoothing)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return tiny.structured(seed=step)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_is_that_of_a_loop(kind: str, smoothing: float) -> None:
    model = make(kind, label_smoothing=smoothing)
    images, labels = batch(0)
    found = model(images, labels).item()
    weight, bias = tiny.array(model.head.weight), tiny.array(model.head.bias)
    losses = []
    for features, label in zip(tiny.naive_pool(model.encoder, images), labels.tolist(), strict=True):
        scores = np.exp(weight @ features + bias)
        target = np.full(3, smoothing / 3)
        target[GROUPS[label]] += 1 - smoothing
        losses.append(-(target * np.log(scores / scores.sum())).sum())
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_classes_of_a_group_are_one(data: st.DataObject) -> None:
    """For every merging: other classes of the same groups give the same loss, others do not."""
    groups = data.draw(
        st.lists(st.integers(0, 2), min_size=3, max_size=9).filter(lambda g: set(g) == {0, 1, 2})
    )
    labels = data.draw(st.lists(st.integers(0, len(groups) - 1), min_size=6, max_size=6))
    others = [
        data.draw(st.sampled_from([c for c, g in enumerate(groups) if g == groups[c_]])) for c_ in labels
    ]
    model, images = make(groups=groups), tiny.make_images()
    loss = model(images, torch.tensor(labels))
    assert torch.equal(loss, model(images, torch.tensor(others)))
    shifted = [groups.index((groups[c] + 1) % 3) for c in labels]
    assert not torch.equal(loss, model(images, torch.tensor(shifted)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_that_is_trained_gets_a_gradient(kind: str) -> None:
    model = make(kind)
    assert tiny.without_gradient(model, model(*batch(0))) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_bit(kind: str) -> None:
    tiny.assert_resumes_to_the_bit(lambda: make(kind, depth=2, drop_path_rate=0.3), batch)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_learned_and_features_spread(kind: str) -> None:
    model = make(kind)
    losses = tiny.train(model, batch, range(25), learning_rate=1e-2)
    least = -(0.9 + 0.1 / 3) * np.log(0.9 + 0.1 / 3) - 2 * 0.1 / 3 * np.log(0.1 / 3)
    assert least < np.mean(losses[-3:]) < least + 0.3, losses
    images, labels = tiny.structured(64, seed=999)
    with torch.no_grad():
        features = pooled(model.eval().encoder, images)
        right = model.head(features).argmax(dim=1) == model.groups[labels]
    assert right.float().mean() > 0.95
    assert tiny.spread(features) > 0.5


def test_groups_are_given_and_not_loaded() -> None:
    model, other = make(), make(groups=(2, 2, 1, 1, 0, 0, 0, 0))
    assert "groups" not in model.state_dict()
    other.load_state_dict(model.state_dict())
    assert other.groups.tolist() == [2, 2, 1, 1, 0, 0, 0, 0]


def test_bfloat16_is_for_the_network_and_not_for_the_loss() -> None:
    model = make()
    expected = model(*batch(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch(0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert not torch.equal(loss, expected)  # the network did run in bfloat16
    assert tiny.without_gradient(model, loss) == set()


def test_unsound_arguments_are_refused() -> None:
    images = tiny.make_images(3)
    for use, message in (
        (lambda: make(groups=[0, 0, 0]), r"groups: expected at least two.*got \[0\]"),
        (lambda: make(groups=[]), r"groups: expected at least two.*got \[\]"),
        (lambda: make(groups=[0, 2, 0]), r"groups: .*without gaps, got \[0, 2\]"),
        (lambda: make(groups=[1, 2]), r"groups: .*numbered from 0.*got \[1, 2\]"),
        (lambda: make(label_smoothing=1.0), r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
        (
            lambda: make()(images, torch.tensor([0, 1])),
            r"labels: expected int64 \(3,\), got torch.int64 \(2,\)",
        ),
        (lambda: make()(images, torch.rand(3)), r"labels: expected int64 \(3,\), got torch.float32 \(3,\)"),
        (lambda: make()(images, torch.tensor([0, 8, 1])), "labels: expected 0 to 7, got 0 to 8"),
        (lambda: make()(images, torch.tensor([0, -1, 1])), "labels: expected 0 to 7, got -1 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert (GroupClassification.views, GroupClassification.labelled) == (1, True)
