"""Statistics of attention maps against loops over patches, SciPy and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from attention_transfer.evaluation.attention_statistics import (
    attention_on,
    mean_attention_distance,
    mean_entropy,
)

BLOCK = "attention_transfer.evaluation.attention_statistics.BLOCK"


def draw_maps(*shape: int, seed: int = 0) -> Tensor:
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * logits).softmax(dim=-1)


def saturated(maps: Tensor, share: float, seed: int) -> Tensor:
    """The maps with a share of the queries, drawn at random, looking at the first token alone."""
    drawn = torch.rand(maps.shape[:3], generator=torch.Generator().manual_seed(seed)) < share
    return maps.where(~drawn[..., None], torch.eye(maps.shape[-1], dtype=maps.dtype)[0])


def attending_to(keys: list[int], tokens: int) -> Tensor:
    """The map of one example and head in which query i looks at keys[i] alone."""
    return torch.eye(tokens)[torch.tensor(keys)][None, None]


def distance_by_loops(maps: Tensor, grid: tuple[int, int], patch_size: int, prefix: int) -> list[float]:
    """One example, head, query and key at a time, with the centres of patches in pixels."""
    centres = [
        ((row + 0.5) * patch_size, (column + 0.5) * patch_size)
        for row in range(grid[0])
        for column in range(grid[1])
    ]
    examples, heads = maps.shape[:2]
    found = []
    for head in range(heads):
        of_queries = []
        for example, query in itertools.product(range(examples), range(len(centres))):
            row = maps[example, head, prefix + query, prefix:].tolist()
            if not any(row):
                continue
            weighted = [
                weight * math.dist(centres[query], centre)
                for weight, centre in zip(row, centres, strict=True)
            ]
            of_queries.append(math.fsum(weighted) / math.fsum(row))
        found.append(math.fsum(of_queries) / len(of_queries) if of_queries else math.nan)
    return found


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31 - 1),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch_size=st.sampled_from([1, 4, 16]),
    prefix=st.sampled_from([0, 1, 5]),
    sinks=st.sampled_from([0.0, 0.3, 0.95]),
)
def test_distance_is_that_of_loops(
    seed: int, size: tuple[int, int], grid: tuple[int, int], *, patch_size: int, prefix: int, sinks: float
) -> None:
    tokens = prefix + grid[0] * grid[1]
    maps = saturated(draw_maps(*size, tokens, tokens, seed=seed), sinks, seed)
    found = mean_attention_distance(maps, grid, patch_size, prefix)
    assert found.shape == (size[1],)
    assert found.dtype == torch.float64
    expected = distance_by_loops(maps, grid, patch_size, prefix)
    assert found.tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_known_distances() -> None:
    itself = attending_to(list(range(6)), 6)
    neighbour = attending_to([1, 0, 3, 2, 5, 4], 6)  # in a grid of two columns: beside
    assert mean_attention_distance(itself, (2, 3), 16, 0).tolist() == [0.0]
    assert mean_attention_distance(neighbour, (3, 2), 16, 0).tolist() == [16.0]
    # In one of three columns places 2 and 3 lie at the end of one row and the start of the next.
    expected = 16 * (4 + 2 * math.sqrt(5)) / 6
    assert mean_attention_distance(neighbour, (2, 3), 16, 0).tolist() == pytest.approx([expected])
    both = torch.cat([itself, neighbour], dim=1)
    assert mean_attention_distance(both, (3, 2), 16, 0).tolist() == [0.0, 16.0]  # heads apart
    assert mean_attention_distance(both.transpose(0, 1), (3, 2), 16, 0).tolist() == [8.0]  # examples together


@pytest.mark.parametrize(("side", "patch_size"), [(1, 16), (14, 16), (8, 4)])
def test_uniform_attention_reaches_the_mean_distance_of_two_places(side: int, patch_size: int) -> None:
    tokens = 1 + side * side
    uniform = torch.full((1, 2, tokens, tokens), 1 / tokens)
    # By differences of rows and columns, which occur (side - |difference|) times.
    steps = np.arange(-side + 1, side)
    often = (side - abs(steps)) / side**2
    expected = patch_size * (np.hypot(steps[:, None], steps) * often[:, None] * often).sum()
    found = mean_attention_distance(uniform, (side, side), patch_size, 1)
    assert found.tolist() == pytest.approx([expected, expected], rel=1e-6)


def test_prefix_tokens_count_neither_as_queries_nor_as_keys() -> None:
    maps = draw_maps(2, 2, 11, 11)
    expected = mean_attention_distance(maps, (3, 3), 16, 2)
    other_queries = maps.clone()
    other_queries[:, :, :2] = maps[:, :, :2].flip(-1)
    torch.testing.assert_close(mean_attention_distance(other_queries, (3, 3), 16, 2), expected)
    # All patches hand 90 % of their attention to the prefix, in shares of their own.
    drained = torch.cat([maps[..., :2] * 0 + 0.45, maps[..., 2:]], dim=-1)
    drained[..., 2:] *= 0.1 / drained[..., 2:].sum(dim=-1, keepdim=True)
    torch.testing.assert_close(mean_attention_distance(drained, (3, 3), 16, 2), expected)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)),
)
def test_entropy_is_scipys(seed: int, shape: tuple[int, int, int, int]) -> None:
    maps = draw_maps(*shape, seed=seed)
    found = mean_entropy(maps)
    assert found.dtype == torch.float64
    expected = stats.entropy(maps.numpy(), axis=-1).mean(axis=(0, 2))
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_known_entropies() -> None:
    uniform, one_key = torch.full((3, 1, 7, 7), 1 / 7), torch.eye(7).expand(3, 1, 7, 7)
    half = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0]).expand(3, 1, 7, 7)
    found = mean_entropy(torch.cat([uniform, one_key, half], dim=1))
    assert found.tolist() == pytest.approx([math.log(7), 0.0, math.log(2)], abs=1e-7)
    assert found[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_maps_in_short_formats_differ_by_their_rounding(dtype: torch.dtype) -> None:
    maps = draw_maps(2, 3, 65, 65)
    rounding = torch.finfo(dtype).eps
    for statistic in (mean_entropy, lambda given: mean_attention_distance(given, (8, 8), 4, 1)):
        found = statistic(maps.to(dtype))
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, statistic(maps), rtol=rounding, atol=0)


def test_rows_are_divided_by_their_sum() -> None:
    maps = draw_maps(2, 2, 9, 9)
    torch.testing.assert_close(mean_entropy(maps * 0.995), mean_entropy(maps))


@pytest.mark.parametrize("block", [1, 60, 300, 1000, 2**20])
def test_blocks_are_of_no_effect(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    maps = draw_maps(5, 3, 13, 13)
    expected = mean_attention_distance(maps, (3, 4), 8, 1), mean_entropy(maps)
    shares = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    expected_on = attention_on(maps, shares, 1)
    monkeypatch.setattr(BLOCK, block)
    torch.testing.assert_close(attention_on(maps, shares, 1), expected_on)
    torch.testing.assert_close(mean_attention_distance(maps, (3, 4), 8, 1), expected[0])
    torch.testing.assert_close(mean_entropy(maps), expected[1])


def on_by_loops(maps: Tensor, shares: Tensor, prefix: int) -> list[float]:
    """One example, head and query at a time; examples without any are left out."""
    examples, heads, tokens, _ = maps.shape
    found = []
    for head in range(heads):
        ratios = []
        for example, query in itertools.product(range(examples), range(prefix, tokens)):
            row, weights = maps[example, head, query, prefix:].tolist(), shares[example].tolist()
            if (equal := math.fsum(weights) / len(weights)) and any(row):
                looked = math.fsum(a * b for a, b in zip(row, weights, strict=True)) / math.fsum(row)
                ratios.append(looked / equal)
        found.append(math.fsum(ratios) / len(ratios) if ratios else math.nan)
    return found


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31 - 1),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    patches=st.integers(1, 9),
    prefix=st.sampled_from([0, 1, 5]),
    empty=st.booleans(),
    sinks=st.sampled_from([0.0, 0.3, 0.95]),
)
def test_attention_on_something_is_that_of_loops(
    seed: int, size: tuple[int, int], patches: int, prefix: int, *, empty: bool, sinks: float
) -> None:
    maps = saturated(draw_maps(*size, prefix + patches, prefix + patches, seed=seed), sinks, seed)
    shares = torch.rand(size[0], patches, generator=torch.Generator().manual_seed(seed))
    shares[0] *= not empty
    expected = on_by_loops(maps, shares, prefix)
    assert attention_on(maps, shares, prefix).tolist() == pytest.approx(expected, nan_ok=True)


def test_known_attention_on_something() -> None:
    shares = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    uniform = torch.full((1, 2, 5, 5), 0.2)
    assert attention_on(uniform, shares, prefix=1).tolist() == pytest.approx([1.0, 1.0])
    assert attention_on(attending_to([0, 0, 0, 0], 4), shares, 0).tolist() == [4.0]
    assert attention_on(attending_to([1, 2, 3, 1], 4), shares, 0).tolist() == [0.0]
    assert attention_on(uniform, torch.zeros(1, 4), prefix=1).isnan().all()


def test_queries_that_look_at_no_patch_count_nowhere() -> None:
    """In float32 a softmax whose class token leads by 104 leaves the patches exactly nothing."""
    logits = torch.zeros(1, 2, 5, 5)
    logits[0, 0, 1:3, 0] = 120.0  # two of the first head's patches
    logits[0, 1, :, 0] = 120.0  # all of the second's
    maps = logits.softmax(dim=-1)
    assert maps[0, 0, 1, 1:].sum() == 0
    found = mean_attention_distance(maps, (2, 2), 1, 1)
    assert found[0] == pytest.approx((0 + 1 + 1 + math.sqrt(2)) / 4)
    assert found[1].isnan()
    on_first = attention_on(maps, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 1)
    assert on_first[0] == pytest.approx(1.0)
    assert on_first[1].isnan()


def test_unsound_input_is_refused() -> None:
    maps = draw_maps(2, 2, 7, 7)

    def distance(
        given: Tensor = maps, grid: tuple[int, int] = (2, 3), patch_size: int = 4, prefix: int = 1
    ) -> Tensor:
        return mean_attention_distance(given, grid, patch_size, prefix)

    negative = maps.clone()
    negative[0, 0, 0, :2] += torch.tensor([2.0, -2.0])
    for use, message in (
        (lambda: distance(grid=(3, 3)), r"maps: expected 1 \+ 3 \* 3 queries and keys, got 7 and 7"),
        (lambda: distance(maps[:, :, 1:]), r"maps: expected 1 \+ 2 \* 3 queries and keys, got 6 and 7"),
        (lambda: distance(prefix=-1), "prefix of at least 0, .* and -1"),
        (lambda: distance(grid=(0, 3)), r"grid and patch_size of at least 1 .* got \(0, 3\)"),
        (lambda: distance(patch_size=0), "grid and patch_size of at least 1"),
        (lambda: distance(maps[0]), r"maps: expected floating point \(examples, .* \(2, 7, 7\)"),
        (lambda: distance(maps * 1.1), "maps: expected rows of probabilities, .* sums from 1.1 to 1.1"),
        (lambda: mean_entropy(negative), "maps: expected rows of probabilities, .* values from -"),
        (lambda: mean_entropy(maps.log()), "maps: expected rows of probabilities"),
        (lambda: mean_entropy(torch.full_like(maps, torch.nan)), "maps: expected rows of probabilities"),
        (lambda: mean_entropy(maps[:0]), r"none of them 0, got torch.float64 \(0, 2, 7, 7\)"),
        (lambda: mean_entropy(maps.long()), "floating point .* got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    with pytest.raises(ValueError, match="shares of each patch"):
        attention_on(draw_maps(2, 1, 5, 5), torch.ones(2, 5), 1)
    with pytest.raises(ValueError, match="values from 0 to 1"):
        attention_on(draw_maps(2, 1, 5, 5), torch.full((2, 4), 1.5), 1)
