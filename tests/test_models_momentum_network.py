"""The momentum network against its closed form, and what must never happen to it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import tiny_pretraining as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attention_transfer.models.momentum_network import MomentumNetwork
from attention_transfer.models.projections import pooled, project

KINDS = list(tiny.ENCODERS)


def make(
    *, base_momentum: float = 0.8, steps: int = 10, kind: str = "plain", drop_path: float = 0.0
) -> tuple[MomentumNetwork, nn.Module, nn.Module]:
    """The momentum network and the online encoder and projector."""
    encoder = tiny.make_encoder(kind, depth=2, drop_path_rate=drop_path)
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(tiny.WIDTH, 5), nn.BatchNorm1d(5))
    return MomentumNetwork(encoder, projector, base_momentum=base_momentum, steps=steps), encoder, projector


@settings(deadline=None, max_examples=50)
@given(base=st.floats(0, 1), steps=st.integers(1, 10**6))
def test_momentum_is_half_a_cosine_from_its_base_to_one(base: float, steps: int) -> None:
    network = MomentumNetwork(nn.Identity(), nn.Identity(), base_momentum=base, steps=2 * steps)
    assert network.momentum(0) == pytest.approx(base, abs=1e-12)
    assert network.momentum(steps) == pytest.approx((1 + base) / 2, abs=1e-9)
    assert network.momentum(2 * steps) == network.momentum(2 * steps + 7) == 1
    # Of Grill et al., Bootstrap Your Own Latent, NeurIPS 2020, section 3.2: the same schedule.
    at = steps // 3
    expected = 1 - (1 - base) * (math.cos(math.pi * at / (2 * steps)) + 1) / 2
    assert network.momentum(at) == pytest.approx(expected, abs=1e-12)
    assert network.momentum(at) <= network.momentum(at + 1) <= 1


@pytest.mark.parametrize("base", [0.0, 0.3, 0.99])
def test_average_is_the_sum_over_all_steps(base: float) -> None:
    """sum over k of (1 - m_k) prod over j > k of m_j, times the online weights of step k; m_0 = 0."""
    network, encoder, projector = make(base_momentum=base, steps=10)
    history = []
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        with torch.no_grad():  # what an optimiser does between steps
            for parameter in [*encoder.parameters(), *projector.parameters()]:
                parameter.add_(0.1 * (step > 0) * torch.randn(parameter.shape, generator=generator))
        history.append([tiny.array(p).copy() for p in [*encoder.parameters(), *projector.parameters()]])
        network.update(encoder, projector)
    momenta = [0.0] + [1 - (1 - base) * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(1, 6)]
    shares = [(1 - momenta[k]) * np.prod(momenta[k + 1 :]) for k in range(6)]
    assert sum(shares) == pytest.approx(1)
    average = [*network.encoder.parameters(), *network.projector.parameters()]
    for index, parameter in enumerate(average):
        expected = sum(share * weights[index] for share, weights in zip(shares, history, strict=True))
        np.testing.assert_allclose(tiny.array(parameter), expected, atol=1e-6)
    assert network.step.item() == 6


def test_step_zero_moves_nothing() -> None:
    network, encoder, projector = make()
    before = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    network.update(encoder, projector)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before.parameters(), strict=True))
    network.update(encoder, projector)
    assert not any(
        torch.equal(a, b)
        for a, b in zip(network.encoder.parameters(), before.encoder.parameters(), strict=True)
    )


def test_buffers_are_its_own() -> None:
    network, encoder, projector = make()
    projector[1].running_mean.fill_(3)  # type: ignore[operator, union-attr]
    for _ in range(3):
        network.update(encoder, projector)
    assert torch.equal(network.projector[1].running_mean, torch.zeros(5))  # type: ignore[index]
    network.train()([tiny.make_images()])
    assert network.projector[1].running_mean.abs().min() > 0  # type: ignore[index]
    assert projector[1].running_mean.unique().item() == 3  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_free_of_stochastic_depth_and_normalised_by_the_batch(kind: str) -> None:
    network, encoder, projector = make(kind=kind, drop_path=0.5)
    images = tiny.make_images()
    for mode in (True, False, True):
        network.train(mode)
        assert not any(module.training for module in network.encoder.modules())
        assert all(module.training is mode for module in network.projector.modules())
    first, second = (network([images])[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first.mean(dim=0), torch.zeros(5), atol=1e-5, rtol=0)
    encoder.train()
    noisy = [project(encoder, projector, [images])[0] for _ in range(2)]
    assert not torch.equal(*noisy)  # such noise there is in training
    torch.testing.assert_close(first, project(encoder.eval(), projector, [images])[0])


def test_there_is_never_a_gradient() -> None:
    network, encoder, projector = make()
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in [*encoder.parameters(), *projector.parameters()])
    images = tiny.make_images().requires_grad_()
    assert not network([images])[0].requires_grad
    network.update(encoder, projector)
    network.update(encoder, projector)
    assert not any(parameter.requires_grad or parameter.grad_fn for parameter in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_pool_is_the_mean_of_patch_tokens_and_layer_norm(kind: str) -> None:
    encoder, images = tiny.make_encoder(kind).eval(), tiny.make_images()
    np.testing.assert_allclose(
        tiny.array(pooled(encoder, images)), tiny.naive_pool(encoder, images), atol=1e-5
    )


def test_views_are_encoded_together_and_projected_apart() -> None:
    _, encoder, projector = make()
    first, second = tiny.make_images(seed=1), tiny.make_images(seed=2)
    together = project(encoder.eval(), projector, [first, second])
    for found, view in zip(together, (first, second), strict=True):
        torch.testing.assert_close(found, projector(pooled(encoder, view)))


def test_unsound_arguments_are_refused() -> None:
    for base, steps, message in (
        (1.1, 10, r"base_momentum: expected a number in \[0, 1\], got 1.1"),
        (math.nan, 10, "base_momentum: expected"),
        (0.9, 0, "steps: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(base_momentum=base, steps=steps)
    network, _, _ = make()
    with pytest.raises(ValueError, match=r"expected one shape.*got \(4, 1, 8, 8\) and \(6, 1, 8, 8\)"):
        network([tiny.make_images(4), tiny.make_images(6)])
