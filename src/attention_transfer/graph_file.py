"""A study's dvc.yaml: whether it waits for all that the study's runs use."""

from __future__ import annotations

import yaml

from attention_transfer import lock_file
from attention_transfer.config import Study
from attention_transfer.errors import StudyError

_REMEDY = "run: python studies/graphs.py"


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
    deps = yaml.safe_load(graph.read_text(encoding="utf-8"))["stages"]["resolve"]["do"]["deps"]
    if any(dep.endswith("/teachers") for dep in deps):
        return  # all of them
    named = {dep.rpartition("/")[2] for dep in deps if "/teachers/" in dep}
    if missing := [name for name in study.transferred_from if name not in named]:
        raise StudyError(
            f"does not wait for {missing[0]}, which a run uses", where=str(graph), remedy=_REMEDY
        )
    if study.has_logit_losses and not any(dep.endswith("/finetuned") for dep in deps):
        raise StudyError(
            "does not wait for the fine-tuned teachers, one of which a run uses",
            where=str(graph),
            remedy=_REMEDY,
        )
