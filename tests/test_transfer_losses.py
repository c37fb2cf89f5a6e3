"""The loss of Attention Distill, against closed forms and a float64 loop."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_transfer.transfer.losses import (
    attention_cross_entropy,
    map_cross_entropy,
    streamed_attention_cross_entropy,
)

Reduction = Literal["sum", "mean"]
SHAPE = (3, 2, 2, 5, 4)  # layers, batch, heads, queries, keys
reductions = pytest.mark.parametrize("reduction", ["sum", "mean"])


def logits(seed: int, shape: tuple[int, ...] = SHAPE, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive(teacher: np.ndarray, student: np.ndarray) -> list[float]:
    """The loss of each layer."""
    layers, batch, heads, queries, keys = teacher.shape
    losses = []
    for layer in range(layers):
        total = 0.0
        for place in np.ndindex(batch, heads, queries):
            t, s = teacher[(layer, *place)], student[(layer, *place)]
            p = [math.exp(x) / sum(math.exp(y) for y in t) for x in t]
            q = [math.exp(x) / sum(math.exp(y) for y in s) for x in s]
            total += -sum(p[key] * math.log(q[key]) for key in range(keys))
        losses.append(total / (batch * heads * queries))
    return losses


@reductions
@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 1, 1, 2), (2, 3, 1, 4, 4)], ids=str)
def test_is_the_cross_entropy_of_the_maps(shape: tuple[int, ...], reduction: Reduction) -> None:
    teacher, student = logits(0, shape), logits(1, shape)
    expected = naive(teacher.double().numpy(), student.double().numpy())
    found = attention_cross_entropy(teacher, student, reduction=reduction)
    assert found.shape == ()
    assert found.item() == pytest.approx(sum(expected) / (1 if reduction == "sum" else shape[0]), rel=1e-5)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(*[st.integers(1, 4)] * 5),
    scale=st.floats(0.01, 30),
    shift=st.floats(-50, 50),
)
def test_sum_is_layers_times_mean_and_at_least_the_entropy(
    seed: int, shape: tuple[int, ...], scale: float, shift: float
) -> None:
    teacher, student = logits(seed, shape, scale), logits(seed + 1, shape, scale)
    total, mean, least, shifted = (
        attention_cross_entropy(teacher, student, reduction="sum").item(),
        attention_cross_entropy(teacher, student, reduction="mean").item(),
        attention_cross_entropy(teacher, teacher, reduction="sum").item(),
        attention_cross_entropy(teacher, student + shift, reduction="sum").item(),
    )
    assert total == pytest.approx(shape[0] * mean, rel=1e-5, abs=1e-7)
    assert total >= least * (1 - 1e-5) - 1e-6
    assert shifted == pytest.approx(total, rel=1e-4, abs=1e-4)  # a map does not change with a shift


def test_equal_maps_give_the_entropy() -> None:
    teacher = logits(0)
    p = teacher.double().softmax(dim=-1)
    entropy = -(p * p.log()).sum(dim=-1).mean(dim=(1, 2, 3)).sum()
    found = attention_cross_entropy(teacher, teacher, reduction="sum")
    assert found.item() == pytest.approx(entropy.item(), rel=1e-6)


@pytest.mark.parametrize("layers", [1, 6])
def test_a_uniform_student_map_gives_the_logarithm_of_the_number_of_keys_per_layer(layers: int) -> None:
    teacher, student = logits(0, (layers, 2, 3, 7, 7)), torch.full((layers, 2, 3, 7, 7), 4.0)
    total = attention_cross_entropy(teacher, student, reduction="sum")
    assert total.item() == pytest.approx(layers * math.log(7), rel=1e-6)
    mean = attention_cross_entropy(teacher, student, reduction="mean")
    assert mean.item() == pytest.approx(math.log(7), rel=1e-6)


@reductions
def test_gradient_with_finite_differences(reduction: Reduction) -> None:
    # `.float()` in the loss would hide a wrong gradient in float32's rounding: perturbations are large.
    teacher, student = logits(0), logits(1).requires_grad_()
    attention_cross_entropy(teacher, student, reduction=reduction).backward()
    assert student.grad is not None
    step, flat = 2e-2, student.detach().flatten()
    for index in range(0, flat.numel(), 7):
        moved = [flat.clone(), flat.clone()]
        moved[0][index] += step
        moved[1][index] -= step
        up, down = (
            sum(naive(teacher.numpy().astype(float), m.view(SHAPE).numpy().astype(float))) for m in moved
        )
        expected = (up - down) / (2 * step) / (1 if reduction == "sum" else SHAPE[0])
        assert student.grad.flatten()[index].item() == pytest.approx(expected, abs=2e-5)


@reductions
def test_gradient_is_student_minus_teacher_map(reduction: Reduction) -> None:
    teacher, student = logits(0), logits(1).requires_grad_()
    attention_cross_entropy(teacher, student, reduction=reduction).backward()
    rows = SHAPE[1] * SHAPE[2] * SHAPE[3] * (1 if reduction == "sum" else SHAPE[0])
    expected = (student.detach().softmax(dim=-1) - teacher.softmax(dim=-1)) / rows
    torch.testing.assert_close(student.grad, expected, atol=1e-7, rtol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    teacher = torch.zeros(SHAPE)
    teacher[..., 0] = 1e4
    student = (-teacher).requires_grad_()
    loss = attention_cross_entropy(teacher, student, reduction="mean")
    loss.backward()
    assert loss.item() == pytest.approx(1e4 + math.log(3), rel=1e-6)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_other_shapes_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2, 2, 5, 4\), got \(3, 2, 1, 5, 4\)"):
        attention_cross_entropy(logits(0), logits(1)[:, :, :1], reduction="sum")


# The streamed loss, against the formula and PyTorch's own gradient of it.


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(
    teacher: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    teacher_bias: Tensor | float = 0.0,
    teacher_scale: float | None = None,
    bias: Tensor | float = 0.0,
    scale: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    teacher_logits, student_logits = (
        ((q.double() @ k.double().mT) * (q.shape[-1] ** -0.5 if s is None else s) + b) / temperature
        for q, k, b, s in (
            (teacher[:, 0], teacher[:, 1], teacher_bias, teacher_scale),
            (queries, keys, bias, scale),
        )
    )
    rows = -(teacher_logits.softmax(dim=-1) * student_logits.log_softmax(dim=-1)).sum(dim=-1)
    return rows.mean()


def streamed(teacher: Tensor, queries: Tensor, keys: Tensor, **options: Any) -> Tensor:
    return streamed_attention_cross_entropy(teacher[:, 0], teacher[:, 1], queries, keys, **options)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    block_bytes=st.integers(1, 3000),
    scale=st.floats(0.1, 5),
)
def test_streamed_loss_and_gradient_are_those_of_the_formula(
    seed: int, shape: tuple[int, int, int], widths: tuple[int, int], block_bytes: int, scale: float
) -> None:
    batch, heads, tokens = shape
    teacher = random(seed, batch, 2, heads, tokens, widths[0]) * scale
    made = [random(seed + 1 + part, batch, heads, tokens, widths[1]) * scale for part in (0, 1)]
    results = []
    for loss in (formula, lambda *parts: streamed(*parts, block_bytes=block_bytes)):
        queries, keys = (part.clone().requires_grad_() for part in made)
        value = loss(teacher, queries, keys)
        (3 * value).backward()
        results.append((value.detach(), queries.grad, keys.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_streamed_gradient_is_that_of_finite_differences() -> None:
    teacher, queries, keys = random(0, 2, 2, 2, 5, 3), random(1, 2, 2, 5, 4), random(2, 2, 2, 5, 4)
    inputs = (queries.requires_grad_(), keys.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: streamed(teacher, q, k, block_bytes=200), inputs)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6)),
    form=st.sampled_from(["per head", "one for all heads", "per query", "without batch axis"]),
    block_bytes=st.integers(1, 3000),
    scales=st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)),
    temperature=st.floats(0.3, 4),
)
def test_bias_scale_and_temperature_are_those_of_the_formula(
    *,
    seed: int,
    shape: tuple[int, int, int],
    form: str,
    block_bytes: int,
    scales: tuple[float, float],
    temperature: float,
) -> None:
    batch, heads, tokens = shape
    sizes = {
        "per head": (1, heads, tokens, tokens),
        "one for all heads": (1, 1, tokens, tokens),
        "per query": (1, heads, tokens, 1),
        "without batch axis": (heads, tokens, tokens),
    }[form]
    teacher = random(seed, batch, 2, heads, tokens, 3)
    made = [random(seed + 1 + part, batch, heads, tokens, 2) for part in (0, 1)]
    biases = [random(seed + 3 + part, *sizes) for part in (0, 1)]
    results = []
    for loss, options in ((formula, {}), (streamed, {"block_bytes": block_bytes})):
        queries, keys, bias = (part.clone().requires_grad_() for part in (*made, biases[1]))
        value = loss(
            teacher,
            queries,
            keys,
            teacher_bias=biases[0],
            teacher_scale=scales[0],
            bias=bias,
            scale=scales[1],
            temperature=temperature,
            **options,
        )
        (2 * value).backward()
        results.append((value.detach(), queries.grad, keys.grad, bias.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_the_gradient_of_a_bias_is_that_of_finite_differences() -> None:
    teacher, queries, keys = random(0, 2, 2, 2, 4, 3), random(1, 2, 2, 4, 3), random(2, 2, 2, 4, 3)
    inputs = (queries.requires_grad_(), keys.requires_grad_(), random(3, 1, 2, 4, 4).requires_grad_())
    assert torch.autograd.gradcheck(
        lambda q, k, b: streamed(teacher, q, k, bias=b, temperature=1.7, block_bytes=100), inputs
    )


def test_a_map_that_is_given_is_compared_as_the_formula_says() -> None:
    teacher, student = logits(0)[0].double(), logits(1)[0].double().requires_grad_()
    found = map_cross_entropy(teacher.softmax(dim=-1), student)
    expected = naive(teacher[None].numpy(), student.detach()[None].numpy())[0]
    assert found.item() == pytest.approx(expected)
    assert map_cross_entropy(
        torch.full((1, 1, 2, 8), 1 / 8), torch.zeros(1, 1, 2, 8)
    ).item() == pytest.approx(math.log(8))
    with pytest.raises(ValueError, match="expected student logits"):
        map_cross_entropy(teacher.softmax(dim=-1), student[:, :1])


@pytest.mark.parametrize("trained", ["queries", "keys"])
def test_streamed_gradient_of_one_alone(trained: str) -> None:
    teacher, made = (
        random(0, 2, 2, 2, 5, 4),
        {"queries": random(1, 2, 2, 5, 4), "keys": random(2, 2, 2, 5, 4)},
    )
    gradients = []
    for loss in (formula, streamed):
        parts = {name: value.clone().requires_grad_(name == trained) for name, value in made.items()}
        loss(teacher, parts["queries"], parts["keys"]).backward()
        gradients.append(parts[trained].grad)
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        value = streamed(teacher, **made)
    assert value.item() == pytest.approx(formula(teacher, **made).item())


def test_streamed_loss_of_uniform_maps_is_the_logarithm_of_the_tokens() -> None:
    zero = torch.zeros(3, 2, 7, 4)
    assert streamed(torch.zeros(3, 2, 2, 7, 5), zero, zero).item() == pytest.approx(math.log(7))


def test_streamed_loss_in_bfloat16_is_as_near_as_its_products() -> None:
    teacher = random(0, 4, 2, 2, 50, 16).float()
    made = [random(1 + part, 4, 2, 50, 16).bfloat16() for part in (0, 1)]
    expected, found = [], []
    for loss, values in ((formula, expected), (streamed, found)):
        queries, keys = (part.clone().requires_grad_() for part in made)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(teacher, queries, keys)
        value.backward()
        values += [value.detach(), queries.grad, keys.grad]
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(expected[0].item(), rel=2e-3)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b.double()).norm() < 0.02 * b.double().norm()


def test_streamed_loss_keeps_nothing_of_the_size_of_a_map() -> None:
    tokens = 300
    queries, keys = (random(part, 1, 2, tokens, 4).float().requires_grad_() for part in (0, 1))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        streamed(random(2, 1, 2, 2, tokens, 4).float(), queries, keys).backward()
    assert kept
    assert max(kept) == queries.numel()


@pytest.mark.parametrize(
    ("teacher", "student"),
    [((1, 2, 5, 4), (1, 3, 5, 4)), ((1, 2, 5, 4), (1, 2, 6, 4)), ((2, 2, 5, 4), (1, 2, 5, 4))],
    ids=["heads", "tokens", "batch"],
)
def test_streamed_loss_of_other_shapes_is_refused(teacher: tuple[int, ...], student: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected student queries and keys"):
        streamed_attention_cross_entropy(
            *torch.zeros(2, *teacher), torch.zeros(student), torch.zeros(student)
        )
