"""P v for a constant map, against the formula in float64, PyTorch's own gradient of it and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_transfer.blocks import blocks
from attention_transfer.models.attention import Attention
from attention_transfer.models.constant_map import Path, mixed_by_constant_map, path

hows = pytest.mark.parametrize("how", ["materialised", "streamed", "fused"])


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float | None
) -> Tensor:
    logits = (queries @ keys.mT) * (queries.shape[-1] ** -0.5 if scale is None else scale)
    return (logits + (0.0 if bias is None else bias)).softmax(dim=-1) @ values


@settings(max_examples=50, deadline=None)
@given(maps=st.integers(1, 7), queries=st.integers(1, 7), keys=st.integers(1, 7), room=st.integers(0, 400))
def test_blocks_hold_every_row_of_every_map_once(maps: int, queries: int, keys: int, room: int) -> None:
    seen = torch.zeros(maps, queries, dtype=torch.int64)
    for at, line in blocks(maps, queries, keys, room):
        assert 0 <= at.start < at.stop <= maps
        assert 0 <= line.start < line.stop <= queries
        seen[at, line] += 1
        assert (at.stop - at.start) * (line.stop - line.start) * keys <= max(room, keys)
    assert (seen == 1).all()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    how=st.sampled_from(["materialised", "streamed", "fused"]),
    form=st.sampled_from(["none", "per head", "one for all heads", "per image", "without batch axis"]),
    scale=st.none() | st.floats(0.1, 2),
    block_bytes=st.integers(1, 3000),
)
def test_output_and_gradient_are_those_of_the_formula(
    *,
    seed: int,
    shape: tuple[int, int, int],
    widths: tuple[int, int],
    how: Path,
    form: str,
    scale: float | None,
    block_bytes: int,
) -> None:
    batch, heads, tokens = shape
    queries, keys = (random(seed + part, batch, heads, tokens, widths[0]) for part in (0, 1))
    made = random(seed + 2, batch, heads, tokens, widths[1])
    sizes = {
        "per head": (1, heads, tokens, tokens),
        "one for all heads": (1, 1, tokens, tokens),
        "per image": (batch, 1, tokens, tokens),
        "without batch axis": (heads, tokens, tokens),
    }
    bias = random(seed + 3, *sizes[form]) if form in sizes else None
    direction = random(seed + 4, *made.shape)
    results = []
    for mixed, options in ((formula, {}), (mixed_by_constant_map, {"how": how, "block_bytes": block_bytes})):
        values = made.clone().requires_grad_()
        found = mixed(queries, keys, values, bias, scale, **options)
        found.backward(direction)
        results.append((found.detach(), values.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@hows
def test_the_gradient_is_that_of_finite_differences(how: Path) -> None:
    queries, keys, bias = random(0, 2, 2, 5, 3), random(1, 2, 2, 5, 3), random(2, 1, 2, 5, 5)
    values = random(3, 2, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: mixed_by_constant_map(queries, keys, v, bias, 0.7, how=how, block_bytes=200), (values,)
    )


@hows
def test_bfloat16_is_as_near_as_its_products(how: Path) -> None:
    queries, keys, values = (random(part, 4, 2, 50, 16).bfloat16() for part in range(3))
    values.requires_grad_()
    exact = values.detach().double().requires_grad_()
    direction = random(3, 4, 2, 50, 16)
    found = mixed_by_constant_map(queries, keys, values, how=how)
    found.backward(direction.bfloat16())
    expected = formula(queries.double(), keys.double(), exact, None, None)
    expected.backward(direction)
    assert found.dtype == torch.bfloat16
    for mine, theirs in ((found, expected), (values.grad, exact.grad)):
        assert (mine.double() - theirs).norm() < 0.01 * theirs.norm()


def test_nothing_of_the_size_of_a_map_is_kept_where_there_are_many_tokens() -> None:
    tokens = 300
    assert path("cpu", tokens, 4) == "streamed"
    queries, keys, values = (random(part, 1, 2, tokens, 4).float() for part in range(3))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        mixed_by_constant_map(queries, keys, values.requires_grad_()).sum().backward()
    assert kept
    assert max(kept) == queries.numel()


@pytest.mark.parametrize("trained", ["queries", "keys", "values", "bias"])
def test_attention_takes_every_gradient_that_is_asked_for(trained: str) -> None:
    """What has a gradient to be taken is no constant."""
    made = {name: random(seed, 2, 2, 5, 4) for seed, name in enumerate(("queries", "keys", "values"))}
    made["bias"] = random(3, 1, 2, 5, 5)
    gradients = []
    for mixed in (
        lambda p: formula(p["queries"], p["keys"], p["values"], p["bias"], None),
        lambda p: Attention(p["queries"], p["keys"], p["bias"]).apply(p["values"]),
    ):
        parts = {name: part.clone().requires_grad_(name == trained) for name, part in made.items()}
        mixed(parts).square().sum().backward()
        gradients.append(parts[trained].grad)
    torch.testing.assert_close(*gradients)
