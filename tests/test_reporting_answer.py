"""The words for a share of the gap say no more than its interval does."""

from __future__ import annotations

import math

import pytest

from attention_transfer.evaluation.statistics import Interval
from attention_transfer.reporting.answer import share


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.10, 1.22, "more than all of"),
        (0.95, 1.05, "most or all of"),
        (0.60, 0.90, "most of"),
        (0.46, 0.56, "about half of"),
        (0.20, 0.80, "a part of"),  # around a half, but wide
        (0.30, 1.10, "a part of"),
        (0.10, 0.40, "less than half of"),
        (-0.10, 0.70, "nothing that these seeds could show of"),
        (-0.30, -0.10, "less than nothing of"),
        (math.nan, math.nan, "a share, which one seed cannot tell, of"),
    ],
)
def test_a_share_in_words(low: float, high: float, words: str) -> None:
    assert share(Interval((low + high) / 2, low, high, 5)) == words
