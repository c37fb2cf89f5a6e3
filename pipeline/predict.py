"""Stores one student's logits on every image set; what is there and still matches is kept."""

from attention_transfer.stage import Stage, run_script, shared_out

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attention_transfer import processes
from attention_transfer.assembly import Parts
from attention_transfer.data import shifted, views
from attention_transfer.data.images import ImageSet
from attention_transfer.evaluation import predictions
from attention_transfer.files import fingerprint, read_sealed, sha256
from attention_transfer.models import students, vit
from attention_transfer.provenance import code_fingerprint
from attention_transfer.teaching import teacher_source
from attention_transfer.training import machine
from attention_transfer.transfer import methods
from attention_transfer.transfer.teacher_source import TeacherSource


def main(this: Stage) -> None:
    name, seed = this.instance["run"], this.instance["seed"]
    study, layout = this.study, this.layout
    parts = Parts(study, layout, machine.prepare())
    resolved = read_sealed(layout.resolved(name), made_by=f"resolve@{name}")
    student = layout.student(name, seed)
    inputs = {
        "student": fingerprint([sha256(student / file) for file in (vit.WEIGHTS, vit.CONFIG)]),
        "resolved": fingerprint(resolved),
        "images": parts.description.fingerprint,
        "validation": sha256(layout.splits / "validation.txt"),
        "shifts": sha256(layout.shifts / shifted.MANIFEST),
    }

    def work() -> dict[str, Any]:
        made = {which: set_fingerprint(this, inputs, which) for which in set_names(this)}
        folder = layout.predictions(name, seed)
        missing = processes.told(
            [which for which in made if not predictions.matches(folder / f"{which}.safetensors", made[which])]
        )
        this.paths = {"predictions": f"{len(missing)} of {len(made)} sets computed, the others kept"}
        if missing:
            predict = predictor(parts, name, seed)
            for which in tqdm(
                missing, desc=this.label, unit="set", mininterval=5, delay=2, disable=not this.writes
            ):
                images, examples = parts.evaluated(which)
                result = predictions.Predictions(
                    predict(which, images, examples),
                    torch.from_numpy(images.labels),
                    torch.from_numpy(examples),
                    groups(this, which),
                )
                if this.writes:
                    predictions.save(folder / f"{which}.safetensors", result, made[which])
        if this.writes:
            for path in folder.iterdir():
                if path.stem not in made:
                    path.unlink()
        return {"sets": len(made)}

    this.run(
        params={
            f"runs.{name}": study.runs[name].model_dump(mode="json"),
            "evaluation.sets": list(study.evaluation.sets),
            "training.precision": study.training.precision,
        },
        inputs=inputs,
        work=work,
        live=False,
    )


def set_names(this: Stage) -> list[str]:
    """Every image set that the study evaluates on."""
    evaluation = this.study.evaluation
    own = [which for which in ("validation", "test") if which in evaluation.sets]
    return own + list(shifted.made(this.layout.shifts, evaluation, this.study.data))


def groups(this: Stage, which: str) -> Tensor | None:
    """Which label each class counts as, where a published set has other classes than the task."""
    if which in ("validation", "test"):
        return None
    found = shifted.groups(this.layout.shifts, which)
    return None if found is None else torch.from_numpy(found)


def set_fingerprint(this: Stage, inputs: dict[str, str], which: str) -> str:
    """What the predictions on one set depend on: not on the other sets."""
    if which in ("validation", "test"):
        images: object = [inputs["images"], inputs["validation"] if which == "validation" else None]
    else:
        images = [inputs["images"], shifted.manifest(this.layout.shifts)[which]]
    model = [inputs["student"], inputs["resolved"], this.study.training.precision]
    return fingerprint([which, images, model, code_fingerprint(this.script)])


def predictor(parts: Parts, name: str, seed: int) -> Callable[[str, ImageSet, np.ndarray], Tensor]:
    """A function from an image set to the student's logits."""
    study = parts.study
    student = students.load(parts.layout.student(name, seed), made_by=f"train@{name}-{seed}").to(parts.device)
    method = methods.build(study, name, student)
    needs = method.needs if method.teacher_at_inference else None
    uncached: list[TeacherSource | None] = []  # made once, for all the sets that are not cached

    def teacher(which: str) -> TeacherSource | None:
        if which in ("validation", "test") and parts.attention_source(study.runs[name].teacher) == "cache":
            return teacher_source(parts, name, which, needs)  # type: ignore[arg-type]
        if not uncached:
            uncached.append(teacher_source(parts, name, None, needs))
        return uncached[0]

    def predict(which: str, images: ImageSet, examples: np.ndarray) -> Tensor:
        clean, source = parts.clean(images.images), teacher(which)

        def rows_to_logits(rows: np.ndarray) -> Tensor:
            batch = clean(rows)
            with torch.autocast(parts.device.type, torch.bfloat16, enabled=parts.bfloat16):
                given = source(batch, examples[rows], views.CLEAN) if source else None
                return method.logits(student, batch, given)

        return predictions.predict_all(rows_to_logits, len(images), clean.begin)

    return predict


if __name__ == "__main__":
    run_script("predict", main, __file__, shared_out, run=str, seed=int)
