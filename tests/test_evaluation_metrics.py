"""Scores against naive float64 loops, closed forms and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from attention_transfer.evaluation.metrics import correct, score

KEYS = {"accuracy", "top5", "nll", "brier", "ece"}


def draw(examples: int, classes: int, seed: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(examples, classes, generator=generator)
    return logits, torch.randint(classes, (examples,), generator=generator)


def naive(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> dict[str, float]:
    """The definitions, one example and one class at a time, in Python floats."""
    right, top5, nll, brier = [], [], [], []
    held: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        largest = max(row)
        total = math.fsum(math.exp(value - largest) for value in row)
        p = [math.exp(value - largest) / total for value in row]
        right.append(order[0] == label)
        top5.append(label in order[:5])
        nll.append(math.log(total) + largest - row[label])
        brier.append(math.fsum((p[c] - (c == label)) ** 2 for c in range(len(p))))
        [at] = [m for m in range(1, bins + 1) if (m - 1) / bins < min(max(p), 1.0) <= m / bins]
        held.setdefault(at, []).append((max(p), right[-1]))
    ece = 0.0
    for members in held.values():
        accuracy = sum(hit for _, hit in members) / len(members)
        ece += len(members) / len(right) * abs(accuracy - math.fsum(c for c, _ in members) / len(members))
    means = {"accuracy": right, "top5": top5, "nll": nll, "brier": brier}
    return {name: math.fsum(values) / len(values) for name, values in means.items()} | {"ece": ece}


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("bins", [1, 15])
def test_scores_equal_the_naive_definitions(scale: float, bins: int) -> None:
    logits, labels = draw(2000, 10, seed=1, scale=scale)
    logits[::50, 3] = logits[::50, 7]  # some ties
    found = score(logits, labels, bins=bins)
    assert set(found) == KEYS
    assert all(type(value) is float for value in found.values())
    assert found == pytest.approx(naive(logits, labels, bins), abs=1e-9)


def test_scores_agree_with_torchmetrics_within_its_float32() -> None:
    logits, labels = draw(3000, 10, seed=2)
    found = score(logits, labels, bins=15)
    ece = multiclass_calibration_error(logits.softmax(1), labels, num_classes=10, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(ece), abs=1e-5)
    for key, k in (("accuracy", 1), ("top5", 5)):
        expected = multiclass_accuracy(logits, labels, num_classes=10, average="micro", top_k=k)
        assert found[key] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("classes", [2, 5, 6, 10])
def test_uniform_logits(classes: int) -> None:
    labels = torch.arange(classes).repeat(20)
    found = score(torch.zeros(len(labels), classes), labels, bins=7)
    expected = {
        "accuracy": 1 / classes,  # the lowest index wins a tie
        "nll": math.log(classes),
        "brier": 1 - 1 / classes,
        "ece": 0.0,
    }
    if classes > 5:
        expected["top5"] = 5 / classes
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("shift", "accuracy", "brier", "ece"), [(0, 1.0, 0.0, 0.0), (1, 0.0, 2.0, 1.0)])
def test_full_confidence(shift: int, accuracy: float, brier: float, ece: float) -> None:
    labels = torch.arange(6).repeat(4)
    logits = 1000 * torch.nn.functional.one_hot((labels + shift) % 6, 6).float()
    found = score(logits, labels, bins=10)
    assert [found["accuracy"], found["brier"], found["ece"]] == pytest.approx(
        [accuracy, brier, ece], abs=1e-12
    )
    assert found["nll"] == pytest.approx(1000.0 * shift, abs=1e-9)


def test_full_confidence_shares_the_last_bin() -> None:
    """A wrong answer at confidence 1 and a right one at 0.95: one bin, accuracy 0.5, confidence 0.975."""
    logits = torch.tensor([[1000.0, 0.0], [math.log(0.95), math.log(0.05)]])
    assert score(logits, torch.tensor([1, 0]), bins=10)["ece"] == pytest.approx(0.475, abs=1e-6)


def test_an_edge_belongs_to_the_bin_below() -> None:
    """Confidence 0.5 (wrong) and 0.75 (right) with edges at 0.5: two bins, errors 0.5 and 0.25."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert score(logits, torch.tensor([1, 0]), bins=2)["ece"] == pytest.approx(0.375, abs=1e-6)


def test_nll_stays_finite_where_float32_probabilities_vanish() -> None:
    found = score(torch.tensor([[0.0, 500.0]]), torch.tensor([0]), bins=5)
    assert found["nll"] == pytest.approx(500.0)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), examples=st.integers(1, 40), classes=st.integers(2, 12))
def test_order_of_examples_is_of_no_effect(seed: int, examples: int, classes: int) -> None:
    logits, labels = draw(examples, classes, seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(examples))
    expected = score(logits, labels, bins=15)
    assert score(logits[order], labels[order], bins=15) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 12), constant=st.integers(-1000, 1000))
def test_a_constant_added_to_the_logits_changes_nothing(seed: int, classes: int, constant: int) -> None:
    logits, labels = draw(30, classes, seed)
    logits = (logits * 16).round() / 16  # so that float32 adds the constant without rounding
    added = torch.full((30, 1), float(constant))
    assert score(logits + added, labels, bins=15) == pytest.approx(score(logits, labels, bins=15), abs=1e-10)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 12), scale=st.floats(0, 200))
def test_scores_keep_their_ranges(seed: int, classes: int, scale: float) -> None:
    logits, labels = draw(25, classes, seed, scale)
    found = score(logits, labels, bins=10)
    assert 0 <= found["accuracy"] <= found.get("top5", 1.0) <= 1
    assert found["nll"] >= 0
    assert -1e-12 <= found["brier"] <= 2 + 1e-12
    assert 0 <= found["ece"] <= 1
    assert found["accuracy"] == pytest.approx(correct(logits, labels).double().mean().item(), abs=1e-12)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), r"expected \(examples.*got \(3,\)"),
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), r"got \(0, 4\)"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), r"expected shape \(3,\), got \(2,\)"),
        (torch.zeros(3, 4), torch.zeros(3), "expected torch.int64, got torch.float32"),
        (
            torch.zeros(3, 4).long(),
            torch.zeros(3, dtype=torch.int64),
            "expected floating point, got torch.int64",
        ),
        (torch.zeros(3, 4), torch.tensor([0, 1, 4]), "expected 0 to 3, got 0 to 4"),
        (torch.zeros(3, 4), torch.tensor([0, 1, -1]), "expected 0 to 3, got -1 to 1"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "finite values, got others in 1 examples"),
        (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), "finite values, got others in 1 examples"),
    ],
)
def test_unsound_input_is_refused(logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    for use in (lambda: score(logits, labels, bins=5), lambda: correct(logits, labels)):
        with pytest.raises(ValueError, match=message):
            use()


def test_no_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        score(torch.zeros(1, 2), torch.tensor([0]), bins=0)
