"""A small study that has run, through all of its stages, for tests of what comes after.

Each stage is a fork of one process that has imported torch and the rest already; DVC is told afterwards. That takes a
fraction of the time that DVC takes to run the same stages, which tests/test_study.py does.

python tests/prepared_study.py [PRESET]    in a copy of the repository: runs presets/smoke.yaml, or another study
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PRESET = Path("presets/smoke.yaml")
GRAPH = "studies/smoke/dvc.yaml"  # of that preset
LARGEST = ("studies/full/", "presets/full", "studies/tune/", "presets/tune", "metrics/full", "reports/full")
NEVER_RUN = ("studies/imagenet1k/",)  # of which DVC says in front of all else that it has no results


def copy(folder: Path) -> None:
    """The files that git would commit, without the studies that have most of the stages; in a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        source, target = ROOT / name, folder / name
        if name and source.is_file() and not name.startswith((*LARGEST, *NEVER_RUN)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    (folder / "studies" / "smoke" / "dvc.lock").unlink()
    shutil.copytree(ROOT / "data", folder / "data", dirs_exist_ok=True)
    shrink(folder / PRESET)
    identity = (("config", "user.name", "test"), ("config", "user.email", "test@example.org"))
    for command in (("init", "-q"), *identity, ("add", "-A"), ("commit", "-q", "-m", "test")):
        subprocess.run(["git", *command], cwd=folder, check=True)


def shrink(preset: Path) -> None:
    """The smoke study, smaller still."""
    values: dict[str, Any] = yaml.safe_load(preset.read_text(encoding="utf-8"))
    values["data"] |= {"labelled": 50, "validation": 50}
    values["views"]["per_image"] = 2
    values["training"]["curve_images"] = 50
    values["teachers"]["mae"] |= {
        "images": "digits",
        "batch_size": 256,
    }  # in hundreds, not in tens of thousands
    for run in values["runs"].values():
        run |= {"epochs": 2, "warmup_epochs": 1, "batch_size": 25}
    values["evaluation"] |= {"shifts": ["contrast"], "severities": [1], "shift_images": 50, "bootstrap": 20}
    preset.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def stages(preset: Path) -> list[tuple[str, str, dict[str, str]]]:
    """Script, name in DVC, and arguments of each stage, in an order in which they can run."""
    values = yaml.safe_load(preset.read_text(encoding="utf-8"))
    grid = [(run, str(seed)) for run in values["runs"] for seed in values["seeds"]]
    found: list[tuple[str, str, dict[str, str]]] = [("data", "data", {}), ("split", "split", {})]
    for script in ("pretrain", "probe", "cache"):
        found += [(script, f"{script}@{name}", {"teacher": name}) for name in values["teachers"]]
    found += [("finetuned", "finetuned", {}), ("shifts", "shifts", {})]
    found += [("resolve", f"resolve@{run}", {"run": run}) for run in values["runs"]]
    for script in ("train", "predict"):
        found += [(script, f"{script}@{run}-{seed}", {"run": run, "seed": seed}) for run, seed in grid]
    return found + [(script, script, {}) for script in ("evaluate", "similarity", "maps", "report")]


def run(preset: Path, script: str, name: str, arguments: dict[str, str]) -> None:
    """One stage in a fork."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{name} failed")
        return
    os.environ["DVC_STAGE"] = f"{graph(preset)}:{name}"
    options = [part for key, value in arguments.items() for part in (f"--{key}", value)]
    sys.argv = [f"pipeline/{script}.py", "--params", str(preset), *options]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        print(ended.code, file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(code)


def graph(preset: Path) -> str:
    return f"studies/{preset.stem}/dvc.yaml"


def main(preset: Path) -> None:
    """Runs all stages, and writes DVC's lock file."""
    for module in ("attention_transfer.stage", "torch", "timm", "pandas", "matplotlib.figure", "altair"):
        __import__(module)
    for stage in stages(preset):
        run(preset, *stage)
    subprocess.run([sys.executable, "-m", "dvc", "commit", "--quiet", "--force", graph(preset)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else PRESET)
