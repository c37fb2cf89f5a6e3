"""Temperatures against closed forms, a naive float64 minimiser and known miscalibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from attention_transfer.evaluation.calibration import fit_temperature, rescaled
from attention_transfer.evaluation.metrics import score


def drawn(
    seed: int, examples: int = 400, classes: int = 5, overconfidence: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Logits that are `overconfidence` times those that the labels are drawn from."""
    generator = torch.Generator().manual_seed(seed)
    true = 1.5 * torch.randn(examples, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(true.softmax(dim=1), 1, generator=generator).squeeze(1)
    return overconfidence * true, labels


def naive_nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    losses = []
    for row, label in zip(logits.double().numpy() / temperature, labels.tolist(), strict=True):
        losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
    return float(np.mean(losses))


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize(("margin", "right"), [(3.0, 0.9), (3.0, 0.6), (0.01, 0.75)])
def test_equal_margins_have_a_closed_form(classes: int, margin: float, right: float) -> None:
    """One logit of `margin`, the others 0, right in a share q: e^(m/T) / (e^(m/T) + C - 1) = q."""
    examples = 200
    logits = torch.zeros(examples, classes)
    logits[:, 0] = margin
    labels = (torch.arange(examples) >= round(right * examples)).long()
    expected = margin / math.log(right * (classes - 1) / (1 - right))
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    examples=st.integers(60, 200),
    classes=st.integers(2, 8),
    overconfidence=st.floats(0.1, 10),
)
def test_the_temperature_is_the_best_one(
    seed: int, examples: int, classes: int, overconfidence: float
) -> None:
    logits, labels = drawn(seed, examples, classes, overconfidence)
    found = fit_temperature(logits, labels)
    search = minimize_scalar(
        lambda x: naive_nll(logits, labels, math.exp(x)),
        bounds=(math.log(1e-3), math.log(1e3)),
        method="bounded",
    )
    assert naive_nll(logits, labels, found) <= search.fun + 1e-12
    # stationary: the derivative of the likelihood by T, by automatic differentiation
    temperature = torch.tensor(found, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(logits / temperature, labels).backward()
    assert temperature.grad is not None
    assert abs(temperature.grad.item()) * found < 1e-8
    # and so the best temperature of the rescaled logits is 1
    assert fit_temperature(rescaled(logits, found), labels) == pytest.approx(1.0, rel=1e-8)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), factor=st.floats(0.02, 50))
def test_scale_and_constants(seed: int, factor: float) -> None:
    logits, labels = drawn(seed)
    found = fit_temperature(logits, labels)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor * found, rel=1e-8)
    constants = 100 * torch.randn(
        len(logits), 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    assert fit_temperature(logits + constants, labels) == pytest.approx(found, rel=1e-8)


def test_it_finds_the_overconfidence_and_repairs_it() -> None:
    logits, labels = drawn(3, examples=20000, overconfidence=4.0)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(4.0, rel=0.05)
    before, after = score(logits, labels, bins=15), score(rescaled(logits, found), labels, bins=15)
    assert before["ece"] > 0.1
    assert after["ece"] < 0.02
    assert after["nll"] < before["nll"]
    assert after["accuracy"] == before["accuracy"]


def test_half_precision_is_no_limit() -> None:
    logits = torch.tensor([[60000.0, 0.0], [0.0, 60000.0], [60000.0, 0.0]], dtype=torch.float16)
    assert rescaled(logits, 0.1).tolist() == [
        [pytest.approx(6e5), 0.0],
        [0.0, pytest.approx(6e5)],
        [pytest.approx(6e5), 0.0],
    ]
    coarse, labels = drawn(4, overconfidence=1.0)
    exact = coarse.half()
    assert fit_temperature(exact, labels) == fit_temperature(exact.double(), labels)
    assert not torch.equal(exact.double(), coarse)


def test_without_a_finite_optimum_nothing_is_returned() -> None:
    logits, _ = drawn(5)
    right = logits.argmax(dim=1)
    with pytest.raises(
        ValueError, match=r"expected an example whose label has not the highest logit.*400 examples"
    ):
        fit_temperature(logits, right)
    tied = torch.tensor([[1.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match="has not the highest logit"):
        fit_temperature(tied, torch.tensor([1]))
    with pytest.raises(ValueError, match="higher logits than the average class"):
        fit_temperature(logits, logits.argmin(dim=1))
    with pytest.raises(ValueError, match="has not the highest logit"):  # nothing to scale
        fit_temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
    # one wrong example decides, however small its margin: the optimum is finite, but out of the range
    one_wrong = torch.tensor([[5.0, 0.0], [5.0, 0.0], [0.0, 1e-6]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected one between 0.001 and 1000, got one below 0.001"):
        fit_temperature(1e-4 * one_wrong, torch.tensor([0, 0, 0]))
    base, labels = drawn(6)
    with pytest.raises(ValueError, match="got one above 1000"):
        fit_temperature(1e5 * base, labels)


def test_unsound_input_is_refused() -> None:
    logits, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    for use, message in (
        (lambda: fit_temperature(logits[0], labels), r"logits: expected \(examples >= 1, classes >= 2\)"),
        (lambda: fit_temperature(logits, labels[:2]), r"labels: expected shape \(3,\), got \(2,\)"),
        (lambda: rescaled(logits.long(), 1.0), "logits: expected floating point"),
        (lambda: rescaled(logits, 0.0), "temperature: expected a positive number, got 0.0"),
        (lambda: rescaled(logits, math.inf), "temperature: expected a positive number, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
