"""Detection of out-of-distribution examples against scikit-learn and naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from attention_transfer.evaluation.ood import Score, detect

SCORES: tuple[Score, Score] = ("max_probability", "energy")


def confidences(logits: torch.Tensor, score: Score) -> list[float]:
    if score == "energy":
        return [math.log(math.fsum(map(math.exp, row))) for row in logits.tolist()]
    return [math.exp(max(row)) / math.fsum(map(math.exp, row)) for row in logits.tolist()]


def naive(inside: list[float], outside: list[float]) -> dict[str, float]:
    wins = math.fsum((i > o) + 0.5 * (i == o) for i in inside for o in outside)
    passing = [
        sum(o >= threshold for o in outside) / len(outside)
        for threshold in inside
        if 100 * sum(i >= threshold for i in inside) >= 95 * len(inside)
    ]
    return {"auroc": wins / len(inside) / len(outside), "fpr95": min(passing)}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("inside", "outside"), [(1, 1), (19, 30), (20, 7), (21, 50), (200, 150)])
def test_detect_equals_the_definitions(score: Score, inside: int, outside: int) -> None:
    generator = torch.Generator().manual_seed(inside)
    ins = 3 * torch.randn(inside, 5, generator=generator)
    outs = 2 * torch.randn(outside, 5, generator=generator)
    found = detect(ins, outs, score)
    values = confidences(ins, score), confidences(outs, score)
    assert found == pytest.approx(naive(*values), abs=1e-9)
    expected = roc_auc_score([1] * inside + [0] * outside, values[0] + values[1])
    assert found["auroc"] == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    inside=st.lists(st.integers(0, 6), min_size=1, max_size=45),
    outside=st.lists(st.integers(0, 6), min_size=1, max_size=45),
    score=st.sampled_from(SCORES),
)
def test_ties(inside: list[int], outside: list[int], score: Score) -> None:
    """Logits (k, 0) give scores that grow with k: the integers themselves are the oracle's scores."""
    ins, outs = (torch.tensor([[float(k), 0.0] for k in ks]) for ks in (inside, outside))
    assert detect(ins, outs, score) == pytest.approx(naive(inside, outside), abs=1e-12)


@pytest.mark.parametrize("score", SCORES)
def test_closed_forms(score: Score) -> None:
    high, low = torch.tensor([[9.0, 0.0]]).repeat(40, 1), torch.tensor([[1.0, 0.0]]).repeat(30, 1)
    assert detect(high, low, score) == {"auroc": 1.0, "fpr95": 0.0}
    assert detect(low, high, score) == {"auroc": 0.0, "fpr95": 1.0}
    assert detect(high, high, score) == {"auroc": 0.5, "fpr95": 1.0}
    mixed = torch.cat([high[:38], low[:2]])  # 38 of 40 are 95 %: the threshold is the high score
    assert detect(mixed, low, score)["fpr95"] == 0.0
    assert detect(torch.cat([high[:37], low[:3]]), low, score)["fpr95"] == 1.0


def test_energy_does_not_saturate() -> None:
    """Energies of 40 and 50 are one number after a float32 sigmoid; here they are not."""
    high, low = torch.tensor([[50.0, 0.0]]), torch.tensor([[40.0, 0.0]])
    assert detect(high, low, "energy") == {"auroc": 1.0, "fpr95": 0.0}
    barely = torch.tensor([[50.0, 25.0]])  # higher by exp(-25), which float32 drops
    assert detect(barely, high, "energy") == {"auroc": 1.0, "fpr95": 0.0}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), score=st.sampled_from(SCORES))
def test_order_is_of_no_effect_and_exchange_mirrors(seed: int, score: Score) -> None:
    rng = np.random.default_rng(seed)
    ins = torch.from_numpy(rng.normal(0, 3, (30, 4))).float()
    outs = torch.from_numpy(rng.normal(0, 2, (20, 4))).float()
    found = detect(ins, outs, score)
    assert detect(ins[rng.permutation(30)], outs[rng.permutation(20)], score) == pytest.approx(
        found, abs=1e-12
    )
    assert detect(outs, ins, score)["auroc"] == pytest.approx(1 - found["auroc"], abs=1e-12)


def test_unsound_input_is_refused() -> None:
    good = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="out_logits: expected 4 classes, got 5"):
        detect(good, torch.zeros(3, 5), "energy")
    with pytest.raises(ValueError, match="in_logits: expected finite"):
        detect(torch.full((3, 4), math.nan), good, "energy")
    with pytest.raises(ValueError, match=r"out_logits: expected \(examples"):
        detect(good, torch.zeros(0, 4), "energy")
    with pytest.raises(ValueError, match="expected max_probability or energy, got 'entropy'"):
        detect(good, good, "entropy")  # type: ignore[arg-type]
