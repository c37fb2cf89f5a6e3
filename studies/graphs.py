"""Writes what can be told of the graphs: the code that stages depend on, and the graphs of experiments.

    python studies/graphs.py

In dvc.yaml each stage lists the library files that its script imports, directly or not. studies/<study>/dvc.yaml is
a copy of it with the study's params; studies/full/dvc.yaml names the teachers that its own runs use, so that they wait
for no other. studies/<study>/<experiment>/ is written for each experiment that the study names:
dvc.yaml has those stages that an experiment has for itself, where.yaml its paths.
Run it after imports, stages, experiments or their teachers have changed; `check` and a test tell when.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from attention_transfer import config, graph_file, provenance  # noqa: E402
from attention_transfer.config import Study  # noqa: E402

OF_EXPERIMENTS = ("resolve", "train", "predict", "evaluate", "similarity")
OF_DATA = ("data", "split", "cache")  # beside those, of an experiment with data of its own
# DVC reads and writes its lock file anew for every stage: the many stages list a room whole where they use
# most of it.
BY_ROOM = ("train", "predict", "finetuned")
OWN_PARAMS = ("seeds", "runs", "ensembles")
HEADER = """# Written by studies/graphs.py from dvc.yaml: the stages that an experiment has for itself.
# {shared} are the study's.
vars:
  - where.yaml

stages:
"""


def code_of(stage: str) -> list[str]:
    """The files and rooms of code that a stage depends on, its script first."""
    script = ROOT / "pipeline" / f"{stage}.py"
    files = [path.relative_to(ROOT) for path in provenance.code_files(script)]
    if stage == "resolve":  # writes out the defaults of runs and of their teachers
        files += [Path(f"src/attention_transfer/config_{name}.py") for name in ("runs", "teachers")]
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


def of_experiment(block: str, own_sections: tuple[str, ...]) -> str:
    """The stage with its own outputs apart from the study's, and its params in two files."""
    own_data = "data" in own_sections
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
        # The metrics that DVC shows are those of studies: a column for each run of each experiment is too many.
        (r"(?m)^ +metrics:\n", ""),
    ):
        block = re.sub(pattern, replacement, block)
    found = re.search(r"(?m)^( +)- \$\{where\.params\}:\n((?:\1    - .*\n)+)", block)
    assert found
    asked = [line.split("- ")[1] for line in found[2].splitlines()]
    params = [
        "\n".join([f"{found[1]}- ${{where.{file}}}:", *(f"{found[1]}    - {key}" for key in keys)])
        for file, keys in _by_file(asked, own_sections).items()
        if keys
    ]
    return block[: found.start()] + "\n".join(params) + "\n" + block[found.end() :]


def _by_file(asked: list[str], own_sections: tuple[str, ...]) -> dict[str, list[str]]:
    """The params that a stage depends on: those in the experiment's file, and those in the study's."""
    own, shared = [], []
    for key in asked:
        section = key.partition(".")[0]
        if section in OWN_PARAMS or key == "evaluation.sets":
            own.append(key)
        else:
            shared.append(key)
            # Here a part may be the experiment's own: it depends on the section in both files.
            if key == "evaluation" or section in own_sections:
                own.append(section)
    return {"params": list(dict.fromkeys(own)), "shared": shared}


def of_teachers(stage: str, block: str, study: Study) -> str:
    """The stage with the teachers that it uses in place of all, and without fine-tuned ones where no run has any.

    `resolve` waits for its run's own teacher alone, so that students of one teacher are trained before the next is
    made; but not where a run has an `initial` too, a key that DVC cannot look up in runs without it.
    """
    used = (study.tutors if stage == "finetuned" else study).transferred_from
    if stage == "resolve" and not any(run.initial for run in study.runs.values()):
        used = (graph_file.OWN_TEACHER,)
    for pattern, names in (
        (r"(?m)^( +- runs/\S+?/teachers)\n", [f"/{name}" for name in used]),
        (r"(?m)^( +- runs/\S+?/finetuned)\n", [""] if study.has_logit_losses else []),
    ):
        block = re.sub(pattern, "".join(rf"\1{name}\n" for name in names), block)
    if stage == "resolve":  # its params
        block = re.sub(r"(?m)^( +- teachers)\n", "".join(rf"\1.{name}\n" for name in used), block)
    return block


def files() -> dict[Path, str]:
    """The text of each graph and of each experiment's where.yaml, as it should be."""
    whole = blocks((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    whole = {name: with_code(name, block) if name else block for name, block in whole.items()}
    found = {ROOT / "dvc.yaml": "".join(whole.values())}
    for file in (ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))):
        study = config.load(file)
        folder = ROOT / "studies" / study.name
        if folder.is_dir():
            named = _names_its_teachers(folder / "dvc.yaml")
            own = "".join(
                of_teachers(name, block, study) if named else block for name, block in whole.items()
            )
            found[folder / "dvc.yaml"] = graph_file.of_study(own, folder, file)
        for name, experiment in config.experiments(file).items():
            graph = _experiment(whole, experiment)
            found[folder / name / "dvc.yaml"] = graph_file.with_params(
                graph, folder / name, config.experiment_file(file, name)
            )
            found[folder / name / "where.yaml"] = _where(file.relative_to(ROOT), study, name, experiment)
    return found


def _names_its_teachers(graph: Path) -> bool:
    """Whether a study's graph waits for single teachers: it goes on so, and another does not begin to by itself.

    It has to be written anew when a run takes another teacher; and to narrow it would make its stages stale.
    """
    return (
        graph.exists()
        and re.search(r"/teachers/(?!\$\{key\})", graph.read_text(encoding="utf-8")) is not None
    )


def _experiment(whole: dict[str, str], experiment: Study) -> str:
    own_data = experiment.own_data
    shared = "Teachers" if own_data else "Images, splits, teachers, caches and shifts"
    stages = (*OF_DATA, *OF_EXPERIMENTS) if own_data else OF_EXPERIMENTS
    text = HEADER.format(shared=shared) + "".join(
        of_teachers(name, of_experiment(whole[name], experiment.own_sections), experiment) for name in stages
    )
    return text.rstrip() + "\n"


def _where(file: Path, study: Study, name: str, experiment: Study) -> str:
    lines = [
        "# Written by studies/graphs.py: where dvc.yaml finds the repository, its params and those of its study.",
        "where:",
        "  root: ../../..",
        f"  params: {config.experiment_file(file, name)}",
        f"  shared: {file}",
        f"  base: {study.name}",
        f"  own: {study.name}/experiments/{name}",
        f"  experiment: {name}",
    ]
    if experiment.own_data:
        teachers = ", ".join(experiment.cached_teachers)
        lines += [
            f"  folder: {experiment.data.folder} # data.folder",
            f"  teachers: [{teachers}] # those of its runs",
        ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of a study that was made when these were links: to ./dvc.yaml, which stays as it is.
        for link in (path, path.with_name("params.yaml")):
            if link.is_symlink():
                link.unlink()
        path.write_text(text, encoding="utf-8")
