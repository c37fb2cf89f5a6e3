"""The study's answer in a few sentences, for the top of the page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from attention_transfer.config import Report
from attention_transfer.evaluation.statistics import Interval
from attention_transfer.reporting.claims import MAIN, Claim
from attention_transfer.reporting.contrasts import Verdict
from attention_transfer.reporting.records import Records
from attention_transfer.reporting.tables import level, per_cent, run_gap, test_accuracy

VERDICTS: tuple[Verdict, ...] = ("supported", "contradicted", "not resolved")
ABOUT = 0.25
"""An interval around a half that is no wider than this is about a half; a wider one is some part."""


def sentences(records: Records, report: Report, claims: Sequence[Claim]) -> list[str]:
    """What attention alone is worth, in two sentences, and how the claims stand."""
    copied, distilled = (run_gap(records, report, run) for run in (report.copied, report.distilled))
    accuracy = {
        name: per_cent(test_accuracy(records, getattr(report, name)), digits=1)
        for name in ("scratch", "finetune", "copied", "distilled")
    }
    if any(math.isinf(gap.low) for gap in (copied, distilled)):
        found = [
            "With these seeds, fine-tuning is not shown to differ from training from scratch: no share of that gap can "
            "be told."
        ]
    else:
        found = [
            f"Where the teacher looks, copied at every pass, is worth {share(copied)} what fine-tuning gains over "
            f"training from scratch ({per_cent(copied, digits=0)} %); learned, by a student that then stands alone, it "
            f"is worth {share(distilled)} it ({per_cent(distilled, digits=0)} %)."
        ]
    found.append(
        f"Of the test images, training from scratch gets {accuracy['scratch']} % right, fine-tuning "
        f"{accuracy['finetune']} %, copied attention {accuracy['copied']} %, learned attention "
        f"{accuracy['distilled']} %."
    )
    found.append(f"Intervals: {level(records)}, over {_count(len(records.study.seeds), 'seed')}.")
    for kind, chosen in (
        ("main claim", [claim for claim in claims if claim.id in MAIN]),
        ("exploratory claim", [claim for claim in claims if claim.exploratory]),
    ):
        if chosen:
            found.append(f"Of {_count(len(chosen), kind)}, {counted(chosen)}.")
    return found


def share(gap: Interval) -> str:
    """A share of the gap in words that the whole interval bears out, to stand in front of what it is a share of."""
    low, high = gap.low, gap.high
    if math.isnan(low):  # one seed
        return "a share, which one seed cannot tell, of"
    if low > 1:
        return "more than all of"
    if low > 0.5:
        return "most of" if high < 1 else "most or all of"
    if low > 0:
        about = high < 1 and high - low <= ABOUT
        return "less than half of" if high < 0.5 else "about half of" if about else "a part of"
    return "less than nothing of" if high < 0 else "nothing that these seeds could show of"


def counted(claims: Sequence[Claim]) -> str:
    """Such as `2 are supported, 1 is contradicted, 3 are not resolved`."""
    verdicts = Counter(claim.verdict for claim in claims)
    parts = [f"{n} {'is' if n == 1 else 'are'} {verdict}" for verdict in VERDICTS if (n := verdicts[verdict])]
    return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
