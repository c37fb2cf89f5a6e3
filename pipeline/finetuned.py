"""Fine-tunes the teachers whose predictions students learn from; those that still match are kept."""

from attention_transfer.stage import Stage, run_script

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attention_transfer.errors import StudyError
from attention_transfer.files import fingerprint, read_sealed, sha256, write_json, write_sealed
from attention_transfer.provenance import code_fingerprint

if TYPE_CHECKING:
    from attention_transfer.training.loop import MetricSink

NAMES = "names.json"  # so that the folder is an output even if it holds no teacher
MADE = "fingerprint.json"  # written last: a folder without it is made anew


def main(this: Stage) -> None:
    study, layout = this.study, this.layout
    inputs = {
        "images": sha256(layout.images / "dataset.json"),
        "labelled": sha256(layout.splits / "labelled.txt"),
        "validation": sha256(layout.splits / "validation.txt"),
    }

    def work() -> dict[str, Any]:
        layout.finetuned_teachers.mkdir(parents=True, exist_ok=True)
        accuracies = {}
        for name, tutor in study.finetuned_teachers.items():
            sections = (tutor, study.training, study.views, study.data)
            weights = sha256(layout.teacher_weights(tutor.run.teacher))
            recipe = [section.model_dump(mode="json") for section in sections]
            made = fingerprint([recipe, inputs, weights, code_fingerprint(this.script)])
            accuracies[name] = finetuned(this, name, made)
        for folder in layout.finetuned_teachers.iterdir():
            if folder.is_dir() and folder.name not in study.finetuned_teachers:
                shutil.rmtree(folder)
        write_json(layout.finetuned_teachers / NAMES, sorted(study.finetuned_teachers))
        return {f"{name}_validation_accuracy": accuracy for name, accuracy in accuracies.items()}

    this.run(
        params={
            "finetuned_teachers": {
                name: tutor.model_dump(mode="json") for name, tutor in study.finetuned_teachers.items()
            },
            "training": study.training.model_dump(mode="json"),
            "views": study.views.model_dump(mode="json"),
            "data": study.data.model_dump(mode="json"),
        },
        inputs=inputs,
        work=work,
        live=bool(study.finetuned_teachers),
    )


def finetuned(this: Stage, name: str, made: str) -> float:
    """Fine-tunes one teacher, unless it is there and `made` is its fingerprint: its validation accuracy."""
    folder = this.layout.finetuned_teacher(name)
    with contextlib.suppress(StudyError):  # unfinished or damaged
        found = read_sealed(folder / MADE, made_by="finetuned")
        if found["fingerprint"] == made and found["weights"] == sha256(folder / "model.safetensors"):
            accuracy: float = found["validation_accuracy"]
            return accuracy
    shutil.rmtree(folder, ignore_errors=True)
    # Here, because most studies have no such teacher: torch alone would take seconds.
    from attention_transfer.assembly import Parts
    from attention_transfer.fitting import fit_student, save_student
    from attention_transfer.training import machine

    parts = Parts(this.study.tutors, this.layout, machine.prepare())
    model, _, score = fit_student(
        parts,
        name,
        this.study.finetuned_teachers[name].seed,
        checkpoints=this.checkpoints() / made,
        sink=Named(this.tracker, name),
        label=f"{this.label} {name}",
        where=this.where(f"finetuned_teachers.{name}.run"),
    )
    save_student(parts, name, model, folder)
    accuracy = score(model, this.study.data.validation)[0]
    weights = sha256(folder / "model.safetensors")
    write_sealed(folder / MADE, {"fingerprint": made, "weights": weights, "validation_accuracy": accuracy})
    return accuracy


@dataclass(frozen=True)
class Named:
    """Puts a teacher's name before its metrics: all are shown in one run."""

    sink: "MetricSink"
    name: str

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.sink.log_metrics({f"{self.name}_{key}": value for key, value in metrics.items()}, step)


if __name__ == "__main__":
    run_script("finetuned", main, __file__)
