"""MoCo v3 against a float64 loop over queries and keys, and by what moves, what stays and what spreads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_pretraining as tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attention_transfer.models import momentum_contrast
from attention_transfer.models.momentum_contrast import MomentumContrast, contrast, normalised_mlp

pytestmark = pytest.mark.slow  # it trains

KINDS = list(tiny.ENCODERS)
SCHEDULE, STEPS, RATE = 1000, 40, 3e-3


def make(
    kind: str = "plain", *, frozen_patches: bool = True, base_momentum: float = 0.9, **changed: Any
) -> MomentumContrast:
    encoder = tiny.make_encoder(kind, **changed)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MomentumContrast(
            encoder,
            hidden_width=32,
            projection_width=12,
            temperature=0.2,
            base_momentum=base_momentum,
            steps=SCHEDULE,
            frozen_patches=frozen_patches,
        )


def naive_contrast(queries: tiny.Floats, keys: tiny.Floats, temperature: float) -> float:
    losses = []
    for own, query in enumerate(queries):
        similarities = [
            np.dot(query, key) / np.linalg.norm(query) / np.linalg.norm(key) / temperature for key in keys
        ]
        losses.append(np.log(np.sum(np.exp(similarities))) - similarities[own])
    return float(2 * temperature * np.mean(losses))


def naive_mlp(mlp: nn.Sequential, rows: tiny.Floats) -> tiny.Floats:
    """Linear, batch norm, ReLU, .. with the statistics of the batch."""
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            assert layer.bias is None
            rows = rows @ tiny.array(layer.weight).T
        elif isinstance(layer, nn.BatchNorm1d):
            rows = (rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + layer.eps)
            if layer.affine:
                rows = rows * tiny.array(layer.weight) + tiny.array(layer.bias)
        else:
            rows = np.maximum(rows, 0)
    return rows


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 7), temperature=st.floats(0.05, 2))
def test_contrast_is_that_of_a_loop(seed: int, batch: int, temperature: float) -> None:
    queries, keys = torch.randn(2, batch, 5, generator=torch.Generator().manual_seed(seed))
    expected = naive_contrast(tiny.array(queries), tiny.array(keys), temperature)
    assert contrast(queries, keys, temperature).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_the_paper(kind: str) -> None:
    """Predictions of each view against momentum projections of the other, all of it in float64."""
    model = make(kind)
    first, second = tiny.make_images(seed=1), tiny.make_images(seed=2)
    own = model.momentum_network
    with torch.no_grad():  # a momentum network that is not the online one
        for parameter in own.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    found = model(first, second).item()
    queries, keys = [], []
    for view in (first, second):
        projection = naive_mlp(model.projector, tiny.naive_pool(model.encoder, view))
        queries.append(naive_mlp(model.predictor, projection))
        keys.append(naive_mlp(own.projector, tiny.naive_pool(own.encoder, view)))
    expected = naive_contrast(queries[0], keys[1], 0.2) + naive_contrast(queries[1], keys[0], 0.2)
    assert found == pytest.approx(expected, rel=1e-3)
    online = naive_contrast(queries[0], queries[1], 0.2) + naive_contrast(queries[1], queries[0], 0.2)
    assert found != pytest.approx(online, rel=1e-2)


def test_heads_are_those_of_the_paper() -> None:
    layers = [type(layer).__name__ for layer in normalised_mlp(4, 6, 6, 3)]
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert layers == [*hidden, *hidden, "Linear", "BatchNorm1d"]
    model = make()
    for head, linears in ((model.projector, 3), (model.predictor, 2)):
        norms = [layer for layer in head if isinstance(layer, nn.BatchNorm1d)]
        assert [norm.affine for norm in norms] == [True] * (linears - 1) + [False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_patch_projection_stays_where_it_is_frozen(kind: str, frozen: bool) -> None:
    model = make(kind, frozen_patches=frozen)
    before = [p.clone() for p in model.encoder.patch_embed.parameters()]
    tiny.train(model, tiny.two_views, range(3), learning_rate=RATE)
    for encoder in (model.encoder, model.momentum_network.encoder):
        after = list(encoder.patch_embed.parameters())
        assert len(after) == len(before) > 0
        assert all(torch.equal(a, b) == frozen for a, b in zip(after, before, strict=True))
    for name, parameter in model.encoder.named_parameters():
        assert parameter.requires_grad is not (frozen and name.startswith("patch_embed.")), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_every_weight_that_is_trained_gets_a_gradient(kind: str, frozen: bool) -> None:
    model = make(kind, frozen_patches=frozen)
    assert tiny.without_gradient(model, model(*tiny.two_views(0))) == set()
    assert all(parameter.grad is None for parameter in model.momentum_network.parameters())


def test_a_training_step_begins_with_the_momentum_network() -> None:
    """A pass in training mode moves it towards the online weights of this pass; evaluation changes nothing."""
    model = make(base_momentum=0.5)
    tiny.train(model, tiny.two_views, range(1), learning_rate=RATE)
    weight = model.projector[0].weight.detach().clone()
    before = model.momentum_network.projector[0].weight.detach().clone()  # type: ignore[index]
    model.eval()
    model(*tiny.two_views(1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.testing.assert_close(model(*tiny.two_views(1)), model(*reversed(tiny.two_views(1))))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.momentum_network.step.item() == 1
    model.train()
    model(*tiny.two_views(1))
    share = 1 - model.momentum_network.momentum(1)
    torch.testing.assert_close(
        model.momentum_network.projector[0].weight,  # type: ignore[index]
        before + share * (weight - before),
    )
    assert model.momentum_network.step.item() == 2


def test_running_statistics_are_part_of_the_state() -> None:
    model = make()
    fresh = {name: value.clone() for name, value in model.state_dict().items() if "running_" in name}
    heads = ("projector.", "predictor.", "momentum_network.projector.")
    assert [sum(name.startswith(head) for name in fresh) for head in heads] == [6, 4, 6]
    model(*tiny.two_views(0))
    state = model.state_dict()
    assert not any(torch.equal(state[name], value) for name, value in fresh.items())


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_bit(kind: str) -> None:
    tiny.assert_resumes_to_the_bit(lambda: make(kind, depth=2, drop_path_rate=0.3), tiny.two_views)


def test_loss_falls() -> None:
    """Two images of each pattern are alike: one of two is the best guess, and 2 * 2 * 0.2 * log(2) the least."""
    losses = tiny.train(make(), tiny.two_views, range(25), learning_rate=RATE)
    assert losses[0] > 1.8
    assert 4 * 0.2 * np.log(2) < np.mean(losses[-3:]) < 1.2, losses


def without_batch_norm(model: MomentumContrast) -> MomentumContrast:
    for head in (model.projector, model.predictor, model.momentum_network.projector):
        assert isinstance(head, nn.Sequential)
        for index, layer in enumerate(head):
            if isinstance(layer, nn.BatchNorm1d):
                head[index] = nn.Identity()
    return model


def projections(model: MomentumContrast) -> Tensor:
    with torch.no_grad():
        return model.eval().momentum_network([tiny.structured(64, seed=999)[0]])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_collapse(kind: str) -> None:
    model = make(kind)
    tiny.train(model, tiny.two_views, range(STEPS), learning_rate=RATE)
    assert tiny.spread(projections(model)) > 0.9
    assert tiny.effective_rank(projections(model)) > 5


def test_what_keeps_it_from_collapse_is_the_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without batch norm, which spreads whatever comes: with the contrast, and with its numerator alone."""
    contrasted = without_batch_norm(make(base_momentum=0.0))
    tiny.train(contrasted, tiny.two_views, range(STEPS), learning_rate=RATE)
    monkeypatch.setattr(momentum_contrast, "contrast", lambda q, k, _: -F.cosine_similarity(q, k).mean())
    drawn = without_batch_norm(make(base_momentum=0.0))
    drawn.predictor = nn.Sequential()
    tiny.train(drawn, tiny.two_views, range(STEPS), learning_rate=RATE)
    assert tiny.spread(projections(contrasted)) > 0.45
    assert tiny.spread(projections(drawn)) < 0.2


def test_bfloat16_is_for_the_networks_and_not_for_the_loss() -> None:
    model, views = make(), tiny.two_views(0)
    queries, keys = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    expected = model(*views)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrast(queries, keys, 0.2)
        loss = model(*views)
    assert torch.equal(inside, contrast(queries, keys, 0.2))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert not torch.equal(loss, expected)  # the networks did run in bfloat16
    assert tiny.without_gradient(model, loss) == set()


def test_unsound_arguments_are_refused() -> None:
    def build(temperature: float = 0.2, steps: int = 5) -> MomentumContrast:
        return MomentumContrast(
            tiny.make_encoder(),
            hidden_width=8,
            projection_width=4,
            temperature=temperature,
            base_momentum=0.9,
            steps=steps,
            frozen_patches=False,
        )

    for use, message in (
        (lambda: build(temperature=0.0), "temperature: expected a positive number, got 0.0"),
        (lambda: build(steps=0), "steps: expected at least 1, got 0"),
        (lambda: build()(tiny.make_images(4), tiny.make_images(6)), "views: expected one shape"),
        (lambda: build()(tiny.make_images(1), tiny.make_images(1)), "more than 1 value per channel"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert (MomentumContrast.views, MomentumContrast.labelled) == (2, False)
