"""Every claim has a rule that was written down, which is the one that judges it."""

import json

from attention_transfer.reporting import claims, experiment_claims, further_claims, rules


def test_the_rules_written_down_are_those_of_the_code() -> None:
    """Where this fails, a rule has changed: python -m attention_transfer.reporting.rules, and commit before any run."""
    assert rules.FILE.read_text(encoding="utf-8") == rules.text()


def test_every_claim_has_one_line() -> None:
    every = [*claims.CLAIMS, *(claim.id for claim in (*experiment_claims.CONTRASTS, *further_claims.FURTHER))]
    assert rules.names() == every
    assert len(set(every)) == len(every)
    for line in rules.FILE.read_text(encoding="utf-8").splitlines():
        assert all(json.loads(line).values())
