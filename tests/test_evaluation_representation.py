"""Nearest neighbours and linear probe against scikit-learn and SciPy; ranks against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from torch import Tensor

from attention_transfer.evaluation.representation import (
    effective_rank,
    knn_accuracy,
    linear_probe_accuracy,
)

MODULE = "attention_transfer.evaluation.representation"
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_data(*, training: int = 150, test: int = 400, classes: int = 4, width: int = 6) -> Data:
    """Overlapping classes of uneven features: training and test examples, each with labels."""
    labels = torch.randint(classes, (training + test,), generator=torch.Generator().manual_seed(1))
    scales = torch.logspace(-1, 1, width, dtype=torch.float64)
    features = (draw(classes, width)[labels] + draw(len(labels), width, seed=2)) * scales + 1
    return features[:training], labels[:training], features[training:], labels[training:]


@pytest.mark.parametrize("k", [1, 2, 20, 150])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_knn_is_scikit_learns_with_its_weights(k: int, temperature: float) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / temperature)

    features, labels, test_features, test_labels = data = make_data()
    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    oracle.fit(features.numpy(), labels.numpy())
    expected = oracle.score(test_features.numpy(), test_labels.numpy())
    assert 0.3 < expected < 0.9
    assert knn_accuracy(*data, k=k, temperature=temperature) == pytest.approx(expected, abs=1e-12)


def test_neighbours_and_temperature_matter() -> None:
    data = make_data()
    found = {knn_accuracy(*data, k=k, temperature=t) for k, t in ((1, 1), (20, 1), (150, 1), (150, 0.07))}
    assert len(found) == 4


@pytest.mark.parametrize("block", [1, 150 * 7, 150 * 400])
def test_knn_in_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    data = make_data()
    expected = knn_accuracy(*data, k=9, temperature=0.1)
    monkeypatch.setattr(f"{MODULE}.BLOCK", block)
    assert knn_accuracy(*data, k=9, temperature=0.1) == expected


def test_votes_by_hand() -> None:
    angles = torch.tensor([0.0, 0.3, 0.31, 3.0])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([2, 1, 1, 0])
    query = torch.tensor([[5.0, 0.0]])  # length is of no effect

    def predicted(k: int, temperature: float) -> list[int]:
        return [
            label
            for label in range(4)
            if knn_accuracy(features, labels, query, torch.tensor([label]), k=k, temperature=temperature)
        ]

    assert predicted(1, 0.07) == [2]
    assert predicted(3, 1.0) == [1]  # two against one, nearly as near
    assert predicted(3, 0.01) == [2]  # exp(1 / 0.01) against twice exp(0.955 / 0.01)
    assert predicted(4, 1e-5) == [2]  # exp(1e5) is beyond any format
    features, labels = query.expand(2, 2), torch.tensor([3, 1])
    assert predicted(2, 1.0) == [1]  # equal votes


@settings(deadline=None, max_examples=15)
@given(scale=st.floats(1e-20, 1e20), seed=st.integers(0, 100))
def test_knn_ignores_length_and_rotation(scale: float, seed: int) -> None:
    features, labels, test_features, test_labels = make_data(test=100)
    rotation = torch.linalg.qr(draw(6, 6, seed=seed)).Q
    lengths = draw(150, 1, seed=seed).exp()
    found = knn_accuracy(
        features * lengths @ rotation,
        labels,
        scale * test_features @ rotation,
        test_labels,
        k=5,
        temperature=0.1,
    )
    assert found == knn_accuracy(features, labels, test_features, test_labels, k=5, temperature=0.1)


def probe_by_scipy(data: Data, regularisation: float) -> float:
    """The objective of the docstring, minimised as it stands."""
    features, labels, test_features, test_labels = (tensor.numpy() for tensor in data)
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    x, classes = (features - mean) / deviation, int(labels.max()) + 1
    onehot = np.eye(classes)[labels]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, biases = flat[:-classes].reshape(-1, classes), flat[-classes:]
        logits = x @ weights + biases
        loss = (logsumexp(logits, axis=1) - (logits * onehot).sum(axis=1)).mean()
        gradient = (softmax(logits, axis=1) - onehot) / len(x)
        of_weights = x.T @ gradient + regularisation * weights
        total = loss + regularisation * (weights**2).sum() / 2
        return float(total), np.concatenate([of_weights.ravel(), gradient.sum(axis=0)])

    found = minimize(objective, np.zeros((x.shape[1] + 1) * classes), jac=True, method="BFGS", tol=1e-7)
    weights, biases = found.x[:-classes].reshape(-1, classes), found.x[-classes:]
    logits = (test_features - mean) / deviation @ weights + biases
    return float((logits.argmax(axis=1) == test_labels).mean())


def test_probe_minimises_the_objective() -> None:
    data = make_data()
    regularisations = [0.001, 0.1, 1.0, 10.0]
    expected = [probe_by_scipy(data, regularisation) for regularisation in regularisations]
    assert len(set(expected)) == len(expected)  # the regularisation matters here
    found = [linear_probe_accuracy(*data, regularisation=value) for value in regularisations]
    assert found == pytest.approx(expected, abs=1e-12)
    assert found == [linear_probe_accuracy(*data, regularisation=value) for value in regularisations]


def test_probe_standardises_by_the_training_examples() -> None:
    features, labels, test_features, test_labels = data = make_data(test=20)
    expected = linear_probe_accuracy(*data, regularisation=0.1)
    # Units of the features are of no effect, nor is one without any variation in training.
    units = torch.tensor([2.0**power for power in (-9, 0, 3, 8, -2, 5)])
    scaled = linear_probe_accuracy(
        features * units + 1, labels, test_features * units + 1, test_labels, regularisation=0.1
    )
    assert scaled == expected
    constant = linear_probe_accuracy(
        torch.cat([features, torch.full((150, 1), 0.1)], dim=1),
        labels,
        torch.cat([test_features, draw(20, 1, seed=7)], dim=1),
        test_labels,
        regularisation=0.1,
    )
    assert constant == expected
    # What a test example is taken for does not depend on the others.
    alone = [
        linear_probe_accuracy(features, labels, one[None], label[None], regularisation=0.1)
        for one, label in zip(test_features, test_labels, strict=True)
    ]
    assert np.mean(alone) == pytest.approx(expected)


def test_probe_regularises_the_mean() -> None:
    features, labels, *test = make_data()
    once = linear_probe_accuracy(features, labels, *test, regularisation=1.0)
    thrice = linear_probe_accuracy(features.repeat(3, 1), labels.repeat(3), *test, regularisation=1.0)
    assert once == thrice


def test_a_probe_that_does_not_converge_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}.ITERATIONS", 2)
    with pytest.raises(ValueError, match="expected the linear probe to converge within 2 iterations"):
        linear_probe_accuracy(*make_data(), regularisation=0.1)


@settings(deadline=None, max_examples=30)
@given(
    values=st.lists(st.floats(0.0625, 16), min_size=1, max_size=6),
    scale=st.floats(1e-9, 1e9),
    seed=st.integers(0, 1000),
)
def test_effective_rank_of_known_singular_values(values: list[float], scale: float, seed: int) -> None:
    rank = len(values)
    left, right = (torch.linalg.qr(draw(size, rank, seed=seed)).Q for size in (20, 8))
    features = scale * left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T
    total = math.fsum(values)
    expected = math.exp(-math.fsum(v / total * math.log(v / total) for v in values))
    for given_features in (features, features.T, features.flip(0), torch.cat([features, features])):
        assert effective_rank(given_features) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_directions_used_alike_count_one_each(rank: int) -> None:
    assert effective_rank(torch.eye(10)[:rank].repeat(4, 1)) == pytest.approx(rank, rel=1e-12)


def test_collapse_has_rank_one() -> None:
    point = draw(1, 50)
    assert effective_rank(point.expand(30, 50)) == pytest.approx(1.0, abs=1e-9)
    assert effective_rank(draw(30, 1, seed=1) * point) == pytest.approx(1.0, abs=1e-9)
    assert effective_rank(point) == pytest.approx(1.0, abs=1e-9)
    # On the way there, a mean that grows over the variation.
    ranks = [effective_rank(draw(200, 50, seed=2) + size * point) for size in (0, 1, 10, 100)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > 45
    assert ranks[-1] < 3


def test_unsound_input_is_refused() -> None:
    x, y, tx, ty = data = make_data()
    zero, undefined = x.clone(), x.clone()
    zero[3], undefined[3, 1] = 0, torch.nan

    def knn(*given: Tensor, k: int = 5, temperature: float = 0.1) -> float:
        return knn_accuracy(*given, k=k, temperature=temperature)

    def probe(*given: Tensor, regularisation: float = 0.1) -> float:
        return linear_probe_accuracy(*given, regularisation=regularisation)

    for use, message in (
        (lambda: knn(*data, k=0), "k: expected 1 to 150, the training examples, got 0"),
        (lambda: knn(*data, k=151), "k: expected 1 to 150, the training examples, got 151"),
        (lambda: knn(*data, temperature=0), "temperature: expected a positive number, got 0"),
        (lambda: knn(*data, temperature=math.nan), "temperature: expected a positive number, got nan"),
        (lambda: knn(zero, y, tx, ty), "^features: expected features with a direction"),
        (lambda: knn(x, y, zero, y), "test_features: expected features with a direction"),
        (lambda: probe(*data, regularisation=0), "regularisation: expected a positive number, got 0"),
        (
            lambda: probe(*data, regularisation=math.inf),
            "regularisation: expected a positive number, got inf",
        ),
        (lambda: probe(x, y * 0, tx, ty), "labels: expected at least two classes, got only 0"),
        (lambda: effective_rank(torch.zeros(3, 2)), "expected some that are not zero"),
        (lambda: effective_rank(undefined), "features: expected finite features"),
        (lambda: effective_rank(x[0]), r"features: expected floating point .* got torch.float64 \(6,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    for accuracy in (knn, probe):
        for given_data, message in (
            ((undefined, y, tx, ty), "^features: expected finite features"),
            (
                (x, y, tx[:0], ty[:0]),
                r"test_features: expected .* none of them 0, got torch.float64 \(0, 6\)",
            ),
            ((x.long(), y, tx, ty), "^features: expected floating point .* got torch.int64"),
            ((x, y[:-1], tx, ty), r"^labels: expected torch.int64 \(150,\), got torch.int64 \(149,\)"),
            ((x, y, tx, ty.double()), r"test_labels: expected torch.int64 \(400,\), got torch.float64"),
            ((x, y, tx, ty - 1), "test_labels: expected class indices, got -1"),
            ((x, y, tx[:, :5], ty), "test_features: expected width 6 as in training, got 5"),
        ):
            with pytest.raises(ValueError, match=message):
                accuracy(*given_data)
