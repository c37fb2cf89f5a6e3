"""Verdicts follow the written rules, on records made so that the right verdict is known."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import synthetic_records as synthetic
from scipy.stats import ttest_rel
from synthetic_records import Numbers

from attention_transfer.config import Study
from attention_transfer.evaluation.statistics import Interval
from attention_transfer.reporting import claims, wording
from attention_transfer.reporting.claims import Claim
from attention_transfer.reporting.contrasts import Verdict
from attention_transfer.reporting.records import load


def judge(
    tmp_path: Path, numbers: Numbers, study: Study | None = None
) -> tuple[dict[str, Claim], dict[str, str]]:
    study = study or synthetic.study()
    metrics, _ = synthetic.write(tmp_path, study, numbers)
    assert study.report is not None
    judged, untested = claims.judge(load(study, metrics), study.report)
    return {claim.id: claim for claim in judged}, untested


NOISY = (0.80, 0.84, 0.88)


@pytest.mark.parametrize(
    ("claim", "numbers", "verdict"),
    [
        ("main/pretraining_helps", Numbers(), "supported"),
        ("main/pretraining_helps", Numbers(accuracy={"finetune": 0.75}), "contradicted"),
        ("main/pretraining_helps", Numbers(accuracy={"finetune": NOISY, "scratch": 0.84}), "not resolved"),
        ("main/copy", Numbers(), "supported"),
        ("main/copy", Numbers(accuracy={"copy": 0.81}), "contradicted"),
        ("main/copy", Numbers(accuracy={"copy": 0.83}), "not resolved"),
        # no gap shown, or a negative one: whatever the ratio is, it says nothing
        ("main/copy", Numbers(accuracy={"finetune": NOISY, "scratch": 0.84}), "not resolved"),
        ("main/copy", Numbers(accuracy={"finetune": 0.75, "copy": 0.76}), "not resolved"),
        ("main/distill", Numbers(), "supported"),
        ("main/distill", Numbers(accuracy={"distill": 0.83}), "contradicted"),
        ("main/distill", Numbers(accuracy={"distill": 0.89}), "contradicted"),
        ("main/distill", Numbers(accuracy={"distill": NOISY}), "not resolved"),
        ("ensemble/beats_members", Numbers(), "supported"),
        ("ensemble/beats_members", Numbers(ensemble={"finetune_distill": -0.01}), "contradicted"),
        ("ensemble/beats_members", Numbers(ensemble={"finetune_distill": 0.0}), "not resolved"),
        ("ensemble/beats_finetune_pair", Numbers(ensemble={"finetune_finetune": -0.01}), "supported"),
        ("ensemble/beats_finetune_pair", Numbers(ensemble={"finetune_finetune": 0.05}), "contradicted"),
        ("ensemble/beats_finetune_pair", Numbers(accuracy={"finetune": NOISY}), "not resolved"),
        ("ensemble/beats_distill_pair", Numbers(ensemble={"distill_distill": -0.01}), "supported"),
        ("ensemble/beats_distill_pair", Numbers(ensemble={"distill_distill": 0.05}), "contradicted"),
        ("shift/distill_falls_below", Numbers(drop={"distill": 0.15}), "supported"),
        ("shift/distill_falls_below", Numbers(drop={"distill": 0.05}), "contradicted"),
        ("shift/distill_falls_below", Numbers(), "not resolved"),
        ("shift/below_at_matched_accuracy", Numbers(drop={"distill": 0.15}), "supported"),
        ("shift/below_at_matched_accuracy", Numbers(drop={"distill": 0.05}), "contradicted"),
        ("shift/below_at_matched_accuracy", Numbers(), "not resolved"),
    ],
)
def test_verdict(tmp_path: Path, claim: str, numbers: Numbers, verdict: str) -> None:
    judged, _ = judge(tmp_path, numbers)
    assert judged[claim].verdict == verdict, judged[claim]


def test_the_shift_claim_is_a_difference_of_differences(tmp_path: Path) -> None:
    """A worse distill that loses no more under shift than fine-tune does not support the claim."""
    judged, _ = judge(tmp_path, Numbers(accuracy={"distill": 0.7}))
    claim = judged["shift/distill_falls_below"]
    assert claim.verdict == "not resolved"
    assert abs(claim.effect.mean) < 0.005
    assert "contradicted" in claim.note, "that they are not equal without shift is reported alongside"
    judged, _ = judge(tmp_path, Numbers(drop={"distill": 0.15}))
    assert judged["shift/distill_falls_below"].effect.mean == pytest.approx(-0.05, abs=0.002)


def test_effect_of_copy_is_the_gap_recovered(tmp_path: Path) -> None:
    accuracy = {"scratch": (0.8, 0.81, 0.79), "finetune": (0.9, 0.91, 0.895), "copy": (0.87, 0.885, 0.86)}
    judged, _ = judge(tmp_path, Numbers(accuracy=accuracy))
    gains = [sum(accuracy[run]) - sum(accuracy["scratch"]) for run in ("copy", "finetune")]
    assert judged["main/copy"].effect.mean == pytest.approx(gains[0] / gains[1])
    assert judged["main/copy"].effect.n == 3


@pytest.mark.parametrize(
    ("ensembles", "untested"),
    [
        ({}, {"ensemble/beats_members", "ensemble/beats_finetune_pair", "ensemble/beats_distill_pair"}),
        ({"pair": ("distill", "finetune")}, {"ensemble/beats_finetune_pair", "ensemble/beats_distill_pair"}),
    ],
)
def test_a_claim_without_its_ensemble_is_left_out(
    tmp_path: Path, ensembles: dict[str, tuple[str, str]], untested: set[str]
) -> None:
    judged, left_out = judge(tmp_path, Numbers(), synthetic.study(ensembles=ensembles))
    assert set(left_out) == untested
    assert set(judged) == set(claims.RULES) - untested


def test_a_study_without_shifts_leaves_the_shift_claim_out(tmp_path: Path) -> None:
    study = synthetic.study(evaluation__sets=("test",))
    judged, left_out = judge(tmp_path, Numbers(), study)
    assert set(left_out) == {"shift/distill_falls_below", "shift/below_at_matched_accuracy"}
    assert "main/copy" in judged


def test_two_seeds_make_one_pair_of_one_run(tmp_path: Path) -> None:
    """(0, 1) and (1, 0) are the same two models: counted twice they would seem to have no spread."""
    judged, _ = judge(tmp_path, Numbers(ensemble={"finetune_finetune": -0.1}), synthetic.study(seeds=(0, 1)))
    claim = judged["ensemble/beats_finetune_pair"]
    assert (claim.effect.n, claim.verdict) == (1, "not resolved")
    assert judged["ensemble/beats_members"].effect.n == 2


def test_one_seed_resolves_nothing(tmp_path: Path) -> None:
    judged, _ = judge(
        tmp_path, Numbers(), synthetic.study(seeds=(3,), ensembles={"pair": ("finetune", "distill")})
    )
    assert {claim.verdict for claim in judged.values()} == {"not resolved"}


@pytest.mark.parametrize("bound", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(bound: float) -> None:
    claim = made(effect=Interval(0.9, bound, bound, 1), verdict="not resolved")
    assert json.loads(json.dumps(claim.as_json(), allow_nan=False))["interval"] == [None, None]


def test_every_claim_has_rule_text_and_published_direction() -> None:
    assert set(claims.RULES) == set(claims.CLAIMS) == set(claims.PUBLISHED)
    assert set(claims.RULES) <= set(wording.EFFECTS)


def made(name: str = "main/copy", **changed: Any) -> Claim:
    """A claim about nothing."""
    values = {
        "claim": "Copying helps.",
        "published": "p",
        "rule": "r",
        "effect": Interval(0.1, 0.05, 0.15, 5),
        "verdict": "supported",
        "effect_text": "copy minus scratch",
        "confidence": 0.95,
    }
    return Claim(name, **values | changed)


def main_claim(name: str, p_value: float, verdict: Verdict = "supported") -> Claim:
    return made(name, verdict=verdict, p_value=p_value)


def test_a_main_claim_must_survive_holms_correction() -> None:
    """By hand: of six claims, the smallest p-value is taken times 6, the next times 5."""
    first, second = claims.corrected(
        [main_claim("main/copy", 0.004), main_claim("main/distill", 0.011, "contradicted")], 0.05
    )
    assert (first.verdict, first.p_adjusted) == ("supported", pytest.approx(0.024))
    assert (second.verdict, second.p_adjusted) == ("not resolved", pytest.approx(0.055))
    assert (first.uncorrected, second.uncorrected) == (None, "contradicted")
    assert second.as_json()["verdict_uncorrected"] == "contradicted"
    assert "5 seeds; contradicted by itself, not after Holm’s correction)." in second.sentence


def test_claims_that_are_not_main_ones_need_no_correction() -> None:
    (found,) = claims.corrected([main_claim("main/pretraining_helps", 0.049)], 0.05)
    assert found.verdict == "supported"
    assert math.isnan(found.p_adjusted)


def test_main_claims_are_claims() -> None:
    others = {"main/pretraining_helps", "shift/below_at_matched_accuracy"}
    assert set(claims.MAIN) == set(claims.RULES) - others


@pytest.mark.parametrize(
    ("claim", "runs", "alternative"),
    [
        ("main/pretraining_helps", ("finetune", "scratch"), "two-sided"),
        ("shift/distill_falls_below", None, "two-sided"),
    ],
)
def test_p_values_agree_with_the_intervals(
    claim: str, runs: tuple[str, str] | None, alternative: str, tmp_path: Path
) -> None:
    accuracy = {"scratch": (0.80, 0.812, 0.795, 0.8), "finetune": (0.81, 0.82, 0.797, 0.811)}
    judged, _ = judge(tmp_path, Numbers(accuracy=accuracy), synthetic.study(seeds=(0, 1, 2, 3)))
    found = judged[claim]
    assert (found.p_value < 0.05) == (found.effect.low > 0 or found.effect.high < 0)
    if runs:
        expected = ttest_rel(accuracy[runs[0]], accuracy[runs[1]], alternative=alternative).pvalue
        assert found.p_value == pytest.approx(expected)


@pytest.mark.slow
def test_the_p_value_of_copy_is_below_5_percent_where_fiellers_interval_leaves_half_the_gap(
    tmp_path: Path,
) -> None:
    scratch, finetune = (0.80, 0.812, 0.795), (0.86, 0.865, 0.862)
    for place, copied in enumerate((0.833, 0.8385, 0.8386, 0.839, 0.8395, 0.85)):
        values = (copied, copied + 0.006, copied - 0.003)
        accuracy = {"scratch": scratch, "finetune": finetune, "copy": values}
        judged, _ = judge(tmp_path / str(place), Numbers(accuracy=accuracy))
        found = judged["main/copy"]
        assert (found.p_value < 0.05) == (found.effect.low > 0.5 or found.effect.high < 0.5)


def test_the_gap_recovered_is_told_in_per_cent_of_it(tmp_path: Path) -> None:
    judged, _ = judge(tmp_path, Numbers())
    assert judged["main/copy"].measured.endswith(" % of the gap")
    assert judged["main/distill"].measured.endswith(" points")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"effect": Interval(-0.005, -0.0125, 0.002, 5), "verdict": "not resolved"},
            "“Copying helps” is not resolved here: copy minus scratch is −0.50 points "
            "(95 % interval −1.25 to 0.20; 5 seeds).",
        ),
        (
            {"effect": Interval(0.5, 0.4, 0.6, 5), "unit": "% of the gap", "effect_text": "the gain"},
            "“Copying helps” is supported here: the gain is 50.00 % of the gap "
            "(95 % interval 40.00 to 60.00; 5 seeds).",
        ),
        (
            {
                "effect": Interval(0.5, -math.inf, math.inf, 5),
                "unit": "% of the gap",
                "verdict": "not resolved",
            },
            "“Copying helps” is not resolved here: copy minus scratch is 50.00 % of the gap "
            "(interval unbounded; 5 seeds).",
        ),
        (
            {"effect": Interval(0.02, math.nan, math.nan, 1), "verdict": "not resolved"},
            "“Copying helps” is not resolved here: copy minus scratch is 2.00 points (no interval; 1 seed).",
        ),
        (
            {"effect": Interval(-0.03, -0.04, -0.02, 3), "verdict": "contradicted", "margin": 0.01},
            "“Copying helps” is contradicted here: copy minus scratch is −3.00 points "
            "(95 % interval −4.00 to −2.00; 3 seeds; equivalence margin 1 point).",
        ),
        (
            {"effect": Interval(0.25, 0.125, 0.375, 3), "unit": "nats", "confidence": 0.9},
            "“Copying helps” is supported here: copy minus scratch is 0.250 nats "
            "(90 % interval 0.125 to 0.375; 3 seeds).",
        ),
    ],
)
def test_a_claim_can_be_quoted(changed: dict[str, Any], sentence: str) -> None:
    assert made(**changed).sentence == sentence
