"""CKA and Jensen-Shannon divergence against naive float64 loops, SciPy, closed forms and invariances."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attention_transfer.evaluation.similarity import (
    cka_matrix,
    head_divergence,
    jensen_shannon,
    linear_cka,
    matched,
    unmatched,
)

BLOCK = "attention_transfer.evaluation.attention_statistics.BLOCK"
LN2 = math.log(2)
seeds = st.integers(0, 2**32 - 1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(examples: int, first: int, second: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of two layers, of which the second depends in part on the first."""
    x = draw(examples, first, seed=seed)
    return x, x @ draw(first, second, seed=seed + 1) + draw(examples, second, seed=seed + 2) * first**0.5


def draw_maps(*shape: int, seed: int = 0, zeros: float = 0.0) -> Tensor:
    """Attention maps of which a share is exactly zero, but no row."""
    logits = 3 * draw(*shape, seed=seed)
    hidden = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < zeros
    hidden[..., 0] = False
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)


class Made(TorchFunctionMode):
    """Shapes of all float64 tensors that operations result in."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.shapes.append(result.shape)
        return result

    @property
    def largest(self) -> int:
        return max(shape.numel() for shape in self.shapes)


def hsic_over_quadruples(first: Tensor, second: Tensor) -> float:
    """The U-statistic that the unbiased estimator is (Song et al., 2012)."""
    k, m = (first @ first.T).tolist(), (second @ second.T).tolist()
    quadruples = list(itertools.permutations(range(len(first)), 4))
    terms = (k[i][j] * (m[i][j] + m[q][r] - 2 * m[i][q]) for i, j, q, r in quadruples)
    return math.fsum(terms) / len(quadruples)


def cka_of(hsic: Any, first: Tensor, second: Tensor) -> float:
    return float(hsic(first, second)) / math.sqrt(hsic(first, first) * hsic(second, second))


def biased_hsic(first: Tensor, second: Tensor) -> Tensor:
    x, y = first - first.mean(dim=0), second - second.mean(dim=0)
    if len(x) < x.shape[1]:
        return ((x @ x.T) * (y @ y.T)).sum()
    return (x.T @ y).square().sum()


@pytest.mark.parametrize(("first", "second"), [(2, 3), (1, 1), (8, 2), (9, 12), (7, 7)])
@pytest.mark.parametrize("examples", [4, 7])
def test_cka_is_the_mean_over_quadruples_of_examples(examples: int, first: int, second: int) -> None:
    x, y = related(examples, first, second, seed=first)
    assert linear_cka(x, y) == pytest.approx(cka_of(hsic_over_quadruples, x, y), abs=1e-10)


@pytest.mark.parametrize("width", [39, 40, 200])
def test_features_and_gram_matrices_give_the_same(width: int) -> None:
    x, y = related(40, 5, 6, seed=0)
    wide = torch.cat([x, torch.zeros(40, width - 5)], dim=1)  # of no effect but on the form that is chosen
    assert linear_cka(wide, y) == pytest.approx(linear_cka(x, y), abs=1e-12)
    with Made() as found:
        linear_cka(wide, y)
    assert found.largest <= max(40 * width, width * width if width < 40 else 40 * 40)


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    examples=st.integers(5, 30),
    widths=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    scale=st.floats(1e-30, 1e30),
)
def test_cka_ignores_rotations_scale_shift_and_order(
    seed: int, examples: int, widths: tuple[int, int], scale: float
) -> None:
    x, y = related(examples, *widths, seed=seed % 2**31)
    expected = linear_cka(x, y)
    rotation = torch.linalg.qr(draw(widths[1], widths[1], seed=1)).Q
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(0))
    assert -1 - 1e-12 <= expected <= 1 + 1e-12
    assert linear_cka(x, y @ rotation) == pytest.approx(expected, abs=1e-9)
    assert linear_cka(x * scale, -y / scale) == pytest.approx(expected, abs=1e-9)
    assert linear_cka(x + draw(widths[0], seed=2), y + 100) == pytest.approx(expected, abs=1e-9)
    assert linear_cka(x[order], y[order]) == pytest.approx(expected, abs=1e-9)
    assert linear_cka(y, x) == pytest.approx(expected, abs=1e-12)
    assert linear_cka(y, 3 * y @ rotation + 1) == pytest.approx(1.0, abs=1e-9)


def test_cka_sees_other_linear_maps() -> None:
    """Unlike canonical correlation: which directions carry the variance counts."""
    x = draw(500, 10)
    assert linear_cka(x, x @ torch.diag(torch.logspace(0, 2, 10, dtype=torch.float64))) < 0.6


def test_independent_features_are_not_alike_however_wide() -> None:
    pairs = [(draw(40, 1500, seed=seed), draw(40, 1000, seed=100 + seed)) for seed in range(20)]
    found = np.array([linear_cka(x, y) for x, y in pairs])
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(len(found))
    assert np.abs(found).max() < 0.15
    assert found.min() < 0 < found.max()
    assert min(cka_of(biased_hsic, x, y) for x, y in pairs) > 0.95


@pytest.mark.parametrize("examples", [30, 3000])
def test_cka_of_features_that_share_half_of_their_directions(examples: int) -> None:
    """|cov(x, y)|^2 / (|cov(x)| |cov(y)|) of 10 shared ones among 20 independent directions each: 1/2."""
    found, biased = [], []
    for seed in range(20):
        x, other = draw(examples, 20, seed=seed), draw(examples, 10, seed=100 + seed)
        y = torch.cat([x[:, :10], other], dim=1)
        found.append(linear_cka(x, y))
        biased.append(cka_of(biased_hsic, x, y))
    assert np.mean(found) == pytest.approx(0.5, abs=0.02)
    assert (np.mean(biased) > 0.55) == (examples == 30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cka_is_computed_in_float64(dtype: torch.dtype) -> None:
    x, y = (features.to(dtype) for features in related(60, 8, 100, seed=3))
    assert linear_cka(x, y) == linear_cka(x.double(), y.double())


def test_a_mean_far_above_the_variation_costs_no_digits() -> None:
    x, y = related(60, 8, 100, seed=3)
    far = (x + 1e4).float()  # a float32 holds steps of a thousandth there
    assert linear_cka(far, y) == pytest.approx(linear_cka(x, y), abs=1e-3)


@pytest.mark.parametrize("widths", [(3, 4, 5), (50, 3, 20), (64, 64, 64)])
def test_cka_matrix_holds_every_pair_of_layers(widths: tuple[int, int, int]) -> None:
    first = [draw(20, width, seed=width + layer) for layer, width in enumerate(widths)]
    second = [features @ draw(features.shape[1], 11, seed=5) for features in first[:2]]
    found = cka_matrix(first, second)
    assert found.shape == (3, 2)
    assert found.dtype == torch.float64
    for (a, x), (b, y) in itertools.product(enumerate(first), enumerate(second)):
        assert float(found[a, b]) == pytest.approx(linear_cka(x, y), abs=1e-12)


def test_cka_matrix_makes_each_gram_matrix_once() -> None:
    first, second = ([draw(10, 30, seed=seed + layer) for layer in range(4)] for seed in (0, 10))
    with Made() as found:
        cka_matrix(first, second[:3])
    assert found.shapes.count(torch.Size([10, 10])) == 4 + 3


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_jensen_shannon_is_scipys_squared(seed: int, shape: tuple[int, int, int], zeros: float) -> None:
    first = draw_maps(*shape, seed=seed % 2**31, zeros=zeros)
    second = draw_maps(*shape, seed=seed % 2**31 + 1, zeros=zeros).roll(1, dims=-1)
    found = jensen_shannon(first, second)
    assert found.shape == shape[:-1]
    assert found.dtype == torch.float64
    assert 0 <= found.min() <= found.max() <= LN2
    assert torch.equal(found, jensen_shannon(second, first))
    for place in np.ndindex(shape[:-1]):
        expected = distance.jensenshannon(first[place].numpy(), second[place].numpy(), base=math.e) ** 2
        # scipy takes the root of what rounding may have left below zero
        assert float(found[place]) == pytest.approx(0.0 if math.isnan(expected) else expected, abs=1e-12)


def test_jensen_shannon_of_known_rows() -> None:
    first = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    second = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5], [0.5, 0.5, 0.0]])
    # the last: m = (3/4, 1/4), so 1/2 ln(4/3) + 1/4 ln(2/3) + 1/4 ln 2
    expected = [LN2, LN2, 0.0, 0.75 * math.log(4 / 3)]
    assert jensen_shannon(first, second).tolist() == pytest.approx(expected, abs=1e-12)
    assert jensen_shannon(first, first).tolist() == [0.0] * 4


def test_rounding_does_not_leave_the_bounds() -> None:
    maps, nothing = draw_maps(1000, 30), torch.zeros(1000, 30)
    nearly = maps * (1 + 1e-15 * draw(1000, 30, seed=1))
    assert jensen_shannon(maps, nearly).min() == 0
    apart = jensen_shannon(torch.cat([maps, nothing], dim=1), torch.cat([nothing, maps], dim=1))
    assert apart.max() == LN2
    assert apart.min() == pytest.approx(LN2, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_of_maps_is_no_divergence_beyond_its_size(dtype: torch.dtype) -> None:
    maps = draw_maps(2, 2, 50, 200)
    rounded = maps.to(dtype)
    assert jensen_shannon(rounded, rounded).max() == 0
    assert jensen_shannon(maps, rounded.to(torch.float64)).max() < torch.finfo(dtype).eps ** 2
    other = draw_maps(2, 2, 50, 200, seed=1)
    moved = jensen_shannon(maps, other) - jensen_shannon(rounded.double(), other)
    assert moved.abs().max() < torch.finfo(dtype).eps


@pytest.mark.parametrize("block", [1, 30, 100, 2**17])
def test_head_divergence_is_that_of_a_loop(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(BLOCK, block)
    first, second = draw_maps(5, 3, 4, 6, zeros=0.3), draw_maps(5, 2, 4, 6, seed=1, zeros=0.3)
    found = head_divergence(first, second)
    assert found.shape == (3, 2)
    for one, other in itertools.product(range(3), range(2)):
        rows = []
        for example, query in itertools.product(range(5), range(4)):
            p, q = first[example, one, query].tolist(), second[example, other, query].tolist()
            terms = [a * math.log(2 * a / (a + b)) for a, b in zip(p, q, strict=True) if a]
            terms += [b * math.log(2 * b / (a + b)) for a, b in zip(p, q, strict=True) if b]
            rows.append(math.fsum(terms) / 2)
        assert float(found[one, other]) == pytest.approx(math.fsum(rows) / len(rows), abs=1e-13)


@pytest.mark.parametrize("block", [3 * 10 * 8, 2 * 3 * 10 * 8, 3 * 8, 1])
def test_head_divergence_holds_one_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(BLOCK, block)
    first, second = draw_maps(4, 3, 10, 8).float(), draw_maps(4, 3, 10, 8, seed=1).float()
    with Made() as found:
        head_divergence(first, second)
    assert found.largest == max(block, 3 * 8)  # at least one query of all heads


@settings(deadline=None, max_examples=30)
@given(seed=seeds, heads=st.integers(1, 8))
def test_permuted_heads_are_found(seed: int, heads: int) -> None:
    maps = draw_maps(2, heads, 5, 7, seed=seed % 2**31)
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed % 2**31))
    divergence = head_divergence(maps, maps[:, order])
    least, partners = matched(divergence)
    assert least == pytest.approx(0.0, abs=1e-15)
    assert order[torch.tensor(partners)].tolist() == list(range(heads))
    if order.tolist() != list(range(heads)):
        assert unmatched(divergence) > 0.01


@settings(deadline=None, max_examples=40)
@given(seed=seeds, heads=st.integers(1, 5))
def test_matched_is_the_least_of_all_permutations(seed: int, heads: int) -> None:
    divergence = torch.from_numpy(np.random.default_rng(seed).random((heads, heads)))
    means = {
        order: sum(float(divergence[head, order[head]]) for head in range(heads)) / heads
        for order in itertools.permutations(range(heads))
    }
    least, partners = matched(divergence)
    assert least == pytest.approx(min(means.values()), abs=1e-12)
    assert means[tuple(partners)] == pytest.approx(least, abs=1e-12)
    assert unmatched(divergence) == pytest.approx(means[tuple(range(heads))], abs=1e-12)
    assert all(type(partner) is int for partner in partners)


def test_results_carry_no_gradient() -> None:
    maps, features = draw_maps(2, 2, 3, 3).requires_grad_(), draw(6, 3).requires_grad_()
    divergence = head_divergence(maps, maps)
    results = (divergence, jensen_shannon(maps, maps), cka_matrix([features], [features]))
    assert not any(result.requires_grad for result in results)
    assert linear_cka(features, features) == pytest.approx(1.0)


def test_unsound_features_are_refused() -> None:
    sound, constant = draw(6, 3), torch.full((6, 3), 0.1)
    one_differs = torch.zeros(6, 3)
    one_differs[2] = 1.0
    for first, second, message in (
        (sound, draw(5, 3), "second: expected 6 examples like the first layer, got 5"),
        (draw(3, 3), draw(3, 3), "first: expected at least 4 examples, got 3"),
        (sound, constant, "second: expected features that differ between examples, got constant ones"),
        (sound, one_differs, "second: expected pairs .* all equal but one"),
        (torch.eye(6), sound, "first: expected pairs .* equally far apart"),
        (sound, sound.where(sound < 1, torch.nan), "second: expected finite features"),
        (sound.where(sound < 1, torch.inf), sound, "first: expected finite features"),
        (sound[None], sound, r"first: expected .* got torch.float64 \(1, 6, 3\)"),
        (sound, torch.ones(()), r"second: expected floating point .* got torch.float32 \(\)"),
        (sound[:, :0], sound, r"first: expected .* \(6, 0\)"),
        (sound.long(), sound, "first: expected floating point .* got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cka(first, second)
    with pytest.raises(ValueError, match=r"second\[1\]: expected 6 examples like the first layer, got 7"):
        cka_matrix([sound], [sound, draw(7, 3)])
    with pytest.raises(ValueError, match="at least one layer each, got 1 and 0"):
        cka_matrix([sound], [])


def test_unsound_maps_are_refused() -> None:
    maps = draw_maps(2, 3, 4, 5)
    negative, undefined = maps.clone(), maps.clone()
    negative[0, 0, 0, :2] += torch.tensor([2.0, -2.0])
    undefined[1, 2, 3, 4] = torch.nan
    for unsound, message in (
        (negative, "second: expected rows of probabilities, .* values from -"),
        (undefined, "second: expected rows of probabilities, .* nan"),
        (maps.log(), "second: expected rows of probabilities"),
        (maps / 2, "second: expected rows of probabilities, .* sums from 0.5 to 0.5"),
        (torch.zeros_like(maps), "second: expected rows of probabilities, .* sums from 0 to 0"),
    ):
        for divergence in (jensen_shannon, head_divergence):
            with pytest.raises(ValueError, match=message):
                divergence(maps, unsound)
    with pytest.raises(ValueError, match=r"one shape .* got \(2, 3, 4, 5\) and \(2, 3, 4\)"):
        jensen_shannon(maps, maps[..., 0])
    with pytest.raises(ValueError, match=r"one shape .* got \(0, 5\)"):
        jensen_shannon(maps[0, 0, :0], maps[0, 0, :0])
    with pytest.raises(ValueError, match=r"second: expected maps of 2 examples, 4 queries and 5 keys, got"):
        head_divergence(maps, maps[:, :, :, :4])
    with pytest.raises(ValueError, match=r"first: expected floating point \(examples, heads, .*\(3, 4, 5\)"):
        head_divergence(maps[0], maps[0])


def test_unsound_divergences_are_refused() -> None:
    for divergence, message in (
        (torch.zeros(2, 3), r"as many heads as heads, got \(2, 3\)"),
        (torch.zeros(0, 0), r"as many heads as heads, got \(0, 0\)"),
        (torch.tensor([[torch.nan]]), "expected finite values"),
    ):
        for mean in (matched, unmatched):
            with pytest.raises(ValueError, match=message):
                mean(divergence)
