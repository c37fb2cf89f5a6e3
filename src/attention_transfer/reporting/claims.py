"""The paper's claims, the rules that judge them, and the verdicts.

The rules were written before the numbers. Effects and intervals are fractions of accuracy, or of the gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from attention_transfer.config import Report
from attention_transfer.evaluation.statistics import Interval, equivalent, mean_interval, paired_difference
from attention_transfer.reporting import contrasts
from attention_transfer.reporting.contrasts import Verdict
from attention_transfer.reporting.experiments import Experiment, accuracies
from attention_transfer.reporting.records import UNSHIFTED, Records
from attention_transfer.reporting.tables import run_gap

MOST_OF_THE_GAP = 0.5
RULES = {
    "main/pretraining_helps": (
        "Interval of finetune − scratch, paired by seed, Student's t: supported if it lies above 0, "
        "contradicted if it lies below 0, not resolved otherwise."
    ),
    "main/copy": (
        f"Fieller interval of the gap recovered by copy: supported if it lies above {MOST_OF_THE_GAP}, "
        f"contradicted if it lies below {MOST_OF_THE_GAP}, not resolved otherwise, or if it is unbounded, or if "
        "the interval of finetune − scratch does not lie above 0."
    ),
    "main/distill": (
        "Difference distill − finetune, paired by seed: supported if two one-sided t tests find it within the "
        "equivalence margin, contradicted if its interval lies wholly below −margin or above +margin, not "
        "resolved otherwise."
    ),
    "ensemble/beats_members": (
        "Gain of fine-tuned + distilled over the better of its two members on the test set, one value per "
        "seed: supported if its interval lies above 0, contradicted if it lies below 0, not resolved otherwise."
    ),
    "ensemble/beats_finetune_pair": (
        "Accuracy of fine-tuned + distilled minus that of fine-tuned + fine-tuned, paired by the first "
        "member's seed: supported if its interval lies above 0, contradicted if it lies below 0, not resolved "
        "otherwise, or if there is one pair only."
    ),
    "ensemble/beats_distill_pair": (
        "Accuracy of fine-tuned + distilled minus that of distilled + distilled, paired by the first member's "
        "seed: supported if its interval lies above 0, contradicted if it lies below 0, not resolved otherwise, "
        "or if there is one pair only."
    ),
    "shift/distill_falls_below": (
        "(shifted − clean accuracy) of distill minus (shifted − clean accuracy) of finetune, paired by seed, "
        "shifted being the mean over all shifts and severities, and clean that on the same images: supported "
        "if its interval lies below 0, "
        "contradicted if it lies above 0, not resolved otherwise. Whether the two are equal in-distribution, "
        "as the claim presumes, is reported alongside."
    ),
}
CLAIMS = {
    "main/pretraining_helps": "Fine-tuning the pre-trained teacher beats training from scratch.",
    "main/copy": "Attention Copy recovers most of the gap between scratch and fine-tuning.",
    "main/distill": "Attention Distill equals fine-tuning: it recovers all of the gap.",
    "ensemble/beats_members": "Fine-tuned + distilled beats both of its members.",
    "ensemble/beats_finetune_pair": "Fine-tuned + distilled beats the ensemble of two fine-tuned models.",
    "ensemble/beats_distill_pair": "Fine-tuned + distilled beats the ensemble of two distilled models.",
    "shift/distill_falls_below": "Under distribution shift, Attention Distill falls below fine-tuning.",
}
PUBLISHED = {
    "main/pretraining_helps": "fine-tune 85.7 %, scratch 83.0 %",
    "main/copy": "copy 85.1 %: 77.8 % of the gap",
    "main/distill": "distill 85.7 %, fine-tune 85.7 %",
    "ensemble/beats_members": "ensemble 86.3 %, each member 85.7 %",
    "ensemble/beats_finetune_pair": "direction only: above the self-ensemble",
    "ensemble/beats_distill_pair": "direction only: above the self-ensemble",
    "shift/distill_falls_below": "direction only: below fine-tune on the harder shifts",
}


@dataclass(frozen=True)
class Claim:
    """One claim and what the study says about it.

    Attributes:
        id: the experiment's id in the paper's list, and a name.
        note: what has to be known beside the verdict.
        exploratory: not one of the main claims, for which the study was designed.
    """

    id: str
    claim: str
    published: str
    rule: str
    effect: Interval
    verdict: Verdict
    note: str = ""
    exploratory: bool = False

    @property
    def experiment(self) -> str:
        return self.id.split("/")[0]

    def as_json(self) -> dict[str, Any]:
        """For claims.json; a number that is not finite becomes null."""
        return {
            "id": self.id,
            "experiment": self.experiment,
            "claim": self.claim,
            "published": self.published,
            "effect": _finite(self.effect.mean),
            "interval": [_finite(self.effect.low), _finite(self.effect.high)],
            "n_seeds": self.effect.n,
            "rule": self.rule,
            "exploratory": self.exploratory,
            "verdict": self.verdict,
            "note": self.note,
        }


def judge(records: Records, report: Report) -> tuple[list[Claim], dict[str, str]]:
    """Verdicts by the rules above, and for each claim that cannot be judged the reason why."""
    claims = [
        _pretraining_helps(records, report),
        _copy_recovers(records, report),
        _distill_equals(records, report),
    ]
    untested: dict[str, str] = {}
    _judge_ensembles(records, report, claims, untested)
    if "shifts" in records.study.evaluation.sets:
        claims.append(_falls_below(records, report))
    else:
        untested["shift/distill_falls_below"] = "evaluation.sets does not name shifts"
    return claims, untested


def of_experiments(
    records: Records, experiments: list[Experiment], report: Report
) -> tuple[list[Claim], dict[str, str]]:
    """Verdicts on the claims of the experiments that the study names, and why some cannot be judged."""
    names = {experiment.name for experiment in experiments}
    judged, untested = contrasts.judge(
        [contrast for contrast in contrasts.CONTRASTS if contrast.id.split("/")[0] in names],
        accuracies(records, experiments),
        margin=report.equivalence_margin,
        confidence=records.study.evaluation.confidence,
    )
    claims = [
        Claim(
            each.contrast.id,
            each.contrast.claim,
            each.contrast.published,
            each.contrast.rule_text,
            each.effect,
            each.verdict,
            note=f"seeds {', '.join(map(str, each.seeds))}.",
            exploratory=True,
        )
        for each in judged
    ]
    return claims, untested


def _claim(claim: str, effect: Interval, verdict: Verdict, note: str = "") -> Claim:
    return Claim(claim, CLAIMS[claim], PUBLISHED[claim], RULES[claim], effect, verdict, note)


def _above(interval: Interval, threshold: float) -> Verdict:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return "not resolved"
    if interval.low > threshold:
        return "supported"
    return "contradicted" if interval.high < threshold else "not resolved"


def _pretraining_helps(records: Records, report: Report) -> Claim:
    gap = _difference(records, report.finetune, report.scratch)
    return _claim("main/pretraining_helps", gap, _above(gap, 0))


def _copy_recovers(records: Records, report: Report) -> Claim:
    recovered = run_gap(records, report, report.copied)
    if _above(_difference(records, report.finetune, report.scratch), 0) != "supported":
        note = "fine-tuning is not shown to beat scratch, so there is no gap to recover."
        return _claim("main/copy", recovered, "not resolved", note)
    return _claim("main/copy", recovered, _above(recovered, MOST_OF_THE_GAP))


def _distill_equals(records: Records, report: Report) -> Claim:
    difference = _difference(records, report.distilled, report.finetune)
    verdict, note = _equality(records, report, difference)
    return _claim("main/distill", difference, verdict, note)


def _equality(records: Records, report: Report, difference: Interval) -> tuple[Verdict, str]:
    margin = report.equivalence_margin
    test = equivalent(
        records.values("accuracy", report.distilled),
        records.values("accuracy", report.finetune),
        margin,
        records.study.evaluation.confidence,
    )
    note = f"equivalence margin {100 * margin:g} percentage points"
    if math.isfinite(test.p_value):
        note += f", p = {test.p_value:.2g} of the two one-sided tests"
    if test.equivalent:
        return "supported", f"{note}."
    apart = difference.high < -margin or difference.low > margin
    return "contradicted" if apart else "not resolved", f"{note}."


def _difference(records: Records, first: str, second: str) -> Interval:
    return paired_difference(
        records.values("accuracy", first),
        records.values("accuracy", second),
        records.study.evaluation.confidence,
    )


def _judge_ensembles(records: Records, report: Report, claims: list[Claim], untested: dict[str, str]) -> None:
    confidence = records.study.evaluation.confidence
    mixed = _ensemble(records, report.finetune, report.distilled)
    if mixed is None:
        missing = f"the study has no ensemble of {report.finetune} and {report.distilled}"
        untested |= {claim: missing for claim in RULES if claim.startswith("ensemble/")}
        return
    gain = mean_interval(mixed["gain"].to_numpy(float), confidence)
    claims.append(_claim("ensemble/beats_members", gain, _above(gain, 0)))
    for claim, run in (
        ("ensemble/beats_finetune_pair", report.finetune),
        ("ensemble/beats_distill_pair", report.distilled),
    ):
        pair = _ensemble(records, run, run)
        if pair is None:
            untested[claim] = f"the study has no ensemble of {run} with itself"
            continue
        seeds = [seed for seed in records.study.seeds if seed in mixed.index and seed in pair.index]
        difference = paired_difference(
            mixed.loc[seeds, "accuracy"].to_numpy(float),
            pair.loc[seeds, "accuracy"].to_numpy(float),
            confidence,
        )
        claims.append(_claim(claim, difference, _above(difference, 0)))


def _ensemble(records: Records, first: str, second: str) -> pd.DataFrame | None:
    for name, ensemble in records.study.ensembles.items():
        if sorted(ensemble.members) == sorted((first, second)):
            return records.pairs(name)
    return None


def _falls_below(records: Records, report: Report) -> Claim:
    fall = {
        run: records.all_shifts("accuracy", run) - records.values("accuracy", run, UNSHIFTED)
        for run in (report.distilled, report.finetune)
    }
    effect = paired_difference(
        fall[report.distilled], fall[report.finetune], records.study.evaluation.confidence
    )
    mirrored = _above(Interval(-effect.mean, -effect.high, -effect.low, effect.n), 0)
    clean = _difference(records, report.distilled, report.finetune)
    equal, _ = _equality(records, report, clean)
    note = f"equal in-distribution: {equal}; clean distill − finetune is {100 * clean.mean:+.2f} points."
    return _claim("shift/distill_falls_below", effect, mirrored, note)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
