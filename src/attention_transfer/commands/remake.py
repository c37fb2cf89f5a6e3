"""Makes a stage's damaged outputs anew, whatever DVC takes them for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from attention_transfer import graph_file, lock_file
from attention_transfer.config_errors import nearest
from attention_transfer.errors import StudyError


def remake(target: str) -> int:
    """Runs one stage again; DVC's exit code.

    Where DVC's cache and the working files are hard links of each other, damage is in both. DVC does not look
    into an object that it has, and would link the damaged one in the place of the new file: so the outputs' objects
    are removed first.

    Args:
        target: as DVC names it, such as `studies/smoke/dvc.yaml:split`; without a path, of ./dvc.yaml.

    Raises:
        StudyError: there is no such dvc.yaml, no such stage in it, or no repository of DVC around it.
    """
    graph, _, stage = target.rpartition(":")
    path = Path(graph or "dvc.yaml")
    if not path.exists():
        raise StudyError(
            "does not exist", where=str(path), remedy="name the stage as DVC does: dvc stage list --all"
        )
    if stage.partition("@")[0] not in graph_file.stages(path):
        raise StudyError(
            f"has no stage {stage!r}", where=str(path), remedy=f"name one of its own: dvc stage list {path}"
        )
    cache = _cache()
    made = lock_file.outputs(path.with_name(lock_file.NAME), stage)
    if "@" in stage and not made and stage not in (known := _instances(path)):
        raise StudyError(f"has no stage {stage!r}", where=str(path), remedy=nearest(stage, known))
    for digest in made:
        for found in [*_members(cache, digest), digest]:
            _object(cache, found).unlink(missing_ok=True)
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", f"{path}:{stage}"]
    return subprocess.run(command, check=False).returncode


def _instances(path: Path) -> list[str]:
    """The names that DVC gives to a graph's stages, each instance for itself."""
    command = [sys.executable, "-m", "dvc", "stage", "list", "--name-only", str(path)]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    if told.returncode:
        raise StudyError(
            f"DVC cannot read it: {told.stderr.strip()[:500]}",
            where=str(path),
            remedy="correct what it names",
        )
    return [line.rpartition(":")[2] for line in told.stdout.splitlines()]


def _members(cache: Path, digest: str) -> Iterator[str]:
    """The files of a folder, of which DVC keeps a list."""
    listed = _object(cache, digest)
    if digest.endswith(".dir") and listed.exists():
        try:
            digests = [entry["md5"] for entry in json.loads(listed.read_text(encoding="utf-8"))]
        except (ValueError, KeyError, TypeError):  # damaged itself: the folder's files keep their objects
            return
        yield from filter(lock_file.is_digest, digests)


def _object(cache: Path, digest: str) -> Path:
    return cache / digest[:2] / digest[2:]


def _cache() -> Path:
    asked = subprocess.run(
        [sys.executable, "-m", "dvc", "cache", "dir"], check=False, capture_output=True, text=True
    )
    if asked.returncode:
        raise StudyError(
            f"dvc cannot tell where its cache is: {asked.stderr.strip().splitlines()[0]}",
            where=str(Path.cwd()),
            remedy="run this in the folder of the study, where .dvc/ is",
        )
    return Path(asked.stdout.strip()) / "files" / "md5"
