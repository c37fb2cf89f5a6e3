"""What falls otherwise than published, from the claims alone."""

from __future__ import annotations

import math

from attention_transfer.evaluation.statistics import Interval
from attention_transfer.reporting import claims, follow_ups, wording
from attention_transfer.reporting.claims import Claim
from attention_transfer.reporting.contrasts import Verdict
from attention_transfer.reporting.experiment_claims import CONTRASTS
from attention_transfer.reporting.further_claims import FURTHER

KNOWN = {*claims.RULES, *(each.id for each in (*CONTRASTS, *FURTHER))}


def claim(name: str, verdict: Verdict) -> Claim:
    effect = Interval(0.1, math.nan, math.nan, 1)
    return Claim(name, "c", "p", "r", effect, verdict, effect_text="a minus b", confidence=0.95)


def test_contradicted_claims_come_first_and_bring_what_asks_them_again() -> None:
    found = follow_ups.surprises(
        [
            claim("main/copy", "not resolved"),
            claim("qkv/value", "supported"),  # nobody has asked it again
            claim("heads/more_copy", "supported"),
            claim("averaging/queries_copy", "contradicted"),
            claim("draw_1/copy", "supported"),
            claim("labels/copy", "contradicted"),
        ]
    )
    assert [each.claim.id for each in found] == ["averaging/queries_copy", "labels/copy", "main/copy"]
    assert found[0].again == found[1].again == ()
    assert [(changed, each.id) for changed, each in found[2].again] == [
        ("another draw of the labels", "draw_1/copy"),
        ("ten times the labels", "labels/copy"),
    ]


def test_every_claim_that_asks_again_is_one_and_says_what_it_changes() -> None:
    assert {*follow_ups.ASKS_AGAIN, *follow_ups.ASKS_AGAIN.values()} <= KNOWN
    for again, asked in follow_ups.ASKS_AGAIN.items():
        assert again.split("/")[0] in follow_ups.CHANGED
        assert again.split("/")[0] != asked.split("/")[0]
    further = {name.split("/")[0] for name in KNOWN} & set(follow_ups.CHANGED)
    assert {name for name in KNOWN if name.split("/")[0] in further} == set(follow_ups.ASKS_AGAIN)


def test_other_words_are_for_claims_that_there_are() -> None:
    assert {*wording.CLAIMS, *wording.EFFECTS} <= KNOWN
    for words in wording.CLAIMS.values():
        assert words.endswith(".")
        assert "_" not in words


def test_an_effect_that_is_no_difference_of_two_runs_has_words_of_its_own() -> None:
    for contrast in CONTRASTS:
        words = wording.effect(contrast)
        assert "−" not in words
        assert "  " not in words
        if len(contrast.weights) > 2:
            assert contrast.id in wording.EFFECTS, contrast.id
