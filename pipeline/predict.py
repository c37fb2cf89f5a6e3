"""Stores one student's logits on every image set; what is there and still matches is kept."""

from attention_transfer.stage import Stage, run_script

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attention_transfer.assembly import CachedSet, Parts
from attention_transfer.data import shifted, views
from attention_transfer.data.images import ImageSet
from attention_transfer.evaluation import predictions
from attention_transfer.files import fingerprint, sha256
from attention_transfer.models import students
from attention_transfer.provenance import code_fingerprint
from attention_transfer.training import machine
from attention_transfer.transfer import methods
from attention_transfer.transfer.attention_source import AttentionSource


def main(this: Stage) -> None:
    name, seed = this.instance["run"], this.instance["seed"]
    study, layout = this.study, this.layout
    parts = Parts(study, layout, machine.prepare())
    inputs = {
        "student": sha256(layout.student(name, seed) / "model.safetensors"),
        "resolved": sha256(layout.resolved(name)),
        "images": parts.description.fingerprint,
        "validation": sha256(layout.splits / "validation.txt"),
        "shifts": sha256(layout.shifts / shifted.MANIFEST),
    }

    def work() -> dict[str, Any]:
        made = {which: set_fingerprint(this, inputs, which) for which in set_names(this)}
        folder = layout.predictions(name, seed)
        missing = [
            which for which in made if not predictions.matches(folder / f"{which}.safetensors", made[which])
        ]
        if missing:
            predict = predictor(parts, name, seed)
            for which in tqdm(missing, desc=this.label, unit="set", mininterval=5, delay=2):
                images, examples = parts.evaluated(which)
                result = predictions.Predictions(
                    predict(which, images, examples),
                    torch.from_numpy(images.labels),
                    torch.from_numpy(examples),
                )
                predictions.save(folder / f"{which}.safetensors", result, made[which])
        for path in folder.iterdir():
            if path.stem not in made:
                path.unlink()
        return {"sets": len(made), "computed": len(missing)}

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
    return own + list(shifted.wanted(evaluation, this.study.data))


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
    method = methods.build(study.runs[name], student, study.layers(name))
    online: list[AttentionSource] = []  # made once, for all the sets that are not cached

    def attention(which: str) -> AttentionSource:
        cached: CachedSet | None = which if which in ("validation", "test") else None  # type: ignore[assignment]
        if cached and study.attention.source == "cache":
            return parts.attention(name, cached)
        if not online:
            online.append(parts.attention(name, None))
        return online[0]

    def predict(which: str, images: ImageSet, examples: np.ndarray) -> Tensor:
        clean = parts.clean(images.images)
        source = attention(which) if method.teacher_at_inference else None

        def rows_to_logits(rows: np.ndarray) -> Tensor:
            batch = clean(rows)
            bfloat16 = study.training.precision == "bfloat16"
            with torch.autocast(parts.device.type, torch.bfloat16, enabled=bfloat16):
                given = source(batch, examples[rows], views.CLEAN) if source else None
                return method.logits(student, batch, given)

        return predictions.predict_all(rows_to_logits, len(images))

    return predict


if __name__ == "__main__":
    run_script("predict", main, __file__, run=str, seed=int)
