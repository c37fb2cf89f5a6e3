"""What falls otherwise than published, and the claims of further experiments that ask it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attention_transfer.reporting.claims import Claim

ASKS_AGAIN: Mapping[str, str] = {
    "layers_rate/few": "layers/more_distill",
    "layers_rate/more": "layers/more_distill",
    "layers_rate/near_output": "layers/near_output_distill",
    "labels/copy": "main/copy",
    "labels/distill": "main/distill",
    "labels/residual_stream": "feature/residual_stream",
    "labels/value": "qkv/value",
    **{f"{name}/copy": "main/copy" for name in ("teachers", "draw_1", "draw_2")},
    **{f"{name}/distill": "main/distill" for name in ("teachers", "draw_1", "draw_2")},
}
"""By claim of a further experiment, the one that it asks again, with one thing changed."""
CHANGED: Mapping[str, str] = {
    "layers_rate": "the learning rate of scratch",
    "labels": "ten times the labels",
    "teachers": "other seeds of the teacher",
    "draw_1": "another draw of the labels",
    "draw_2": "a third draw of the labels",
}
"""By further experiment, what is changed."""


@dataclass(frozen=True)
class Surprise:
    """A claim that did not come out as published, or that a further experiment asked again.

    Attributes:
        again: by what was changed, the claims that ask it again and have been judged.
    """

    claim: Claim
    again: tuple[tuple[str, Claim], ...]


def surprises(claims: Sequence[Claim]) -> list[Surprise]:
    """Contradicted claims first, then those that were asked again; each in the order of the claims."""
    again: dict[str, list[tuple[str, Claim]]] = {}
    for claim in claims:
        if claim.id in ASKS_AGAIN:
            again.setdefault(ASKS_AGAIN[claim.id], []).append((CHANGED[claim.experiment], claim))
    found = [
        Surprise(claim, tuple(again.get(claim.id, ())))
        for claim in claims
        if claim.verdict == "contradicted" or claim.id in again
    ]
    return sorted(found, key=lambda each: each.claim.verdict != "contradicted")
