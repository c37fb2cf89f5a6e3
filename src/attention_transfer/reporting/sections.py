"""The page's sections: which figures, tables and claims stand together."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from attention_transfer.reporting.experiments import Experiment


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        figures, tables: by name, in order; what a study does not have is left out.
        experiment: of the paper's list, whose claims stand here.
        study: that an experiment's runs are in, by which they are made again.
        runs: these runs, as in the study's params file.
    """

    anchor: str
    heading: str
    figures: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    experiment: str = ""
    study: str = ""
    runs: str = ""


SECTIONS = (
    Section("main", "Main comparison", ("main",), ("main",), "main"),
    Section("learning", "Learning curves", ("learning_curves",), ("training",)),
    Section("teachers", "Teachers", (), ("teachers",)),
    Section("ensembles", "Ensembles", ("ensembles", "ensemble_matrix"), ("ensembles",), "ensemble"),
    Section(
        "shifts",
        "Distribution shift",
        ("shift_severity", "shift_scatter", "contact_sheet"),
        ("robustness", "shifts", "published"),
        "shift",
    ),
    Section("metrics", "Calibration and other measures", (), ("metrics", "calibration", "ood")),
    Section("maps", "Where the models look", ("attention_maps",), (), "maps"),
    Section("similarity", "How alike the models are", ("cka", "divergence"), ("similarity",), "similarity"),
    Section("comparisons", "Paired comparisons", (), ("comparisons",)),
    Section("replication", "Other teachers, other labels", (), ("replication",)),
    Section("cost", "What the methods cost", (), ("cost",), "cost"),
    Section("recipes", "Recipes and time", (), ("recipes", "time")),
)
BEHIND_EXPERIMENTS = "metrics"  # the first section that is


def of_study(
    experiments: Sequence[Experiment],
    *,
    figures: Container[str],
    tables: Container[str],
    claims: Container[str],
) -> list[Section]:
    """The sections with what the study has; those of the experiments lie behind the main comparison's.

    Args:
        claims: experiments that have any.
    """
    at = next(index for index, section in enumerate(SECTIONS) if section.anchor == BEHIND_EXPERIMENTS)
    found = [*SECTIONS[:at], *map(_of_experiment, experiments), *SECTIONS[at:]]
    found = [
        replace(
            section,
            figures=tuple(name for name in section.figures if name in figures),
            tables=tuple(name for name in section.tables if name in tables),
        )
        for section in found
    ]
    return [section for section in found if section.figures or section.tables or section.experiment in claims]


def _of_experiment(experiment: Experiment) -> Section:
    name = f"experiment_{experiment.name}"
    return Section(
        experiment.name.replace("_", "-"),
        experiment.heading,
        (name,),
        (name,),
        experiment.name,
        experiment.study.name,
        _as_params(experiment),
    )


def _as_params(experiment: Experiment) -> str:
    """A line for each run; JSON is YAML."""
    return "\n".join(
        f"{name}: {json.dumps(run.model_dump(mode='json', exclude_defaults=True))}"
        for name, run in experiment.study.runs.items()
    )
