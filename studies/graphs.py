"""Writes what can be told of the graphs: the code that stages depend on, and the graph of experiments.

    python studies/graphs.py

In dvc.yaml each stage lists the library files that its script imports, directly or not. experiment.yaml is made of
those stages of dvc.yaml that an experiment has for itself, experiment_with_data.yaml of those of an experiment with
data of its own; an experiment's folder holds links to one of them and to the experiment's params, and where.yaml.
Run it after imports or stages have changed; a test tells when.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from attention_transfer import provenance  # noqa: E402

OF_EXPERIMENTS = ("resolve", "train", "predict", "evaluate", "similarity")
OF_DATA = ("data", "split", "cache")  # beside those, of an experiment with data of its own
# DVC reads and writes its lock file anew for every stage: the many stages list a room whole where they use
# most of it.
BY_ROOM = ("train", "predict", "finetuned")
OWN_PARAMS = ("seeds", "runs", "ensembles")
HEADER = """# Written by studies/graphs.py from dvc.yaml: the stages that each experiment of a study has for itself.
# {shared} are the study's.
vars:
  - where.yaml

stages:
"""


def code_of(stage: str) -> list[str]:
    """The files and rooms of code that a stage depends on, its script first."""
    script = ROOT / "pipeline" / f"{stage}.py"
    files = [path.relative_to(ROOT) for path in provenance.code_files(script)]
    if stage == "resolve":  # writes out the defaults of runs, which are config.py's
        files.append(Path("src/attention_transfer/config.py"))
    if stage in BY_ROOM:
        for room in {file.parent for file in files if len(file.parts) > 3}:
            used = [file for file in files if file.parent == room]
            if 2 * len(used) > len(list((ROOT / room).glob("*.py"))):
                files = [file for file in files if file not in used] + [room]
    return [f"pipeline/{stage}.py", *sorted(map(str, files))]


def blocks(graph: str) -> dict[str, str]:
    """The text of each stage; what stands before the first is under the empty name."""
    parts = re.split(r"(?m)^(?=  [a-z]+:\n)", graph)
    return {"": parts[0]} | {part.split(":")[0].strip(): part for part in parts[1:]}


def with_code(stage: str, block: str) -> str:
    """The stage with its present code under `deps`, and the other deps behind it."""
    found = re.search(r"(?m)^( +)deps:\n((?:\1  - .*\n)+)", block)
    assert found, f"{stage} has no deps"
    others = [
        line for line in found[2].splitlines() if not line.strip().startswith(("- src/", "- pipeline/"))
    ]
    lines = [f"{found[1]}  - {file}" for file in code_of(stage)] + others
    return block[: found.start(2)] + "\n".join(lines) + "\n" + block[found.end(2) :]


def of_experiment(block: str, *, own_data: bool) -> str:
    """The stage with its own outputs apart from the study's, and its params in two files."""
    own = ["resolved", "students", "predictions", *(["data", "splits", "cache"] if own_data else [])]
    records = ["evaluate", "similarity", *(OF_DATA if own_data else [])]
    for pattern, replacement in (
        (rf"runs/\$\{{name\}}/({'|'.join(own)})", r"runs/${where.own}/\1"),
        (rf"metrics/\$\{{name\}}/({'|'.join(records)})", r"metrics/${where.base}/\1/${where.experiment}"),
        (r"\$\{name\}", "${where.base}"),
        # What an experiment does not say, it cannot be asked for: where.yaml tells.
        (r"\$\{data\.folder\}", "${where.folder}"),
        (r"foreach: \$\{teachers\}", "foreach: ${where.teachers}"),
        (r"\$\{key\}", "${item}") if "${teachers}" in block else (r"$^", ""),
    ):
        block = re.sub(pattern, replacement, block)
    found = re.search(r"(?m)^( +)- \$\{where\.params\}:\n((?:\1    - .*\n)+)", block)
    assert found
    asked = [line.split("- ")[1] for line in found[2].splitlines()]
    params = [
        "\n".join([f"{found[1]}- ${{where.{file}}}:", *(f"{found[1]}    - {key}" for key in keys)])
        for file, keys in _by_file(asked, own_data=own_data).items()
        if keys
    ]
    return block[: found.start()] + "\n".join(params) + "\n" + block[found.end() :]


def _by_file(asked: list[str], *, own_data: bool) -> dict[str, list[str]]:
    """The params that a stage depends on: those in the experiment's file, and those in the study's."""
    own, shared = [], []
    for key in asked:
        section = key.partition(".")[0]
        if section in OWN_PARAMS or key == "evaluation.sets":
            own.append(key)
        else:
            shared.append(key)
            # Here a part may be the experiment's own: it depends on the section in both files.
            if key == "evaluation" or (section == "data" and own_data):
                own.append(section)
    return {"params": list(dict.fromkeys(own)), "shared": shared}


def graphs() -> dict[Path, str]:
    """The text of each graph, as it should be."""
    whole = blocks((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    whole = {name: with_code(name, block) if name else block for name, block in whole.items()}
    folder = ROOT / "studies"
    return {
        ROOT / "dvc.yaml": "".join(whole.values()),
        folder / "experiment.yaml": _experiment(whole, own_data=False),
        folder / "experiment_with_data.yaml": _experiment(whole, own_data=True),
    }


def _experiment(whole: dict[str, str], *, own_data: bool) -> str:
    shared = "Teachers" if own_data else "Images, splits, teachers, caches and shifts"
    stages = (*OF_DATA, *OF_EXPERIMENTS) if own_data else OF_EXPERIMENTS
    text = HEADER.format(shared=shared) + "".join(
        of_experiment(whole[name], own_data=own_data) for name in stages
    )
    return text.rstrip() + "\n"


if __name__ == "__main__":
    for path, text in graphs().items():
        path.write_text(text, encoding="utf-8")
