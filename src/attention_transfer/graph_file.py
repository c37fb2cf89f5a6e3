"""A study's dvc.yaml: how it is told apart from others, and whether it waits for all that the study's runs use."""

from __future__ import annotations

import os
from pathlib import Path

from attention_transfer import lock_file, yaml_files
from attention_transfer.config import Study
from attention_transfer.errors import StudyError

OWN_TEACHER = "${item.teacher}"
"""In a graph: the teacher of the run that a stage is for."""
_REMEDY = "run: python studies/graphs.py"
_VARS = "vars:\n  - where.yaml\n"


def of_study(graph: str, folder: Path, params: Path) -> str:
    """The text of a study's own dvc.yaml: ./dvc.yaml with its params."""
    heading = "# Written by studies/graphs.py: dvc.yaml with the params of this study.\n"
    return heading + with_params(graph, folder, params)


def with_params(graph: str, folder: Path, params: Path) -> str:
    """The text of a graph that takes its values from a params file elsewhere.

    A file, and no symbolic links to ./dvc.yaml and to the params: of a committed revision DVC reads the files as git
    keeps them, follows no link, and then shows no metrics, params or experiments of that revision at all.

    Args:
        graph: text of ./dvc.yaml.
        folder: where the graph will lie, and beside it where.yaml.
    """
    assert graph.count(_VARS) == 1
    return graph.replace(_VARS, f"{_VARS}  - {os.path.relpath(params, folder)}\n")


def stages(graph: Path) -> set[str]:
    """Names of a dvc.yaml's stages; of one that is made several times, the part before the `@`.

    Raises:
        StudyError: the file is no YAML.
    """
    try:
        found: dict[str, object] = yaml_files.load(graph)["stages"]
    except (yaml_files.YAMLError, KeyError, TypeError) as error:
        raise StudyError("lists no stages", where=str(graph), remedy=_REMEDY) from error
    return set(found)


def check(study: Study) -> None:
    """Compares the graph that studies/graphs.py wrote with the params, which may have changed since.

    Raises:
        StudyError: an experiment has no graph, or a graph that names its teachers lacks one that a run uses.
    """
    graph = lock_file.path(study.name).with_name("dvc.yaml")
    if study.is_experiment and graph.parts[1:-1] != tuple(study.name.split("/")):
        raise StudyError("has no graph", where=f"studies/{study.name}", remedy=_REMEDY)
    if not graph.exists():
        return
    deps = yaml_files.load(graph)["stages"]["resolve"]["do"]["deps"]
    if any(dep.endswith("/teachers") for dep in deps):
        return  # all of them
    named = {dep.rpartition("/")[2] for dep in deps if "/teachers/" in dep}
    needed = study.transferred_from
    if OWN_TEACHER in named:
        needed = tuple(run.initial for run in study.runs.values() if run.initial)
    if missing := [name for name in needed if name not in named]:
        raise StudyError(
            f"does not wait for {missing[0]}, which a run uses", where=str(graph), remedy=_REMEDY
        )
    if study.has_logit_losses and not any(dep.endswith("/finetuned") for dep in deps):
        raise StudyError(
            "does not wait for the fine-tuned teachers, one of which a run uses",
            where=str(graph),
            remedy=_REMEDY,
        )
