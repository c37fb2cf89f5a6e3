"""DVC's files survive a kill.

DVC writes its lock file in place: killed meanwhile, it leaves half of it, which it then refuses, or takes for the
whole and runs every other stage again. So a stage keeps a copy as it begins, when DVC is not writing, and `mend`,
with which `make study` begins, puts back what has been cut off. An entry too many does no harm: DVC compares each
with the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import psutil

from attention_transfer import yaml_files
from attention_transfer.errors import StudyError
from attention_transfer.files import write_text

NAME = "dvc.lock"  # also of the copy, which lies among the study's checkpoints
DONE = "done"  # in a checkpoint's folder: the stage has written all of its outputs
_DAMAGED = "restore it from git, or delete it: every stage then runs again"


def path(study: str) -> Path:
    """A study's lock file, beside its dvc.yaml."""
    own = Path("studies") / study
    return (own if (own / "dvc.yaml").exists() else Path()) / NAME


def _copy(study: str) -> Path:
    return _root() / ".ckpt" / study / NAME


def keep(study: str) -> None:
    """Copies the lock file, unless it has lost a stage since it was last copied; never that of an experiment."""
    lock, copy = path(study), _copy(study)
    if "DVC_STAGE" not in os.environ or "DVC_EXP_NAME" in os.environ or not lock.exists():
        return
    text, before = lock.read_text(encoding="utf-8"), copy.read_text(encoding="utf-8") if copy.exists() else ""
    if text != before and text.endswith("\n") and _names(text) >= _names(before):
        write_text(copy, text)


def mend(study: str) -> int:
    """Puts back the entries that a kill has cut off: their number. While a DVC is at work, nothing is done.

    Raises:
        StudyError: the lock file is damaged, and there is no copy.
    """
    lock, copy = path(study), _copy(study)
    if _at_work():
        return 0
    _forget_damaged_locks()
    found = _stages(lock) if lock.exists() else {}
    if not copy.exists():
        if found is None or _cut(lock, copy, found):
            raise StudyError("is damaged", where=str(lock), remedy=_DAMAGED)
        return 0
    kept = _stages(copy) or {}
    if found is None:
        write_text(lock, copy.read_text(encoding="utf-8"))
        return len(kept)
    cut = _cut(lock, copy, found)
    if missing := cut | (kept.keys() - found.keys()):
        whole = {**kept, **{name: entry for name, entry in found.items() if name not in cut}}
        write_text(lock, yaml_files.dump({"schema": "2.0", "stages": whole}))
    return len(missing)


def outputs(lock: Path, stage: str) -> list[str]:
    """MD5 of each output of a stage in DVC's cache, of a folder that of its list; none if it has never run.

    Args:
        stage: such as `train@copy-0`, or `train` for all of them.

    Raises:
        StudyError: the file is not as DVC writes it.
    """
    entries = (_stages(lock) if lock.exists() else None) or {}
    chosen = [entry for name, entry in entries.items() if stage in (name, name.partition("@")[0])]
    try:
        digests = [out.get("md5") for entry in chosen for out in entry.get("outs", [])]
    except (AttributeError, TypeError) as error:
        raise StudyError(
            f"the outputs of {stage} are not written as DVC writes them",
            where=str(lock),
            remedy=_DAMAGED,
        ) from error
    return [digest for digest in digests if is_digest(digest)]


def is_digest(text: object) -> bool:
    """Whether this is an MD5 as DVC writes it: it becomes a part of a path."""
    return re.fullmatch(r"[0-9a-f]{32}(\.dir)?", str(text)) is not None


def forget_checkpoints(study: str) -> None:
    """Removes the checkpoints of stages whose outputs are in the lock file, and no others.

    A stage that was killed between its end and the lock file runs again: from its last checkpoint.
    """
    lock = path(study)
    locked = lock.read_text() if lock.exists() else ""
    for done in (_root() / ".ckpt" / study).glob(f"*/{DONE}"):
        record = Path(done.read_text())
        if record.exists() and hashlib.md5(record.read_bytes()).hexdigest() in locked:
            shutil.rmtree(done.parent, ignore_errors=True)


def _at_work() -> bool:
    """Whether a DVC is running in this repository."""
    root = _root().resolve()
    for process in psutil.process_iter():
        try:
            is_dvc = any(Path(word).name == "dvc" for word in process.cmdline())
            if is_dvc and Path(process.cwd()).is_relative_to(root):
                return True
        except psutil.Error:  # gone, or of another user
            continue
    return False


def _forget_damaged_locks() -> None:
    """Removes DVC's note of which process reads and writes what, if a kill has left half of it.

    DVC would refuse to work; where no DVC is at work, the note says nothing.
    """
    note = _root() / ".dvc" / "tmp" / "rwlock"
    try:
        json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        note.unlink()


def _root() -> Path:
    """The repository, also when a stage of an experiment runs in a copy of it."""
    return Path(os.environ.get("DVC_ROOT", "."))


def _cut(lock: Path, copy: Path, stages: dict[str, Any]) -> set[str]:
    """The last entry, if it is not all there as far as that can be told; none else.

    An entry that stops between two lines may be one that DVC accepts: it is known by what was kept of it.
    """
    if not stages:
        return set()
    import voluptuous
    from dvc.schema import COMPILED_LOCK_FILE_STAGE_SCHEMA  # type: ignore[import-untyped]

    name = next(reversed(stages))
    entry = stages[name]
    try:
        COMPILED_LOCK_FILE_STAGE_SCHEMA(entry)
    except voluptuous.Invalid:
        return {name}
    begins, was = f"\n  {name}:\n", copy.read_text(encoding="utf-8") if copy.exists() else ""
    there, kept = (text.partition(begins)[2] for text in (lock.read_text(encoding="utf-8"), was))
    return set() if there.endswith("\n") and (there == kept or not kept.startswith(there)) else {name}


def _names(text: str) -> set[str]:
    return set(re.findall(r"^  (\S.*):$", text, flags=re.MULTILINE))


def _stages(lock: Path) -> dict[str, Any] | None:
    """The entries of a lock file; None if it is none."""
    try:
        content = yaml_files.load(lock)
        stages: dict[str, Any] | None = content["stages"]
    except (yaml_files.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return stages if isinstance(stages, dict) else None
