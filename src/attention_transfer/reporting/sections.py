"""The page's sections: which figures, tables and claims stand together."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

from attention_transfer.config import Study, experiment_file
from attention_transfer.reporting.experiments import Experiment


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        figures, tables: by name, in order; what a study does not have is left out.
        folded: figures that are shown on demand.
        experiment: of the paper's list, whose claims stand here.
        study: by which it is made again; empty where nothing of the paper's list is.
        params: the file of that study.
        part: of the file, as it stands there.
        details: it is for looking things up.
    """

    anchor: str
    heading: str
    figures: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    experiment: str = ""
    _: KW_ONLY
    folded: tuple[str, ...] = ()
    study: str = ""
    params: str = ""
    part: str = ""
    details: bool = False


FIRST = (
    Section("main", "Main comparison", ("main",), ("main",), "main"),
    Section("ensembles", "Ensembles", ("ensembles", "ensemble_matrix"), ("ensembles",), "ensemble"),
)
BEHIND_EXPERIMENTS = (
    Section(
        "shifts",
        "Distribution shift",
        ("shift_severity", "shift_scatter", "contact_sheet"),
        ("robustness", "shifts", "published"),
        "shift",
        folded=("contact_sheet",),
    ),
    Section("maps", "Where the models look", ("attention_maps",), (), "maps"),
    Section("similarity", "How alike the models are", ("cka", "divergence"), ("similarity",), "similarity"),
    Section("cost", "What the methods cost", (), ("cost",), "cost"),
    Section("replication", "Other teachers, other labels", (), ("replication",)),
    Section("teachers-alone", "Teachers before fine-tuning", (), ("teachers",), details=True),
    Section("learning", "Learning curves", ("learning_curves",), ("training",), details=True),
    Section(
        "metrics",
        "Calibration and other measures",
        (),
        ("metrics", "calibration", "ood"),
        details=True,
    ),
    Section("comparisons", "Paired comparisons", (), ("comparisons",), details=True),
    Section("recipes", "Recipes and time", (), ("recipes", "time"), details=True),
)


def of_study(
    study: Study,
    params: Path,
    experiments: Sequence[Experiment],
    *,
    figures: Container[str],
    tables: Container[str],
    claims: Container[str],
) -> list[Section]:
    """The sections with what the study has; those of the experiments lie behind the main comparison's.

    Args:
        params: the study's file.
        claims: experiments that have any.
    """
    found = [
        *(_of_study(section, study, params) for section in FIRST),
        *(_of_experiment(experiment, params) for experiment in experiments),
        *(_of_study(section, study, params) for section in BEHIND_EXPERIMENTS),
    ]
    found = [
        replace(
            section,
            figures=tuple(name for name in section.figures if name in figures),
            tables=tuple(name for name in section.tables if name in tables),
        )
        for section in found
    ]
    return [section for section in found if section.figures or section.tables or section.experiment in claims]


def _of_study(section: Section, study: Study, params: Path) -> Section:
    """How it is made again, where it is one of the paper's experiments."""
    if not section.experiment:
        return section
    parts = {
        "main": {"runs": _dumped(study.runs)},
        "ensemble": {"ensembles": _dumped(study.ensembles)},
        "shift": {"evaluation": study.evaluation.model_dump(mode="json", include={"shifts", "severities"})},
    }
    part = _as_params(parts.get(section.experiment, {}))
    return replace(section, study=study.name, params=params.as_posix(), part=part)


def _of_experiment(experiment: Experiment, params: Path) -> Section:
    name = f"experiment_{experiment.name}"
    return Section(
        experiment.name.replace("_", "-"),
        experiment.heading,
        (name,),
        (name,),
        experiment.name,
        study=experiment.study.name,
        params=experiment_file(params, experiment.name).as_posix(),
        part=_as_params({"runs": _dumped(experiment.study.runs)}),
    )


def _dumped(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.model_dump(mode="json", exclude_defaults=True) for name, value in values.items()}


def _as_params(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """YAML with a line for each entry; JSON is YAML."""
    return "\n".join(
        f"{part}:\n" + "\n".join(f"  {name}: {json.dumps(value)}" for name, value in entries.items())
        for part, entries in parts.items()
        if entries
    )
