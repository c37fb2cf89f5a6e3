"""Copies of this repository in which the smoke study runs, and how two of them are compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
GRAPH, PARAMS = "studies/smoke/dvc.yaml", "presets/smoke.yaml"
MARK = "ATTENTION_TRANSFER_FAULTS"  # in the environment of every process of one start
TEMPORARY = (".ckpt", "runs", "metrics", "reports")


class Study:
    """A clone in which the smoke study runs, or with `small` a part of it."""

    def __init__(self, folder: Path, *, small: bool = False) -> None:
        self.folder = folder
        if not folder.exists():
            subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
            changed = ["git", "ls-files", "--modified", "--others", "--exclude-standard"]
            listed = subprocess.run(changed, cwd=ROOT, check=True, capture_output=True, text=True)
            for name in filter(lambda name: (ROOT / name).exists(), listed.stdout.splitlines()):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        if small:
            # Each DVC would read the graphs, and each `sync` bring in the records: for seconds, and for a minute.
            graphs = (f"studies/{name}" for name in ("full", "imagenet1k", "tune"))
            for large in (*graphs, *(f"metrics/{name}" for name in ("core", "full", "tune"))):
                shutil.rmtree(folder / large, ignore_errors=True)
            params = yaml.safe_load((folder / PARAMS).read_text())
            params["runs"] = {name: params["runs"][name] for name in ("scratch", "distill")}
            params["evaluation"] |= {"sets": ["validation", "test"]}
            params["teachers"]["mae"] |= {"images": "digits", "epochs": 10}
            params |= {"seeds": [0], "ensembles": {}, "report": None}
            (folder / PARAMS).write_text(yaml.safe_dump(params, sort_keys=False))

    def environment(self, mark: str) -> dict[str, str]:
        # Debian's sh stays between DVC and the stage, unless the command in dvc.yaml sees to it.
        return {**os.environ, "PYTHONPATH": str(self.folder / "src"), "SHELL": "/bin/sh", MARK: mark}

    def check(self) -> None:
        subprocess.run(
            [sys.executable, "-m", "attention_transfer", "check", "--params", PARAMS],
            cwd=self.folder,
            env=self.environment(""),
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def begin(self, *command: str, mark: str = "", session: bool = False) -> subprocess.Popen[str]:
        """Starts a command in the clone, whose output can be read from `stdout`."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(mark),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=session,
        )

    def temporaries(self) -> set[Path]:
        """Unfinished files."""
        return {path for root in TEMPORARY for path in (self.folder / root).rglob(".tmp-*")}


def contents(study: Study) -> dict[str, bytes]:
    """All results; run.json and the report hold times and revisions."""
    found = {}
    for root in ("runs/smoke", "metrics/smoke", "reports/smoke/tables"):
        for path in sorted((study.folder / root).rglob("*")):
            if path.is_file() and path.name != "run.json":
                found[str(path.relative_to(study.folder))] = path.read_bytes()
    return found


def differing(first: Study, second: Study) -> list[str]:
    """Results that are not equal to the bit, or not in both."""
    a, b = contents(first), contents(second)
    # The report's tables of times and costs are those of the runs' own records.
    timed = ("time.csv", "time.md", "cost.csv", "cost.md")
    return sorted(
        name for name in a.keys() | b.keys() if a.get(name) != b.get(name) and not name.endswith(timed)
    )


def left_behind(study: Study, completed: Counter[str]) -> list[str]:
    """Temporary files, checkpoints, and MLflow's runs that are RUNNING or more than were completed."""
    study.check()  # as the next start does
    found = [f"temporary file {path}" for path in study.temporaries()]
    found += [f"checkpoint {path}" for path in (study.folder / ".ckpt").glob("*/*/")]
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-m", "attention_transfer", "sync"],
            cwd=study.folder,
            env=study.environment(""),
            stdout=subprocess.DEVNULL,
            check=True,
        )
    told = subprocess.run(
        [sys.executable, "-c", RUNS],
        cwd=study.folder,
        env=study.environment(""),
        check=True,
        capture_output=True,
        text=True,
    )
    runs = json.loads(told.stdout.splitlines()[-1])
    found += [f"run {stage} is RUNNING" for stage, status in runs if status == "RUNNING"]
    shown = Counter(stage for stage, status in runs if status == "FINISHED" and stage)
    # A stage that was through when it was killed may never be seen again: it counts once.
    many = {stage: count for stage, count in shown.items() if count > max(completed[stage], 1)}
    return found + [f"{count} runs of {stage}" for stage, count in many.items()]


RUNS = """
import json
from pathlib import Path
from attention_transfer.tracking.database import connect
runs = connect(Path()).search("tags.kind = 'stage'")
runs = [run for run in runs if run.data.tags["study"] == "smoke"]
stages = [run.data.tags.get("dvc.stage", "").rpartition(":")[2] for run in runs]
print(json.dumps([[stage, run.info.status] for stage, run in zip(stages, runs)]))
"""
