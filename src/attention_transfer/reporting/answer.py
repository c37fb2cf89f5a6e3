"""The study's answer in a few sentences, for the top of the page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from attention_transfer.config import Report
from attention_transfer.reporting.claims import MAIN, Claim
from attention_transfer.reporting.contrasts import Verdict
from attention_transfer.reporting.records import Records
from attention_transfer.reporting.tables import level, per_cent, run_gap, test_accuracy

VERDICTS: tuple[Verdict, ...] = ("supported", "contradicted", "not resolved")


def sentences(records: Records, report: Report, claims: Sequence[Claim]) -> list[str]:
    """What attention alone is worth, and how the claims stand."""
    copied, distilled = (run_gap(records, report, run) for run in (report.copied, report.distilled))
    scratch, finetune = (
        per_cent(test_accuracy(records, run), digits=1) for run in (report.scratch, report.finetune)
    )
    found = [f"Training from scratch gets {scratch} % of the test images right, fine-tuning {finetune} %."]
    if any(math.isinf(gap.low) for gap in (copied, distilled)):
        found.append(
            "With these seeds that gap is not shown to differ from zero: no share of it can be told."
        )
    else:
        found.append(
            f"Of that gap, the teacher’s attention alone recovers {per_cent(copied, digits=0)} % where it is copied, "
            f"and {per_cent(distilled, digits=0)} % where the student learns it and then stands alone."
        )
    found.append(f"Intervals: {level(records)}, over {_count(len(records.study.seeds), 'seed')}.")
    for kind, chosen in (
        ("main claim", [claim for claim in claims if claim.id in MAIN]),
        ("exploratory claim", [claim for claim in claims if claim.exploratory]),
    ):
        if chosen:
            found.append(f"Of {_count(len(chosen), kind)}, {counted(chosen)}.")
    return found


def counted(claims: Sequence[Claim]) -> str:
    """Such as `2 are supported, 1 is contradicted, 3 are not resolved`."""
    verdicts = Counter(claim.verdict for claim in claims)
    parts = [f"{n} {'is' if n == 1 else 'are'} {verdict}" for verdict in VERDICTS if (n := verdicts[verdict])]
    return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
