"""Trains one student with one seed."""

from attention_transfer.stage import Stage, run_script

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from attention_transfer.assembly import Parts
from attention_transfer.data import views
from attention_transfer.evaluation.predictions import predict_all
from attention_transfer.files import sha256, write_text
from attention_transfer.models import students
from attention_transfer.training import machine
from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.loop import fit
from attention_transfer.training.tasks import StudentTask
from attention_transfer.transfer import methods
from attention_transfer.transfer.method import Method


def main(this: Stage) -> None:
    name, seed = this.instance["run"], this.instance["seed"]
    study, layout = this.study, this.layout
    run, layers = study.runs[name], study.layers(name)
    parts = Parts(study, layout, machine.prepare())

    def work() -> dict[str, Any]:
        arguments = parts.student_arguments(run.teacher)
        initialised = run.method in ("finetune", "linear_probe")
        student = students.create(
            arguments,
            seed=seed,
            drop_path=run.drop_path,
            teacher=parts.teacher(run.teacher).cpu() if initialised else None,
            copied_layers=layers if run.method == "copy" else (),
        ).to(parts.device)
        method = methods.build(run, student, layers)
        examples = parts.split("labelled")
        validate = validation(parts, name, method)
        task = StudentTask(
            method,
            labels=parts.train.labels[examples],
            examples=examples,
            render=parts.renderer(examples, study.views),
            views=study.views.per_image,
            attention=parts.attention(name, "views") if layers else None,
            accuracy=lambda model: validate(model, study.training.curve_images)[0],
            batch_size=run.batch_size,
            seed=seed,
            device=parts.device,
            bfloat16=study.training.precision == "bfloat16",
        )
        model, history = fit(
            task,
            run,
            seed=seed,
            clip_norm=study.training.clip_norm,
            validate_every=study.training.validate_every,
            checkpoint=Checkpoint(this.checkpoints()),
            sink=this.tracker,
            label=this.label,
            where=this.where(f"runs.{name}"),
        )
        students.save(layout.student(name, seed), model, arguments, layers if run.method == "copy" else ())
        write_text(this.record / "curve.csv", curve(history.rows).to_csv(index=False))
        accuracy, loss = validate(model, study.data.validation)
        return {
            "validation_accuracy": accuracy,
            "validation_loss": loss,
            "train_loss": history.rows[-1]["task_loss"],
            "epochs": run.epochs,
            "steps": history.steps,
            "parameters": sum(weight.numel() for weight in model.parameters()),
        }

    this.run(
        params={
            f"runs.{name}": run.model_dump(mode="json"),
            "training": study.training.model_dump(mode="json"),
            "views": study.views.model_dump(mode="json"),
            "attention": study.attention.model_dump(mode="json"),
            "data": study.data.model_dump(mode="json"),
        },
        inputs={
            "images": parts.description.fingerprint,
            "labelled": sha256(layout.splits / "labelled.txt"),
            "validation": sha256(layout.splits / "validation.txt"),
            "resolved": sha256(layout.resolved(name)),
        },
        work=work,
        live=True,
    )


def validation(parts: Parts, name: str, method: Method) -> Callable[[nn.Module, int], tuple[float, float]]:
    """A function from a model to its accuracy and mean cross-entropy on the first so many validation images."""
    images, examples = parts.evaluated("validation")
    clean, labels = parts.clean(images.images), torch.from_numpy(images.labels)
    bfloat16 = parts.study.training.precision == "bfloat16"
    attention = parts.attention(name, "validation") if method.teacher_at_inference else None

    def evaluate(model: nn.Module, count: int) -> tuple[float, float]:
        model.eval()

        def predict(rows: np.ndarray) -> Tensor:
            batch = clean(rows)
            with torch.autocast(parts.device.type, torch.bfloat16, enabled=bfloat16):
                given = attention(batch, examples[rows], views.CLEAN) if attention else None
                return method.logits(model, batch, given)

        logits, expected = predict_all(predict, count).double(), labels[:count]
        accuracy = float((logits.argmax(dim=1) == expected).double().mean())
        return accuracy, float(nn.functional.cross_entropy(logits, expected))

    return evaluate


def curve(rows: list[dict[str, float]]) -> pd.DataFrame:
    """The columns of curve.csv, which every method has; a cell is empty where there is no such value."""
    columns = ["epoch", "step", "task_loss", "attention_loss", "learning_rate", "validation_accuracy"]
    frame = pd.DataFrame(rows).reindex(columns=columns)
    return frame.astype({"epoch": int, "step": int})


if __name__ == "__main__":
    run_script("train", main, __file__, run=str, seed=int)
