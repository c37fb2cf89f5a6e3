"""Every claim's rule as text, a line each in rules.jsonl, so that git tells of each when it was last changed.

python -m attention_transfer.reporting.rules

writes the file. To be committed before the runs that a rule judges; a test tells where it is not that of the code.
"""

from __future__ import annotations

import json
from pathlib import Path

from attention_transfer.files import write_text
from attention_transfer.reporting import claims, experiment_claims, further_claims

FILE = Path(__file__).with_name("rules.jsonl")


def text() -> str:
    """The file's content."""
    every = [(claim, claims.CLAIMS[claim], rule) for claim, rule in claims.RULES.items()]
    asked: list[claims.Asked] = [*experiment_claims.CONTRASTS, *further_claims.FURTHER]
    every += [(claim.id, claim.claim, claim.rule_text) for claim in asked]
    lines = [{"id": name, "claim": says, "rule": rule} for name, says, rule in every]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def names() -> list[str]:
    """The claims of the file, by line."""
    return [str(json.loads(line)["id"]) for line in FILE.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    write_text(FILE, text())
