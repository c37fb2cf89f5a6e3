"""Stores attention maps of the teacher and of students for a few test images, for the report's figure."""

from attention_transfer.stage import Stage, run_script

from typing import Any

import numpy as np
import torch
from torch import nn

from attention_transfer.assembly import Parts
from attention_transfer.files import atomic, fingerprint, sha256
from attention_transfer.models import students
from attention_transfer.models.attention import read
from attention_transfer.training import machine


def main(this: Stage) -> None:
    study, layout = this.study, this.layout
    parts = Parts(study, layout, machine.prepare())
    # A copy student's maps are the teacher's.
    runs = [study.report.finetune, study.report.scratch, study.report.distilled] if study.report else []
    seed = study.seeds[0]

    def work() -> dict[str, Any]:
        layout.maps.mkdir(parents=True, exist_ok=True)  # an output of a study without a report, too
        if study.report is None:
            return {}
        examples, labels = one_of_each_class(parts.test.labels, study.report.attention_images)
        images = parts.clean(parts.test.images)(examples)
        depth = study.teachers[study.runs[runs[0]].teacher].architecture.depth
        layers = (0, (depth - 1) // 2, depth - 1)
        models = {"teacher": parts.teacher(study.runs[runs[0]].teacher)}
        for run in runs:
            models[run] = students.load(layout.student(run, seed), made_by=f"train@{run}-{seed}").to(
                parts.device
            )
        arrays = {f"maps_{name}": maps(model, images, layers) for name, model in models.items()}
        path = layout.maps / "maps.npz"
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                images=parts.test.images[examples],
                classes=np.array([parts.description.classes[label] for label in labels]),
                layers=np.array(layers),
                names=np.array(list(models)),
                **arrays,  # type: ignore[arg-type]
            )
        this.outputs.append(path)
        return {"images": len(examples), "models": len(models)}

    this.run(
        params={
            "report": None if study.report is None else study.report.model_dump(mode="json"),
            "seed": seed,
        },
        inputs={
            "students": fingerprint(
                [sha256(layout.student(run, seed) / "model.safetensors") for run in runs]
            ),
            "images": parts.description.fingerprint,
        },
        work=work,
        live=False,
    )


def one_of_each_class(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first image of each class, of the second ones after that: indices and labels (count,)."""
    rank = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    chosen = np.lexsort((labels, rank))[:count]
    return chosen, labels[chosen]


@torch.no_grad()
def maps(model: nn.Module, images: torch.Tensor, layers: tuple[int, ...]) -> np.ndarray:
    """Attention maps: float32 (images, layers, heads, tokens, tokens)."""
    with read(model.eval(), layers) as found:
        model(images)
    return torch.stack([found[layer].map() for layer in layers], dim=1).float().cpu().numpy()


if __name__ == "__main__":
    run_script("maps", main, __file__)
