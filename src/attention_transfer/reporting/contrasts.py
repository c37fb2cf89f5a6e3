"""How a claim about several runs is judged: a weighted sum of their accuracies, and a rule.

An effect is one value per seed, of the seeds that all of its runs have: a sum of test accuracies whose weights add up
to 0. All of these claims are exploratory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from attention_transfer.evaluation.statistics import Interval, equivalent, mean_interval

Verdict = Literal["supported", "contradicted", "not resolved"]
Rule = Literal["above", "below", "not below", "equal"]
Accuracies = Callable[[str], Mapping[int, float]]
"""Of a run, test accuracy by seed; empty for a run that the study does not have."""

RULES: dict[Rule, str] = {
    "above": "supported if its interval lies above 0, contradicted if it lies below 0, not resolved otherwise",
    "below": "supported if its interval lies below 0, contradicted if it lies above 0, not resolved otherwise",
    "not below": (
        "supported if its interval lies above −margin, contradicted if it lies below −margin, not resolved otherwise"
    ),
    "equal": (
        "supported if two one-sided t tests find it within the margin, contradicted if its interval lies wholly "
        "below −margin or above +margin, not resolved otherwise"
    ),
}


@dataclass(frozen=True)
class Contrast:
    """One claim.

    Attributes:
        id: experiment of the paper's list, and name.
        weights: by run.
        rule: what the effect must be for the claim to be supported.
        part: the study's experiment that has the runs, where that is only a part of the paper's.
    """

    id: str
    claim: str
    published: str
    weights: Mapping[str, float]
    rule: Rule
    part: str = ""

    def __post_init__(self) -> None:
        if abs(sum(self.weights.values())) > 1e-12:
            raise ValueError(f"{self.id}: weights add up to {sum(self.weights.values())}, not to 0")

    @property
    def section(self) -> str:
        """The study's experiment whose section of the report has it."""
        return self.part or self.id.split("/")[0]

    @property
    def formula(self) -> str:
        """The effect in words, such as `copy_query − copy`."""
        terms = [(weight, run) for run, weight in self.weights.items()]
        text = " ".join(
            f"{'−' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):.3g} '}{run}"
            for weight, run in terms
        )
        return text.removeprefix("+ ")

    @property
    def rule_text(self) -> str:
        return f"{self.formula}, paired by seed: {RULES[self.rule]}."


@dataclass(frozen=True)
class Judged:
    """A claim's effect, the seeds that it is over, and what the rule says of it.

    Attributes:
        effects: one value a seed.
    """

    effects: np.ndarray
    effect: Interval
    seeds: tuple[int, ...]
    verdict: Verdict


def difference(first: str, second: str) -> dict[str, float]:
    return {first: 1.0, second: -1.0}


def slope(runs: Sequence[str]) -> dict[str, float]:
    """Least squares slope of accuracy over 1, 2, .. for these runs in order: points of accuracy a step."""
    steps = np.arange(len(runs)) - (len(runs) - 1) / 2
    return dict(zip(runs, (steps / (steps**2).sum()).tolist(), strict=True))


def mean_of(weights: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of several contrasts."""
    total: dict[str, float] = {}
    for each in weights:
        for run, weight in each.items():
            total[run] = total.get(run, 0.0) + weight / len(weights)
    return total


def judge(
    contrasts: Sequence[Contrast], accuracies: Accuracies, *, margin: float, confidence: float
) -> tuple[list[tuple[Contrast, Judged]], dict[str, str]]:
    """Verdicts, of effects in fractions of accuracy, and for each claim that cannot be judged the reason why.

    Args:
        margin: accuracies closer than this count as equal.
        confidence: of the intervals.
    """
    judged, untested = [], {}
    for contrast in contrasts:
        found = {run: accuracies(run) for run in contrast.weights}
        if missing := [run for run, values in found.items() if not values]:
            untested[contrast.id] = f"the study has no run {', '.join(missing)}"
            continue
        seeds = set.intersection(*(set(values) for values in found.values()))
        if not seeds:
            untested[contrast.id] = "its runs have no seed in common"
            continue
        effects = {
            seed: sum(weight * found[run][seed] for run, weight in contrast.weights.items()) for seed in seeds
        }
        if contrast.rule in ("above", "below") and len(seeds) > 1 and not any(effects.values()):
            untested[contrast.id] = "its runs have the same accuracy with every seed"
            continue
        judged.append((contrast, judged_by(contrast.rule, effects, margin=margin, confidence=confidence)))
    return judged, untested


def judged_by(rule: Rule, effects: Mapping[int, float], *, margin: float, confidence: float) -> Judged:
    """What the rule says of an effect, with one value a seed."""
    seeds = tuple(sorted(effects))
    values = np.array([effects[seed] for seed in seeds])
    effect = mean_interval(values, confidence)
    return Judged(values, effect, seeds, _verdict(rule, values, effect, margin, confidence))


def _verdict(rule: Rule, effects: np.ndarray, effect: Interval, margin: float, confidence: float) -> Verdict:
    if not math.isfinite(effect.low):  # one seed
        return "not resolved"
    match rule:
        case "above":
            return _above(effect.low, effect.high, 0.0)
        case "below":
            return _above(-effect.high, -effect.low, 0.0)
        case "not below":
            return _above(effect.low, effect.high, -margin)
        case "equal":
            if equivalent(effects, np.zeros_like(effects), margin, confidence).equivalent:
                return "supported"
            return "contradicted" if effect.high < -margin or effect.low > margin else "not resolved"


def _above(low: float, high: float, threshold: float) -> Verdict:
    if low > threshold:
        return "supported"
    return "contradicted" if high < threshold else "not resolved"
