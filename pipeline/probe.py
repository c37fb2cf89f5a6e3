"""Measures what a teacher's features are worth by themselves: neighbours, a linear probe, their rank."""

from attention_transfer.stage import Stage, run_script

from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention_transfer.assembly import Parts
from attention_transfer.data.images import ImageSet
from attention_transfer.evaluation import representation
from attention_transfer.evaluation.predictions import predict_all
from attention_transfer.files import sha256
from attention_transfer.training import machine

# Of Wu et al. (2018), as in DINO's evaluation; the probe's regularisation is mild and the same for all.
NEIGHBOURS, TEMPERATURE, REGULARISATION = 20, 0.07, 0.01


def main(this: Stage) -> None:
    name, layout = this.instance["teacher"], this.layout
    parts = Parts(this.study, layout, machine.prepare())

    def work() -> dict[str, Any]:
        model, labelled = parts.teacher(name), parts.split("labelled")
        validation, _ = parts.evaluated("validation")
        known, asked = (
            (features(parts, model, images), torch.from_numpy(images.labels))
            for images in (parts.train.take(labelled), validation)
        )
        return {
            "knn_accuracy": representation.knn_accuracy(
                *known, *asked, k=min(NEIGHBOURS, len(labelled)), temperature=TEMPERATURE
            ),
            "logistic_regression_accuracy": representation.linear_probe_accuracy(
                *known, *asked, regularisation=REGULARISATION
            ),
            "effective_rank": representation.effective_rank(asked[0]),
            "labelled": len(labelled),
            "validation": len(validation),
        }

    this.run(
        params={"training.precision": this.study.training.precision},
        inputs={
            "teacher": sha256(layout.teacher_weights(name)),
            "images": parts.description.fingerprint,
            "labelled": sha256(layout.splits / "labelled.txt"),
            "validation": sha256(layout.splits / "validation.txt"),
        },
        work=work,
        live=False,
    )


def features(parts: Parts, model: Any, images: ImageSet) -> Tensor:
    """Mean of the patch tokens behind the last block, as students pool them: float32 (images, width)."""
    clean = parts.clean(images.images)

    def pooled(rows: np.ndarray) -> Tensor:
        with torch.autocast(parts.device.type, torch.bfloat16, enabled=parts.bfloat16):
            tokens: Tensor = model.forward_features(clean(rows))
        return tokens[:, model.num_prefix_tokens :].float().mean(dim=1)

    return predict_all(pooled, len(images), clean.begin)


if __name__ == "__main__":
    run_script("probe", main, __file__, teacher=str)
