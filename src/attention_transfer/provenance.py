"""What made a result: the code that a stage uses, the revision, the versions, the machine."""

from __future__ import annotations

import ast
import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from attention_transfer.files import fingerprint, sha256

PACKAGE = Path(__file__).parent
# These cannot change a result: they check params.yaml (whose resolved values count), name files, show
# progress and keep records. Whatever else a stage imports is part of its fingerprint and of its deps.
NEUTRAL = frozenset(
    PACKAGE / name
    for name in (
        "__init__.py",
        "cluster.py",
        "config.py",
        "config_errors.py",
        "config_runs.py",
        "config_teachers.py",
        "config_values.py",
        "errors.py",
        "files.py",
        "launching.py",
        "layout.py",
        "lock_file.py",
        "machine_file.py",
        "params_yaml.py",
        "provenance.py",
        "run_record.py",
        "stage.py",
        "stop_signals.py",
        "yaml_files.py",
    )
)


@functools.cache
def imported_files(script: Path) -> tuple[Path, ...]:
    """Files of this package that a script imports, directly or not, wherever in it; without `NEUTRAL`.

    Read from the source without running it, so that imports inside functions count too.
    """
    found: set[Path] = set()
    queue = [script]
    while queue:
        for module in _imports(queue.pop()):
            path = PACKAGE.joinpath(*module.split(".")[1:])
            file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
            neutral = file in NEUTRAL or PACKAGE / "tracking" in file.parents
            if file.is_file() and file not in found and not neutral:
                found.add(file)
                queue.append(file)
    return tuple(sorted(found))


def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from package import module` imports a module, `from package.module import name` does not.
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    packages = [name.rpartition(".")[0] for name in names]
    return [name for name in {*names, *packages} if name.startswith(PACKAGE.name + ".")]


def code_files(script: Path) -> tuple[Path, ...]:
    """What `imported_files` finds, and the templates and texts that lie beside it."""
    imported = imported_files(script)
    texts = {
        text for file in imported for kind in ("templates/*", "*.jsonl") for text in file.parent.glob(kind)
    }
    return tuple(sorted({*imported, *texts}))


def code_fingerprint(script: Path) -> str:
    """Hash of a stage's script and of every file of this package that it uses."""
    files = [script.resolve(), *code_files(script.resolve())]
    return fingerprint({path.name + str(i): sha256(path) for i, path in enumerate(files)})


def git_state() -> dict[str, Any]:
    """The revision, and whether tracked files differ from it; None outside a repository."""

    # Records and lock files change with every run: only code and params say that a revision is not clean.
    changed = _git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        "src",
        "pipeline",
        "params.yaml",
        "presets",
        "dvc.yaml",
    )
    return {
        "git_revision": _git("rev-parse", "HEAD"),
        "git_dirty": None if changed is None else bool(changed),
    }


def last_changes(path: Path) -> list[str | None]:
    """For each line of a file the commit that last changed it; None where git does not know of one.

    It does not outside a repository, of what is not committed, or of what is older than a shallow clone.
    """
    lines = len(path.read_text(encoding="utf-8").splitlines())
    told = _git("blame", "--line-porcelain", "--", str(path))
    if told is None:
        return [None] * lines
    cut_off = _git("rev-parse", "--is-shallow-repository") != "false"
    found: list[str | None] = []
    for block in re.split(r"(?m)^(?=[0-9a-f]{40} \d+ \d+)", told)[1:]:
        commit = block[:40]
        unknown = set(commit) == {"0"} or (cut_off and "\nboundary\n" in block)
        found.append(None if unknown else commit)
    return found


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def dvc_stage() -> dict[str, str]:
    """What DVC tells a stage: its `stage`, and within an experiment the `exp`."""
    told = {"stage": "DVC_STAGE", "exp": "DVC_EXP_NAME"}
    return {key: os.environ[name] for key, name in told.items() if os.environ.get(name)}


def versions() -> dict[str, str]:
    """Versions of what computes."""
    names = (
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "scipy",
        "scikit-learn",
        "dvc",
        "mlflow",
        "attention-transfer",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What it ran on, as far as that helps to read timings."""
    import psutil

    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if platform.system() == "Darwin" else 1e3), 1)  # macOS counts bytes, Linux kB
