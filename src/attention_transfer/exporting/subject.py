"""Which trained model leaves the study, and that its records are those of these very weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_transfer import run_record
from attention_transfer.config import Run, Study
from attention_transfer.data import images
from attention_transfer.errors import StudyError, repro
from attention_transfer.files import fingerprint, read_sealed, sha256
from attention_transfer.layout import Layout
from attention_transfer.models import vit

TUTOR = "fingerprint.json"  # beside a fine-tuned teacher: the last file that its stage writes


@dataclass(frozen=True)
class Subject:
    """A trained model of a study, and how it came about.

    Attributes:
        study: for a fine-tuned teacher, the one whose runs are the fine-tuned teachers.
        layout: where the study's files lie.
        name: in params.yaml.
        section: of params.yaml: `runs` or `finetuned_teachers`.
        folder: of its weights.
        stage: that trains it, as DVC names it.
        record: run.json of that stage.
        graph: the study's dvc.yaml, as it stands before a stage's name.
    """

    study: Study
    layout: Layout
    name: str
    section: str
    seed: int
    folder: Path
    stage: str
    record: Mapping[str, Any]
    graph: str

    @property
    def run(self) -> Run:
        return self.study.runs[self.name]

    @property
    def is_student(self) -> bool:
        """Whether it is a student of one of the study's runs; else it is a fine-tuned teacher."""
        return self.section == "runs"

    def made_by(self, stage: str) -> str:
        """A stage of the study as DVC names it from anywhere in the repository."""
        return self.graph + stage


def find(study: Study, name: str, seed: int | None, *, graph: str) -> Subject:
    """A run's student, or a fine-tuned teacher.

    Args:
        name: of the run or the teacher; with its section before it and a dot, where both have one of that name.
        seed: None for the study's first; a fine-tuned teacher has one alone.
        graph: the study's dvc.yaml and a colon; empty for the one in the present folder.

    Raises:
        StudyError: there is no such model, it needs its teacher to predict, it has not been trained, or it was
            trained with other params.
    """
    section, name = _section(study, name)
    if section == "runs":
        if study.runs[name].method == "copy":
            raise StudyError(
                "copies its teacher's attention at every pass: without the teacher it predicts nothing, and it is no "
                "model that timm could build",
                where=f"runs.{name}.method: copy",
                remedy="export a run of method distill, whose student attends by itself; or take both in Python: "
                "pipeline/predict.py does",
            )
        return _student(study, name, study.seeds[0] if seed is None else seed, graph)
    return _tutor(study, name, seed, graph)


def _section(study: Study, text: str) -> tuple[str, str]:
    given, _, name = text.rpartition(".")
    # An experiment's fine-tuned teachers are those of its study, trained on its images.
    known: dict[str, Mapping[str, Any]] = {
        "runs": study.runs,
        "finetuned_teachers": {} if study.is_experiment else study.finetuned_teachers,
    }
    holding = [section for section in known if name in known[section] and given in ("", section)]
    if len(holding) == 1:
        return holding[0], name
    names = [each for section in known.values() for each in section]
    raise StudyError(
        f"{'is a run and a fine-tuned teacher' if holding else 'is no run and no fine-tuned teacher'}",
        where=f"study {study.name}: {text}",
        remedy=f"say which: {' or '.join(f'{each}.{name}' for each in holding)}"
        if holding
        else f"known are {', '.join(names)}",
    )


def _student(study: Study, name: str, seed: int, graph: str) -> Subject:
    layout = Layout.of(study)
    if seed not in study.seeds:
        raise StudyError(
            f"has no seed {seed}",
            where=f"study {study.name}",
            remedy=f"known are {', '.join(map(str, study.seeds))}",
        )
    stage, folder = f"train@{name}-{seed}", layout.student(name, seed)
    _require(folder, graph + stage)
    record = run_record.read(layout.record("train", name, seed), made_by=graph + stage)
    _same_params(record["params"]["runs"][name], study.runs[name], f"runs.{name}", graph + stage)
    _same_images(record, images.describe(layout.images).fingerprint, layout, graph + stage)
    predict = f"predict@{name}-{seed}"
    predicted = run_record.read(layout.record("predict", name, seed), made_by=graph + predict)
    files = fingerprint([sha256(folder / file) for file in (vit.WEIGHTS, vit.CONFIG)])
    if predicted["inputs"]["student"] != files:
        raise StudyError(
            "is not the student whose predictions the records are about: damaged, or trained anew since",
            where=str(folder),
            remedy=f"damaged: {repro(graph + stage, again=True)}; trained anew: {repro(graph + predict)}",
        )
    return Subject(study, layout, name, "runs", seed, folder, stage, record, graph)


def _tutor(study: Study, name: str, seed: int | None, graph: str) -> Subject:
    tutor = study.finetuned_teachers[name]
    if seed not in (None, tutor.seed):
        raise StudyError(
            f"has the seed {tutor.seed} alone",
            where=f"finetuned_teachers.{name}",
            remedy="leave --seed out",
        )
    layout = Layout.of(study)
    stage, folder = "finetuned", layout.finetuned_teacher(name)
    _require(folder, graph + stage)
    record = run_record.read(layout.record(stage), made_by=graph + stage)
    recorded = record["params"]["finetuned_teachers"][name]["run"]
    _same_params(recorded, tutor.run, f"finetuned_teachers.{name}.run", graph + stage)
    _same_images(record, sha256(layout.images / images.DESCRIPTION), layout, graph + stage)
    if read_sealed(folder / TUTOR, made_by=graph + stage)["weights"] != sha256(folder / vit.WEIGHTS):
        raise StudyError(
            "is damaged: its SHA-256 is not the recorded one",
            where=str(folder / vit.WEIGHTS),
            remedy=f"make it anew: {repro(graph + stage, again=True)}",
        )
    return Subject(study.tutors, layout, name, "finetuned_teachers", tutor.seed, folder, stage, record, graph)


def _require(folder: Path, stage: str) -> None:
    if not (folder / vit.WEIGHTS).is_file():
        raise StudyError(
            "has not been trained, or its weights are not here",
            where=str(folder),
            remedy=f"train it: {repro(stage)}; or get it from where you keep DVC's cache: dvc pull",
        )


def _same_params(recorded: Mapping[str, Any], run: Run, key: str, stage: str) -> None:
    """What the records do not name is a key that came later, with the meaning that it has when left out."""
    if Run.model_validate_json(json.dumps(recorded)) != run:
        raise StudyError("has changed since it was trained", where=key, remedy=f"train it: {repro(stage)}")


def _same_images(record: Mapping[str, Any], found: str, layout: Layout, stage: str) -> None:
    """Mean and deviation of other images would make the model another one."""
    if record["inputs"]["images"] != found:
        raise StudyError(
            "holds other images than it was trained on",
            where=str(layout.images),
            remedy=f"train it: {repro(stage)}",
        )
