"""A student's attention and its loss from one map, against the two formulas in float64 and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from attention_transfer.transfer.joint_attention import attention_and_cross_entropy, path
from attention_transfer.transfer.losses import streamed_attention_cross_entropy


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formulas(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    *,
    scale: float | None = None,
    teacher_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As they stand in the paper."""
    own, target = (
        q @ k.mT * (q.shape[-1] ** -0.5 if s is None else s)
        for q, k, s in ((queries, keys, scale), (teacher_queries, teacher_keys, teacher_scale))
    )
    loss = -(target.softmax(dim=-1) * own.log_softmax(dim=-1)).sum(dim=-1).mean()
    return own.softmax(dim=-1) @ values, loss


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    scales=st.tuples(st.none() | st.floats(0.1, 3), st.none() | st.floats(0.1, 3)),
    block_bytes=st.integers(1, 3000),
    weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
)
def test_values_and_gradients_are_those_of_the_formulas(
    *,
    seed: int,
    shape: tuple[int, int, int],
    widths: tuple[int, int, int],
    scales: tuple[float | None, float | None],
    block_bytes: int,
    weights: tuple[float, float],
) -> None:
    made = [random(seed + part, *shape, widths[part == 2]) for part in range(3)]
    teacher = [random(seed + 3 + part, *shape, widths[2]) for part in range(2)]
    direction = random(seed + 5, *shape, widths[1])
    results = []
    for function, options in ((formulas, {}), (attention_and_cross_entropy, {"block_bytes": block_bytes})):
        own = [part.clone().requires_grad_() for part in made]
        mixed, loss = function(*own, *teacher, scale=scales[0], teacher_scale=scales[1], **options)
        (weights[0] * (mixed * direction).sum() + weights[1] * loss).backward()
        results.append((mixed.detach(), loss.detach(), *(part.grad for part in own)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("used", ["both", "mixed", "loss"])
def test_gradients_are_those_of_finite_differences(used: str) -> None:
    own = [random(part, 2, 2, 5, 3).requires_grad_() for part in range(3)]
    teacher = [random(3 + part, 2, 2, 5, 4) for part in range(2)]

    def function(*parts: Tensor) -> tuple[Tensor, ...] | Tensor:
        mixed, loss = attention_and_cross_entropy(*parts, *teacher, block_bytes=150)
        return {"both": (mixed, loss), "mixed": mixed, "loss": loss}[used]

    assert torch.autograd.gradcheck(function, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_fused_call_and_the_streamed_loss_within_rounding(dtype: torch.dtype) -> None:
    own = [random(part, 3, 4, 50, 16).to(dtype) for part in range(3)]
    teacher = [random(3 + part, 3, 4, 50, 16).float() for part in range(2)]
    direction = random(5, 3, 4, 50, 16).to(dtype)
    results = []
    for joint in (True, False):
        q, k, v = (part.clone().requires_grad_() for part in own)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            if joint:
                mixed, loss = attention_and_cross_entropy(q, k, v, *teacher)
            else:
                mixed = F.scaled_dot_product_attention(q, k, v)
                loss = streamed_attention_cross_entropy(*teacher, q, k)
        assert (mixed.dtype, loss.dtype) == (dtype, torch.float32)
        ((mixed * direction).sum() + 300 * loss).backward()
        results.append([part.double() for part in (mixed, loss, q.grad, k.grad, v.grad)])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < tolerance * expected.norm()


def test_it_is_taken_where_maps_are_small_on_a_cpu() -> None:
    assert path("cpu", 17, 24) == path("cpu", 197, 64) == path("cpu", 256, 64) == "joint"
    assert path("cpu", 257, 64) == path("cpu", 577, 64) == path("cuda", 17, 24) == "streamed"


def test_other_shapes_are_refused() -> None:
    q, k, v = (random(part, 1, 2, 4, 3) for part in range(3))
    with pytest.raises(ValueError, match="expected student queries and keys for a teacher's"):
        attention_and_cross_entropy(q, k, v, q[:, :1], k)
    with pytest.raises(ValueError, match="expected student queries and keys"):
        attention_and_cross_entropy(q, k[..., :2], v, q, k)
