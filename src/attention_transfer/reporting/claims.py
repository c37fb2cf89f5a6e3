"""The paper's claims, the rules that judge them, and the verdicts.

The rules were written before the numbers. Effects and intervals are fractions of accuracy, or of the gap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd

from attention_transfer.config import Report
from attention_transfer.evaluation.multiple_tests import EffectSize, effect_size, holm, paired_t
from attention_transfer.evaluation.statistics import (
    Interval,
    Values,
    equivalent,
    mean_interval,
    paired_difference,
)
from attention_transfer.reporting import contrasts, robustness, tables, wording
from attention_transfer.reporting.contrasts import Judged, Verdict
from attention_transfer.reporting.experiment_claims import CONTRASTS
from attention_transfer.reporting.experiments import Experiment, accuracies
from attention_transfer.reporting.records import UNSHIFTED, Records
from attention_transfer.reporting.tables import per_cent, plain, run_gap

MOST_OF_THE_GAP = 0.5
MAIN = (
    "main/copy",
    "main/distill",
    "ensemble/beats_members",
    "ensemble/beats_finetune_pair",
    "ensemble/beats_distill_pair",
    "shift/distill_falls_below",
)
"""The main claims: a family of tests, whether or not a study can do all of them."""
HOLM = (
    f"The verdicts on the {len(MAIN)} main claims (on copy, distill, the ensemble and shift) stand only where the "
    "claim's p-value, adjusted by Holm for all of them, is at most 1 − confidence: otherwise it is not resolved. "
    "p-values are those of the paired t tests that the intervals belong to: two-sided; of copy, of copy − (scratch + "
    "finetune)/2; of distill, the larger of the two one-sided ones or, beyond the margin, of the difference from it."
)
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
    "shift/below_at_matched_accuracy": (
        "Exploratory. Mean accuracy over shifts beyond the line that logit(shifted) follows over logit(clean) on "
        "the same images) in all runs and seeds of the main comparison; distill minus finetune, paired by seed: "
        "supported if its interval lies below 0, contradicted if it lies above 0, not resolved otherwise."
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
    "shift/below_at_matched_accuracy": (
        "At matched accuracy without shift, Attention Distill falls below fine-tuning under shift."
    ),
}
PUBLISHED = {
    "main/pretraining_helps": "fine-tune 85.7 %, scratch 83.0 %",
    "main/copy": "copy 85.1 %: 77.8 % of the gap",
    "main/distill": "distill 85.7 %, fine-tune 85.7 %",
    "ensemble/beats_members": "ensemble 86.3 %, each member 85.7 %",
    "ensemble/beats_finetune_pair": "direction only: above the self-ensemble",
    "ensemble/beats_distill_pair": "direction only: above the self-ensemble",
    "shift/distill_falls_below": "direction only: below fine-tune on the harder shifts",
    "shift/below_at_matched_accuracy": "direction only: below fine-tune on the harder shifts",
}


@dataclass(frozen=True)
class Claim:
    """One claim and what the study says about it.

    Attributes:
        id: the experiment's id in the paper's list, and a name.
        effect: with an interval at the level `confidence`.
        effect_text: what the effect is, in words.
        note: what has to be known beside the verdict.
        exploratory: not one of the main claims, for which the study was designed.
        margin: what counts as no difference, in the unit of the effect; None where the rule has none.
        uncorrected: the verdict without Holm's correction, where that changed it.
        p_value: of the test behind the verdict; NaN with one seed.
        p_adjusted: by Holm, of a main claim; NaN of others.
        size: the effect in standard deviations of its values over seeds.
        unit: of the effect; points, and what begins with %, are hundredths.
        part: the study's experiment that has the runs, where that is only a part of the paper's.
    """

    id: str
    claim: str
    published: str
    rule: str
    effect: Interval
    verdict: Verdict
    _: KW_ONLY
    effect_text: str
    confidence: float
    note: str = ""
    exploratory: bool = False
    margin: float | None = None
    uncorrected: Verdict | None = None
    p_value: float = math.nan
    p_adjusted: float = math.nan
    size: EffectSize | None = None
    unit: str = "points"
    part: str = ""

    @property
    def experiment(self) -> str:
        return self.id.split("/")[0]

    @property
    def section(self) -> str:
        """The study's experiment whose section of the report has it."""
        return self.part or self.experiment

    @property
    def measured(self) -> str:
        """The effect with its interval and unit."""
        shown = per_cent if self._in_hundredths else plain
        return f"{shown(self.effect)} {self.unit}"

    @property
    def sentence(self) -> str:
        """What a reader can quote."""
        mean, _, rest = self.measured.partition(" ")
        interval = "interval unbounded" if self.effect.n > 1 else "no interval"
        if found := re.match(r"\[(\S+), (\S+)\]", rest):
            interval = f"{100 * self.confidence:g} % interval {found[1]} to {found[2]}"
        seeds = f"{self.effect.n} seed{'s' if self.effect.n > 1 else ''}"
        beside = "; ".join(filter(None, (interval, seeds, self._margin_text, self._correction_text)))
        said = f"“{self.claim.removesuffix('.')}” is {self.verdict} here"
        return f"{said}: {self.effect_text} is {mean} {self.unit} ({beside})."

    @property
    def _in_hundredths(self) -> bool:
        return self.unit == "points" or self.unit.startswith("%")

    @property
    def _margin_text(self) -> str:
        if self.margin is None:
            return ""
        margin = 100 * self.margin if self._in_hundredths else self.margin
        unit = self.unit.removesuffix("s") if margin == 1 else self.unit
        return f"equivalence margin {margin:g} {unit}"

    @property
    def _correction_text(self) -> str:
        return f"{self.uncorrected} by itself, not after Holm’s correction" if self.uncorrected else ""

    def as_json(self) -> dict[str, Any]:
        """For claims.json; a number that is not finite becomes null."""
        return {
            "id": self.id,
            "experiment": self.experiment,
            "claim": self.claim,
            "published": self.published,
            "effect": _finite(self.effect.mean),
            "interval": [_finite(self.effect.low), _finite(self.effect.high)],
            "unit": self.unit,
            "effect_text": self.effect_text,
            "confidence": self.confidence,
            "margin": self.margin,
            "n_seeds": self.effect.n,
            "rule": self.rule,
            "exploratory": self.exploratory,
            "verdict": self.verdict,
            "verdict_uncorrected": self.uncorrected or self.verdict,
            "note": self.note,
            "sentence": self.sentence,
            "p_value": _finite(self.p_value),
            "p_adjusted": _finite(self.p_adjusted),
            "effect_size": _finite(self.size.mean) if self.size else None,
            "effect_size_interval": [_finite(self.size.low), _finite(self.size.high)] if self.size else None,
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
        if (found := _below_at_matched_accuracy(records, report)) is not None:
            claims.append(found)
        else:
            untested["shift/below_at_matched_accuracy"] = "there are too few models, or they are all alike"
    else:
        missing = "evaluation.sets does not name shifts"
        untested |= dict.fromkeys((claim for claim in RULES if claim.startswith("shift/")), missing)
    return corrected(claims, 1 - records.study.evaluation.confidence), untested


def corrected(claims: Sequence[Claim], significance: float) -> list[Claim]:
    """The claims with Holm's correction over the main ones, which count whether or not they could be tested."""
    adjusted = holm(dict.fromkeys(MAIN, math.nan) | {c.id: c.p_value for c in claims if c.id in MAIN})
    found = []
    for claim in claims:
        changed = replace(claim, p_adjusted=adjusted.get(claim.id, math.nan))
        if claim.verdict != "not resolved" and changed.p_adjusted > significance:
            changed = replace(changed, verdict="not resolved", uncorrected=claim.verdict)
        found.append(changed)
    return found


def of_experiments(
    records: Records, experiments: list[Experiment], report: Report
) -> tuple[list[Claim], dict[str, str]]:
    """Verdicts on the claims of the experiments that the study names, and why some cannot be judged."""
    names = {experiment.name for experiment in experiments}
    judged, untested = contrasts.judge(
        [contrast for contrast in CONTRASTS if contrast.section in names],
        accuracies(records, experiments),
        margin=report.equivalence_margin,
        confidence=records.study.evaluation.confidence,
    )
    return [
        exploratory(
            asked,
            found,
            records.study.evaluation.confidence,
            effect_text=wording.effect(asked),
            margin=report.equivalence_margin if asked.rule in ("equal", "not below") else None,
            part=asked.part,
        )
        for asked, found in judged
    ], untested


class Asked(Protocol):
    """What is claimed, published, and the rule that judges it."""

    @property
    def id(self) -> str: ...
    @property
    def claim(self) -> str: ...
    @property
    def published(self) -> str: ...
    @property
    def rule_text(self) -> str: ...


def exploratory(
    asked: Asked,
    found: Judged,
    confidence: float,
    *,
    effect_text: str,
    margin: float | None,
    unit: str = "points",
    part: str = "",
) -> Claim:
    """The verdict on a claim that is none of the main ones: its effect is the mean of one value a seed."""
    zero = np.zeros(len(found.effects))
    return Claim(
        asked.id,
        wording.claim(asked.id, asked.claim),
        asked.published,
        asked.rule_text,
        found.effect,
        found.verdict,
        effect_text=effect_text,
        confidence=confidence,
        exploratory=True,
        margin=margin,
        p_value=paired_t(found.effects, zero, alternative="two-sided"),
        size=effect_size(found.effects, zero, confidence),
        unit=unit,
        part=part,
    )


def not_run(names: Sequence[str]) -> dict[str, str]:
    """Why claims of these experiments cannot be judged."""
    return {
        contrast.id: f"the experiment {name} has not been run"
        for name in names
        for contrast in CONTRASTS
        if contrast.section == name
    }


def _claim(
    claim: str,
    effect: Interval,
    verdict: Verdict,
    note: str = "",
    *,
    values: Values,
    confidence: float,
    p_value: float | None = None,
    margin: float | None = None,
) -> Claim:
    """A claim about the mean of `values`, one a seed, being 0; another test has another p-value."""
    against = np.zeros(len(values))
    return Claim(
        claim,
        CLAIMS[claim],
        PUBLISHED[claim],
        RULES[claim],
        effect,
        verdict,
        effect_text=wording.EFFECTS[claim],
        confidence=confidence,
        note=note,
        margin=margin,
        p_value=paired_t(values, against, alternative="two-sided") if p_value is None else p_value,
        size=effect_size(values, against, confidence),
    )


def _above(interval: Interval, threshold: float) -> Verdict:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return "not resolved"
    if interval.low > threshold:
        return "supported"
    return "contradicted" if interval.high < threshold else "not resolved"


def _pretraining_helps(records: Records, report: Report) -> Claim:
    gains = records.values("accuracy", report.finetune) - records.values("accuracy", report.scratch)
    confidence = records.study.evaluation.confidence
    gap = mean_interval(gains, confidence)
    return _claim("main/pretraining_helps", gap, _above(gap, 0), values=gains, confidence=confidence)


def _copy_recovers(records: Records, report: Report) -> Claim:
    confidence = records.study.evaluation.confidence
    scratch, finetune, copied = (
        records.values("accuracy", run) for run in (report.scratch, report.finetune, report.copied)
    )
    recovered, note = run_gap(records, report, report.copied), ""
    verdict = _above(recovered, MOST_OF_THE_GAP)
    if _above(paired_difference(finetune, scratch, confidence), 0) != "supported":
        note = "Fine-tuning is not shown to beat scratch, so there is no gap to recover."
        verdict = "not resolved"
    # The gap recovered is above a share of the gap where this is above 0.
    beyond = copied - scratch - MOST_OF_THE_GAP * (finetune - scratch)
    found = _claim("main/copy", recovered, verdict, note, values=beyond, confidence=confidence)
    return replace(found, unit="% of the gap")


def _distill_equals(records: Records, report: Report) -> Claim:
    confidence = records.study.evaluation.confidence
    first, second = (records.values("accuracy", run) for run in (report.distilled, report.finetune))
    difference = paired_difference(first, second, confidence)
    verdict, note, p_value = _equality(first, second, report.equivalence_margin, confidence)
    return _claim(
        "main/distill",
        difference,
        verdict,
        note,
        values=first - second,
        confidence=confidence,
        p_value=p_value,
        margin=report.equivalence_margin,
    )


def _equality(first: Values, second: Values, margin: float, confidence: float) -> tuple[Verdict, str, float]:
    """Whether two are equal within the margin, in words too, and the p-value of that, or of the contrary."""
    difference = paired_difference(first, second, confidence)
    test = equivalent(first, second, margin, confidence)
    note = f"p = {test.p_value:.2g} of the two one-sided tests." if math.isfinite(test.p_value) else ""
    if abs(difference.mean) <= margin:
        return "supported" if test.equivalent else "not resolved", note, test.p_value
    edge = math.copysign(margin, difference.mean)
    p_value = paired_t(first, np.add(second, edge), alternative="two-sided")
    apart = difference.high < -margin or difference.low > margin
    return "contradicted" if apart else "not resolved", note, p_value


def _judge_ensembles(records: Records, report: Report, claims: list[Claim], untested: dict[str, str]) -> None:
    confidence = records.study.evaluation.confidence
    mixed = _ensemble(records, report.finetune, report.distilled)
    if mixed is None:
        missing = f"the study has no ensemble of {report.finetune} and {report.distilled}"
        untested |= {claim: missing for claim in RULES if claim.startswith("ensemble/")}
        return
    gains = mixed["gain"].to_numpy(float)
    gain = mean_interval(gains, confidence)
    claims.append(
        _claim("ensemble/beats_members", gain, _above(gain, 0), values=gains, confidence=confidence)
    )
    for claim, run in (
        ("ensemble/beats_finetune_pair", report.finetune),
        ("ensemble/beats_distill_pair", report.distilled),
    ):
        pair = _ensemble(records, run, run)
        if pair is None:
            untested[claim] = f"the study has no ensemble of {run} with itself"
            continue
        seeds = [seed for seed in records.study.seeds if seed in mixed.index and seed in pair.index]
        differences = (mixed.loc[seeds, "accuracy"] - pair.loc[seeds, "accuracy"]).to_numpy(float)
        difference = mean_interval(differences, confidence)
        claims.append(
            _claim(claim, difference, _above(difference, 0), values=differences, confidence=confidence)
        )


def _ensemble(records: Records, first: str, second: str) -> pd.DataFrame | None:
    for name, ensemble in records.study.ensembles.items():
        if sorted(ensemble.members) == sorted((first, second)):
            return records.pairs(name)
    return None


def _falls_below(records: Records, report: Report) -> Claim:
    confidence = records.study.evaluation.confidence
    clean = {run: records.values("accuracy", run) for run in (report.distilled, report.finetune)}
    fall = {
        run: records.all_shifts("accuracy", run) - records.values("accuracy", run, UNSHIFTED) for run in clean
    }
    further = fall[report.distilled] - fall[report.finetune]
    effect = mean_interval(further, confidence)
    mirrored = _above(Interval(-effect.mean, -effect.high, -effect.low, effect.n), 0)
    first, second = clean.values()
    equal, _, _ = _equality(first, second, report.equivalence_margin, confidence)
    apart = tables.per_cent(mean_interval(first - second, confidence))
    note = f"Equal without shift: {equal}; there, distill minus finetune is {apart} points."
    return _claim("shift/distill_falls_below", effect, mirrored, note, values=further, confidence=confidence)


def _below_at_matched_accuracy(records: Records, report: Report) -> Claim | None:
    if (line := robustness.line(records)) is None:
        return None
    confidence = records.study.evaluation.confidence
    beyond = robustness.residuals(records, line)
    further = beyond[report.distilled] - beyond[report.finetune]
    effect = mean_interval(further, confidence)
    mirrored = _above(Interval(-effect.mean, -effect.high, -effect.low, effect.n), 0)
    note = f"The line is fitted to {line.models} models, R² {line.r2:.2f}."
    found = _claim(
        "shift/below_at_matched_accuracy", effect, mirrored, note, values=further, confidence=confidence
    )
    return replace(found, exploratory=True)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
