"""Obtains one teacher: pre-trains it here, or takes the weights that the user brings."""

from attention_transfer.stage import Stage, run_script

from pathlib import Path
from typing import Any

import torch

from attention_transfer import config
from attention_transfer.assembly import Parts
from attention_transfer.data import views
from attention_transfer.errors import StudyError
from attention_transfer.files import sha256, write_csv
from attention_transfer.models import vit
from attention_transfer.models.masked_autoencoder import MaskedAutoencoder
from attention_transfer.training import machine
from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.loop import fit
from attention_transfer.training.pretraining_task import PretrainingTask

CURVE = ["epoch", "step", "reconstruction_loss", "learning_rate"]


def main(this: Stage) -> None:
    name = this.instance["teacher"]
    teacher = this.study.teachers[name]
    parts = Parts(this.study, this.layout, machine.prepare())
    inputs = {
        "images": parts.description.fingerprint,
        "pretrain": sha256(this.layout.splits / "pretrain.txt"),
    }

    def work() -> dict[str, Any]:
        arguments = parts.teacher_arguments(name)
        rows: list[dict[str, float]] = []  # a teacher that is not trained here has a curve without rows
        metrics: dict[str, float] = {}
        match teacher:
            case config.MaskedAutoencoder():
                model, rows, metrics = masked_autoencoder(this, parts, teacher, arguments)
            case config.Untrained():
                model = vit.create(arguments, seed=teacher.seed)
            case config.FromFile():
                model = from_file(this, teacher, arguments)
        renamed = [{**row, "reconstruction_loss": row["total"]} for row in rows]
        write_csv(this.record / "curve.csv", CURVE, renamed)
        vit.save(this.layout.teacher(name), model, arguments)
        return metrics | {"parameters": sum(weight.numel() for weight in model.parameters())}

    this.run(
        params={
            f"teachers.{name}": teacher.model_dump(mode="json"),
            "training": this.study.training.model_dump(mode="json", include={"precision", "clip_norm"}),
            "data.seed": this.study.data.seed,
        },
        inputs=inputs,
        work=work,
        live=True,
    )


def masked_autoencoder(
    this: Stage, parts: Parts, teacher: config.MaskedAutoencoder, arguments: vit.Arguments
) -> tuple[torch.nn.Module, list[dict[str, float]], dict[str, float]]:
    """Pre-trains on the training images without labels, validation left out."""
    model = MaskedAutoencoder.of(teacher, arguments).to(parts.device)
    examples = parts.split("pretrain")
    task = PretrainingTask(
        model,
        count=len(examples),
        render=parts.renderer(examples, views.PretrainingViews(teacher.crop_scale)),
        batch_size=teacher.batch_size,
        seed=teacher.seed,
        device=parts.device,
        bfloat16=this.study.training.precision == "bfloat16",
    )
    _, history = fit(
        task,
        teacher,
        seed=teacher.seed,
        clip_norm=this.study.training.clip_norm,
        validate_every=teacher.epochs,
        checkpoint=Checkpoint(this.checkpoints()),
        sink=this.tracker,
        label=this.label,
        where=this.where(f"teachers.{this.instance['teacher']}"),
    )
    final = history.rows[-1]["total"]
    return (
        model.encoder,
        history.rows,
        {
            "reconstruction_loss": final,
            "steps": history.steps,
            "epochs": teacher.epochs,
        },
    )


def from_file(this: Stage, teacher: config.FromFile, arguments: vit.Arguments) -> torch.nn.Module:
    """Takes an encoder that the user brings; a head in the file is left out, as students have their own."""
    where = this.where(f"teachers.{this.instance['teacher']}.path")
    path = Path(teacher.path)
    if path.is_file() and (found := sha256(path)) != teacher.sha256:
        raise StudyError(
            f"{path} has SHA-256 {found}, not {teacher.sha256}",
            where=this.where(f"teachers.{this.instance['teacher']}.sha256"),
            remedy="bring the right file, or set this key to the file's",
        )
    weights = vit.load_weights(
        Path(teacher.path), made_by=f"correct the path in {where}, or convert the file"
    )
    model = vit.create(arguments, seed=0)
    fresh = {key: value for key, value in model.state_dict().items() if key.startswith("fc_norm.")}
    encoder = {
        key: value for key, value in weights.items() if not key.startswith(("head.", "fc_norm.", "norm."))
    }
    vit.insert(model, {**encoder, **fresh}, where=path)
    return model


if __name__ == "__main__":
    run_script("pretrain", main, __file__, teacher=str)
