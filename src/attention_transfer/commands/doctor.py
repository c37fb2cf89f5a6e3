"""`doctor`: whether this machine, its packages, the study's params and its disk are in order, and what to do if not.

What it looks at it imports there: where a package is missing, it says so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from attention_transfer import provenance
from attention_transfer.errors import StudyError

if TYPE_CHECKING:
    from attention_transfer.config import Study

PYTHONS = ((3, 11), (3, 12))
LOCK = Path("requirements.lock")
INSTALL = "make setup, or: pip install -r requirements.lock -e ."
SERVER_SECONDS = 5.0
SHOWN = 5  # packages named in a line

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do where it is not in order.

    Attributes:
        level: a note may change last bits or leave something out; a problem stops the study.
    """

    about: str
    level: Level
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        sign = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}[self.level]
        return f"{sign}  {self.about}: {self.found}" + (
            f"\n         What to do: {self.remedy}" if self.remedy else ""
        )


def show(params: Path, *, as_json: bool) -> int:
    """Prints every finding: 1 if one of them is a problem."""
    found = []
    for finding in examine(params):
        found.append(finding)
        if not as_json:
            print(finding, flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], ensure_ascii=False))
    return int(any(finding.level == "problem" for finding in found))


def examine(params: Path) -> Iterator[Finding]:
    """Looks at one thing after another; what fails in one does not hide the others."""
    yield _python()
    yield _attempt("packages", _packages)
    yield _attempt("computing", _computing)
    yield _attempt("git", _git)
    yield _attempt("tracking", _tracking)
    yield (found := _attempt("params", lambda: _params(params)))
    if found.level == "ok":
        yield _attempt("images", lambda: _images(params))
        yield _attempt("disk", lambda: _disk(params))


def _attempt(about: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except StudyError as error:
        return Finding(about, "problem", f"{error.where}: {error.problem}", error.remedy)
    except ImportError as error:
        return Finding(about, "problem", f"a package is missing or broken: {error}", INSTALL)


def _python() -> Finding:
    here = sys.version_info[:2]
    found = f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}"
    if here in PYTHONS:
        return Finding("python", "ok", found)
    tested = " and ".join(".".join(map(str, version)) for version in PYTHONS)
    return Finding("python", "problem", f"{found}; tested are {tested}", "make PYTHON=python3.11 setup")


def _packages() -> Finding:
    """Against the lock: other versions may change last bits, a missing one stops something."""
    from packaging.requirements import InvalidRequirement, Requirement

    if not LOCK.exists():
        return Finding(
            "packages", "note", f"no {LOCK} here to compare with", "run this in the repository's root"
        )
    missing, others = [], []
    for line in LOCK.read_text(encoding="utf-8").splitlines():
        try:
            wanted = Requirement(line.split("#")[0].strip())
        except InvalidRequirement:
            continue  # a comment or an option of pip
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            missing.append(wanted.name)
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            others.append(f"{wanted.name} {version} (locked {wanted.specifier})")
    if missing:
        return Finding("packages", "problem", f"not installed: {_listing(missing)}", INSTALL)
    if others:
        return Finding("packages", "note", f"not those of {LOCK}: {_listing(others)}", INSTALL)
    return Finding("packages", "ok", f"as in {LOCK}")


def _computing() -> Finding:
    import psutil
    import torch

    from attention_transfer.training import machine

    device = machine.prepare()
    memory = psutil.virtual_memory()
    found = f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
    found += f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB of memory free"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        found += f"; {name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return Finding("computing", "ok", found)


def _git() -> Finding:
    if shutil.which("git") is None:
        return Finding("git", "note", "is not installed: records will not name a revision", "install git")
    state = provenance.git_state()
    if state["git_revision"] is None:
        return Finding(
            "git", "note", "no revision here: records will not name one", "git init, or clone the project"
        )
    changed = ", code or params differ from it" if state["git_dirty"] else ""
    return Finding("git", "ok", f"revision {state['git_revision'][:12]}{changed}")


def _tracking() -> Finding:
    """Where runs are shown; the study goes on without it."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not server.startswith(("http://", "https://")):
        return Finding("tracking", "ok", server or "mlflow.db in this folder")
    try:
        with urllib.request.urlopen(f"{server.rstrip('/')}/health", timeout=SERVER_SECONDS):
            return Finding("tracking", "ok", f"{server} answers")
    except (urllib.error.URLError, OSError, ValueError) as error:
        return Finding(
            "tracking",
            "note",
            f"{server} does not answer: {error}",
            "start it, or go on and bring the runs in later: python -m attention_transfer sync",
        )


def _load(params: Path) -> Study:
    from attention_transfer import config

    return config.load(params)


def _params(params: Path) -> Finding:
    from attention_transfer import graph_file

    study = _load(params)
    graph_file.check(study)
    runs = f"{len(study.runs)} runs x {len(study.seeds)} seeds"
    return Finding("params", "ok", f"{params}: study {study.name}, {runs}")


def _images(params: Path) -> Finding:
    from attention_transfer.layout import Layout

    study = _load(params)
    folder, layout = Path(study.data.folder), Layout.of(study)
    if (layout.images / "dataset.json").exists():
        return Finding("images", "ok", f"read already, in {layout.images}")
    if study.data.source == "fashion-mnist":
        return Finding("images", "ok", f"from {folder}, Debian's package or a download: whichever there is")
    if study.data.source == "digits":
        return Finding("images", "ok", "scikit-learn's digits")
    if study.data.source == "folder":
        splits = (study.data.train_split, study.data.test_split)
        if lacking := [split for split in splits if not (folder / split).is_dir()]:
            return Finding(
                "images",
                "problem",
                f"{folder} has no folder {' and no folder '.join(lacking)}",
                f"put a folder per class into {folder / lacking[0]}, or correct data.folder in the params",
            )
    return Finding("images", "ok", f"{study.data.source} from {folder}")


def _disk(params: Path) -> Finding:
    from attention_transfer import plan
    from attention_transfer.layout import Layout

    study = _load(params)
    layout = Layout.of(study)
    wanted = plan.check_room(study, layout, params)
    free = shutil.disk_usage(layout.artifacts).free
    return Finding(
        "disk",
        "ok",
        f"caches and predictions take up to {wanted / 1e9:.1f} GB more, {free / 1e9:.0f} GB are free",
    )


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
