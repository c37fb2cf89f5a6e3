"""Claims about something else than accuracy: how alike models are, where they look, what training costs.

Written, with their rules, before the runs that they judge. An effect is one value a seed; all are exploratory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from attention_transfer.config import Report
from attention_transfer.files import read_json
from attention_transfer.reporting import contrasts, wording
from attention_transfer.reporting.claims import Claim, exploratory
from attention_transfer.reporting.contrasts import Rule
from attention_transfer.reporting.records import SIMILARITY, Records, read_run, read_table

SLOWER = 0.1  # a step that takes no more than this share longer costs about the same


@dataclass(frozen=True)
class Source:
    """What the effects are computed from.

    Attributes:
        metrics: folder of the study's records.
    """

    records: Records
    report: Report
    metrics: Path

    def alike(self, run: str, reference: str, measure: str, experiment: str = "") -> dict[int, float]:
        """A column of the stage `similarity` by seed: mean over layers."""
        frame = self.records.similarity
        if experiment:
            folder = self.metrics / "similarity" / experiment
            read_run(folder, "similarity")
            frame = read_table(folder / "layers.csv", "similarity", SIMILARITY)
        frame = frame[(frame["run"] == run) & (frame["reference"] == reference)]
        return {int(str(seed)): float(value) for seed, value in frame.groupby("seed")[measure].mean().items()}

    def step(self, run: str) -> dict[int, float]:
        """Seconds a training step by seed, of the whole stage: its start and its validation included."""
        found = {}
        for seed in self.records.study.seeds:
            folder = self.metrics / "train" / run / str(seed)
            if folder.is_dir():
                seconds = float(read_run(folder, "train")["seconds"])
                found[seed] = seconds / int(read_json(folder / "metrics.json", made_by="train")["steps"])
        return found


Effects = Callable[[Source], list[dict[int, float]]]


@dataclass(frozen=True)
class Further:
    """One claim.

    Attributes:
        id: experiment of the paper's list, and name.
        effect: in words.
        terms: by seed, what the effect is made of.
        value: the effect, from one seed's terms.
        rule: what the effect must be for the claim to be supported.
        needs: an experiment that it takes runs from; empty for none.
        missing: why it cannot be judged where a term has no value.
    """

    id: str
    claim: str
    published: str
    effect: str
    terms: Effects
    value: Callable[..., float]
    rule: Rule
    unit: str
    needs: str = ""
    missing: str = "the study has no test images"

    @property
    def rule_text(self) -> str:
        text = contrasts.RULES[self.rule].replace("−margin", f"−{SLOWER:g}")
        return f"{self.effect}, by seed: {text}."


FURTHER: tuple[Further, ...] = (
    Further(
        "similarity/features_differ",
        "Features of a distilled and a fine-tuned student differ more than those of two fine-tuned students do.",
        "direction only: features differ although accuracy is equal",
        "CKA (mean over layers) of distill with finetune, minus that of finetune with finetune of another seed",
        lambda of: [
            of.alike(of.report.distilled, "finetune", "cka"),
            of.alike(of.report.finetune, "finetune", "cka"),
        ],
        lambda distilled, by_chance: distilled - by_chance,
        "below",
        "of CKA",
        missing="the study has no test images, or one seed",
    ),
    Further(
        "similarity/query_maps",
        "Copying queries leaves maps more than half as unlike the teacher's as those of a student from scratch.",
        "direction only: its maps stay unlike the teacher’s and the fine-tuned student’s",
        "divergence of maps from the teacher's (heads matched, mean over layers) of copy_query, minus half of that of "
        "scratch",
        lambda of: [
            of.alike("copy_query", "teacher", "matched_divergence", experiment="qkv"),
            of.alike(of.report.scratch, "teacher", "matched_divergence"),
        ],
        lambda copied, scratch: copied - scratch / 2,
        "above",
        "nats",
        needs="qkv",
    ),
    Further(
        "maps/objects",
        "The teacher looks at the object more than a student from scratch does.",
        "direction only: the teacher looks at the object, scratch at the background",
        "attention on the object's patches (1: as much as equal attention gives them; mean over layers) of copy, whose "
        "maps are the teacher's, minus that of scratch",
        lambda of: [of.alike(run, "teacher", "on_objects") for run in (of.report.copied, of.report.scratch)],
        lambda teacher, scratch: teacher - scratch,
        "above",
        "times equal attention",
        missing="the images have no plain ground that objects could be told from",
    ),
    Further(
        "cost/finetune_cheapest",
        "A step of fine-tuning takes less time than one of distilling attention.",
        "direction only: fine-tuning is cheapest",
        "time a step of distill over that of finetune, minus 1",
        lambda of: [of.step(of.report.distilled), of.step(of.report.finetune)],
        lambda distill, finetune: distill / finetune - 1,
        "above",
        "%",
    ),
    Further(
        "cost/like_distillation",
        "A step of distilling attention takes about as long as one of distilling predictions, or less.",
        "direction only: like ordinary distillation",
        "1 minus time a step of distill over that of distill_logits",
        lambda of: [of.step(of.report.distilled), of.step("distill_logits")],
        lambda distill, logits: 1 - distill / logits,
        "not below",
        "%",
        needs="feature",
    ),
)


def judge(
    records: Records, report: Report, metrics: Path, experiments: Mapping[str, bool]
) -> tuple[list[Claim], dict[str, str]]:
    """Verdicts, and for each claim that cannot be judged the reason why.

    Args:
        metrics: the study's folder of records.
        experiments: those of the study, and whether they have been run; claims on others are left out.
    """
    source, confidence = Source(records, report, metrics), records.study.evaluation.confidence
    judged, untested = [], {}
    for further in FURTHER:
        if further.needs and not experiments.get(further.needs):
            if further.needs in experiments:
                untested[further.id] = f"the experiment {further.needs} has not been run"
            continue
        terms = further.terms(source)
        seeds = set.intersection(*map(set, terms))
        effects = {seed: further.value(*(term[seed] for term in terms)) for seed in seeds}
        if not effects or not all(map(math.isfinite, effects.values())):
            untested[further.id] = further.missing
            continue
        found = contrasts.judged_by(further.rule, effects, margin=SLOWER, confidence=confidence)
        judged.append(
            exploratory(
                further,
                found,
                confidence,
                effect_text=wording.EFFECTS[further.id],
                margin=SLOWER if further.rule in ("equal", "not below") else None,
                unit=further.unit,
            )
        )
    return judged, untested
