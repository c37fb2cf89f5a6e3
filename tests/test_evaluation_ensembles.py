"""Ensembles of two and the likeness of their errors, against naive loops and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from attention_transfer.evaluation.ensembles import combine, compare_members


def draw(examples: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (examples,), generator=generator)
    signal = 2 * torch.nn.functional.one_hot(labels, classes).float()
    first, second = (signal + 1.5 * torch.randn(examples, classes, generator=generator) for _ in range(2))
    return first, second, labels


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(map(math.exp, row))
    return [math.exp(value) / total for value in row]


def test_members_and_ensemble_equal_the_definitions() -> None:
    first, second, labels = draw(500, 7, seed=3)
    average = [
        [(p + q) / 2 for p, q in zip(softmax(a), softmax(b), strict=True)]
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    combined = combine(first, second)
    assert combined.dtype == torch.float64
    torch.testing.assert_close(combined, torch.tensor(average, dtype=torch.float64), atol=1e-12, rtol=0)

    def top(rows: list[list[float]]) -> list[int]:
        return [row.index(max(row)) for row in rows]

    tops = [top(first.tolist()), top(second.tolist()), top(average)]
    right = [[c == label for c, label in zip(t, labels.tolist(), strict=True)] for t in tops]
    accuracies = [sum(r) / 500 for r in right]
    assert compare_members(first, second, labels) == pytest.approx(
        {
            "accuracy": accuracies[2],
            "first_accuracy": accuracies[0],
            "second_accuracy": accuracies[1],
            "gain": accuracies[2] - max(accuracies[:2]),
            "disagreement": sum(a != b for a, b in zip(tops[0], tops[1], strict=True)) / 500,
            "error_consistency": cohen_kappa_score(right[0], right[1]),
        },
        abs=1e-12,
    )


def of_classes(classes: list[int]) -> torch.Tensor:
    return 5 * torch.nn.functional.one_hot(torch.tensor(classes), 3).float()


def test_kappa_closed_forms() -> None:
    labels = torch.zeros(4, dtype=torch.int64)

    def kappa(first: list[int], second: list[int]) -> float:
        return compare_members(of_classes(first), of_classes(second), labels)["error_consistency"]

    assert kappa([0, 0, 1, 1], [0, 0, 2, 2]) == 1.0  # wrong together, if in different ways
    assert kappa([0, 0, 1, 1], [1, 1, 0, 0]) == -1.0
    assert kappa([0, 0, 1, 1], [0, 1, 0, 1]) == 0.0
    assert kappa([0, 0, 0, 0], [0, 0, 0, 1]) == 0.0  # one member never errs: as by chance
    assert kappa([0, 0, 0, 0], [1, 1, 1, 1]) == 0.0
    assert math.isnan(kappa([0, 0, 0, 0], [0, 0, 0, 0]))
    assert math.isnan(kappa([1, 1, 1, 1], [2, 2, 2, 2]))


def test_probabilities_are_averaged_not_logits() -> None:
    """A member sure of class 0 and one that leans to 1: averaged logits would choose 0 by far more."""
    first, second = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]])
    torch.testing.assert_close(combine(first, second), torch.tensor([[0.625, 0.375]], dtype=torch.float64))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 8), constant=st.integers(-500, 500))
def test_properties(seed: int, classes: int, constant: int) -> None:
    first, second, labels = draw(40, classes, seed)
    first, second = ((logits * 16).round() / 16 for logits in (first, second))
    found = compare_members(first, second, labels)
    # a constant on one member's logits, and the order of the examples, change nothing
    assert compare_members(first + constant, second, labels) == pytest.approx(found, abs=1e-12, nan_ok=True)
    order = torch.arange(39, -1, -1)
    reversed_order = compare_members(first[order], second[order], labels[order])
    assert reversed_order == pytest.approx(found, abs=1e-12, nan_ok=True)
    # the members' roles are symmetric
    mirrored = compare_members(second, first, labels)
    mirrored["first_accuracy"], mirrored["second_accuracy"] = (
        found["first_accuracy"],
        found["second_accuracy"],
    )
    assert mirrored == pytest.approx(found, abs=1e-12, nan_ok=True)
    torch.testing.assert_close(combine(first, second).sum(dim=1), torch.ones(40, dtype=torch.float64))


def test_a_model_with_itself() -> None:
    first, _, labels = draw(200, 6, seed=5)
    torch.testing.assert_close(combine(first, first), first.double().softmax(dim=1), atol=0, rtol=0)
    found = compare_members(first, first, labels)
    assert found["gain"] == found["disagreement"] == 0.0
    assert found["error_consistency"] == 1.0
    assert found["accuracy"] == found["first_accuracy"] == found["second_accuracy"]


def test_unsound_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"second: expected shape \(3, 4\), got \(3, 5\)"):
        combine(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="second: expected finite"):
        combine(torch.zeros(3, 4), torch.full((3, 4), math.nan))
    with pytest.raises(ValueError, match=r"labels: expected shape \(3,\), got \(2,\)"):
        compare_members(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))
