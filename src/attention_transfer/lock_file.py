"""DVC's lock file survives a kill.

DVC writes it in place: killed meanwhile, it leaves half of it, which it then refuses, or takes for the whole and
runs every other stage again. So a stage keeps a copy as it begins, when DVC is not writing, and `mend`, with which
`make study` begins, puts back what has been cut off. An entry too many does no harm: DVC compares each with the files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from attention_transfer.errors import StudyError
from attention_transfer.files import write_text

NAME = "dvc.lock"  # also of the copy, which lies among the study's checkpoints


def path(study: str) -> Path:
    """A study's lock file, beside its dvc.yaml."""
    own = Path("studies") / study
    return (own if (own / "dvc.yaml").exists() else Path()) / NAME


def _copy(study: str) -> Path:
    return Path(os.environ.get("DVC_ROOT", ".")) / ".ckpt" / study / NAME


def keep(study: str) -> None:
    """Copies the lock file, unless it has lost a stage since it was last copied; never that of an experiment."""
    lock, copy = path(study), _copy(study)
    if "DVC_STAGE" not in os.environ or "DVC_EXP_NAME" in os.environ or not lock.exists():
        return
    text, before = lock.read_text(encoding="utf-8"), copy.read_text(encoding="utf-8") if copy.exists() else ""
    if text != before and text.endswith("\n") and _names(text) >= _names(before):
        write_text(copy, text)


def mend(study: str) -> int:
    """Puts back the entries that a kill has cut off: their number.

    Raises:
        StudyError: the lock file is damaged, and there is no copy.
    """
    lock, copy = path(study), _copy(study)
    if not copy.exists():
        if lock.exists() and _stages(lock) is None:
            raise StudyError(
                "is damaged",
                where=str(lock),
                remedy="restore it from git, or delete it: every stage then runs again",
            )
        return 0
    kept, found = _stages(copy) or {}, _stages(lock) if lock.exists() else {}
    if found is None:
        write_text(lock, copy.read_text(encoding="utf-8"))
        return len(kept)
    if lost := kept.keys() - found.keys():
        # The last entry that is there may be cut as well: what was kept counts.
        whole = {"schema": "2.0", "stages": {**found, **kept}}
        write_text(lock, yaml.safe_dump(whole, sort_keys=False))
    return len(lost)


def _names(text: str) -> set[str]:
    return set(re.findall(r"^  (\S.*):$", text, flags=re.MULTILINE))


def _stages(lock: Path) -> dict[str, Any] | None:
    """The entries of a lock file; None if it is none."""
    try:
        content = yaml.safe_load(lock.read_text(encoding="utf-8"))
        stages: dict[str, Any] | None = content["stages"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return stages if isinstance(stages, dict) else None
