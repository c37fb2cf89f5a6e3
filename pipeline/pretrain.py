"""Obtains one teacher: pre-trains it here, or takes the weights that the user brings."""

from attention_transfer.stage import Stage, run_script

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attention_transfer import config, config_teachers, machine_file
from attention_transfer.assembly import Parts
from attention_transfer.data import pretraining_images, rendering, views
from attention_transfer.data.image_files import Shape
from attention_transfer.data.pretraining_images import PretrainingImages
from attention_transfer.errors import StudyError
from attention_transfer.files import sha256, write_csv
from attention_transfer.models import pretraining, published, releases, vit, weights_of_timm
from attention_transfer.training import execution, machine
from attention_transfer.training.batches import Render
from attention_transfer.training.checkpoint import Checkpoint
from attention_transfer.training.loop import fit
from attention_transfer.training.pretraining_task import PretrainingTask

CURVE = ["epoch", "step", "pretraining_loss", "learning_rate"]


def main(this: Stage) -> None:
    name = this.instance["teacher"]
    teacher = this.study.teachers[name]
    parts = Parts(this.study, this.layout, machine.prepare())
    inputs = {
        "images": parts.description.fingerprint,
        "pretrain": sha256(this.layout.splits / "pretrain.txt"),
    }
    others = None
    if isinstance(teacher, config.Pretrained) and teacher.images not in config_teachers.PRETRAINING_IMAGES:
        data = this.study.data
        others = pretraining_images.in_files(
            Path(teacher.images), Shape(data.channels, data.resize, data.image_size)
        )
        inputs["pretraining_images"] = others.description.fingerprint
    if isinstance(teacher, config.FromTimm):
        tagged, path = by_name(this, teacher)
        inputs["weights"] = checked(this, path, teacher.sha256)

    def work() -> dict[str, Any]:
        arguments = parts.teacher_arguments(name)
        rows: list[dict[str, float]] = []  # a teacher that is not trained here has a curve without rows
        metrics: dict[str, float] = {}
        match teacher:
            case config.Pretrained():
                model, rows, metrics = pretrained(this, parts, teacher, arguments, others)
            case config.Untrained():
                model = vit.create(arguments, seed=teacher.seed)
            case config.FromFile():
                model, metrics = from_file(this, parts, teacher)
            case config.FromTimm():
                content = releases.read(path, made_by="remove the file, so that it is downloaded anew")
                model, metrics = fitted(this, parts, content, tagged.images, path)
                metrics |= {"weights_image_size": tagged.image_size}
        if this.writes:
            renamed = [{**row, "pretraining_loss": row["total"]} for row in rows]
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


def pretrained(
    this: Stage,
    parts: Parts,
    teacher: config.Pretrained,
    arguments: vit.Arguments,
    others: PretrainingImages | None,
) -> tuple[torch.nn.Module, list[dict[str, float]], dict[str, float]]:
    """Pre-trains on the task's training images, validation left out, or on others.

    Args:
        others: in files, where the teacher asks for such.
    """
    where = this.where(f"teachers.{this.instance['teacher']}")
    count, labels, render = images(parts, teacher, others, where=where)
    steps = teacher.epochs * (count // teacher.batch_size)
    model: Any = pretraining.build(teacher, arguments, steps=steps).to(parts.device)
    how = execution.choose(
        machine_file.settings(),
        batch=teacher.batch_size,
        pairs=False,
        called="in parts",
        indivisible=why_whole(teacher),
        where=where,
    )
    how.apply(model.encoder)
    this.paths |= how.paths(parts.device)
    with PretrainingTask(
        model,
        count=count,
        views=model.views,
        labels=labels if model.labelled else None,
        render=render,
        batch_size=teacher.batch_size,
        seed=teacher.seed,
        device=parts.device,
        bfloat16=this.study.training.precision == "bfloat16",
        division=how.division,
    ) as task:
        _, history = fit(
            task,
            teacher,
            seed=teacher.seed,
            clip_norm=this.study.training.clip_norm,
            validate_every=teacher.epochs,
            checkpoint=Checkpoint(this.checkpoints()),
            sink=this.tracker,
            label=this.label,
            where=where,
            division=how.division,
        )
    metrics = {
        "pretraining_loss": history.rows[-1]["total"],
        "images": count,
        "steps": history.steps,
        "epochs": teacher.epochs,
    }
    return pretraining.result(model), history.rows, metrics


def why_whole(teacher: object) -> str:
    """Why a step of its pre-training must be one pass of one process, if it must."""
    if isinstance(teacher, config.MomentumContrast | config.SelfDistillation):
        return f"{teacher.kind} compares the images of a batch, and moves its other network once a step"
    return ""


def why_alone(study: config.Study, instance: Mapping[str, Any]) -> str:
    teacher = study.teachers[instance["teacher"]]
    return why_whole(teacher) if isinstance(teacher, config.Pretrained) else "nothing is trained"


def images(
    parts: Parts, teacher: config.Pretrained, others: PretrainingImages | None, *, where: str
) -> tuple[int, np.ndarray | None, Render]:
    """Number of images to pre-train on, their labels where they have any, and what gives views of them."""
    params, examples = views.PretrainingViews(teacher.crop_scale), parts.split("pretrain")
    if teacher.images == "task":
        labels = parts.train.labels[examples]
        if isinstance(teacher, config.GroupClassification) and len(teacher.groups) != parts.classes:
            raise StudyError(
                f"{len(teacher.groups)} numbers, but the task has {parts.classes} classes",
                where=f"{where}.groups",
                remedy="give each class the number of its group",
            )
        return len(examples), labels, parts.renderer(examples, params)
    data = parts.study.data
    try:
        # As many fractals as the task has images; there are few digits.
        found = others or pretraining_images.load(
            teacher.images,
            size=data.image_size,
            channels=data.channels,
            count=len(examples) if teacher.images == "fractals" else pretraining_images.DIGITS,
            seed=teacher.seed,
        )
    except ValueError as error:
        raise StudyError(
            str(error), where=f"{where}.images", remedy="choose other images or sizes"
        ) from error
    recipe = parts.view_recipe(params, found.description)
    return len(found), None, rendering.views_of(recipe, found.pixels, np.arange(len(found)))


def by_name(this: Stage, teacher: config.FromTimm) -> tuple[weights_of_timm.Tagged, Path]:
    """What timm says of the teacher, and the file with its weights."""
    where = this.where(f"teachers.{this.instance['teacher']}.name")
    tagged = weights_of_timm.tagged(teacher.name, where=where)
    if tagged.entry != teacher.architecture.timm:
        raise StudyError(
            f"{teacher.name} is built by {tagged.entry}, not by {teacher.architecture.timm}",
            where=where,
            remedy="correct architecture.timm beside it",
        )
    return tagged, weights_of_timm.file(tagged, where=where)


def from_file(
    this: Stage, parts: Parts, teacher: config.FromFile
) -> tuple[torch.nn.Module, dict[str, float]]:
    """Takes an encoder that the user brings, in the layout of a release."""
    path = Path(teacher.path)
    if path.is_file():
        checked(this, path, teacher.sha256)
    where = this.where(f"teachers.{this.instance['teacher']}.path")
    released = releases.load(path, teacher.format, where=where)
    images = releases.FORMATS[released.format].images
    if teacher.mean is not None and teacher.std is not None:
        images = (teacher.mean, teacher.std)
    return fitted(this, parts, released.encoder, images, path)


def checked(this: Stage, path: Path, wanted: str | None) -> str:
    """The file's SHA-256, which has to be the one in params.yaml where that states one."""
    found = sha256(path)
    if wanted not in (None, found):
        raise StudyError(
            f"{path} has SHA-256 {found}, not {wanted}",
            where=this.where(f"teachers.{this.instance['teacher']}.sha256"),
            remedy="bring the right file, or set this key to the file's",
        )
    return found


def fitted(
    this: Stage,
    parts: Parts,
    weights: dict[str, Any],
    images: releases.Normalisation | None,
    path: Path,
) -> tuple[torch.nn.Module, dict[str, float]]:
    """The model with these weights, for the study's images, and the patches that it had and has."""
    own = (tuple(parts.description.mean), tuple(parts.description.std))
    arguments = parts.teacher_arguments(this.instance["teacher"])
    found = published.fit(weights, arguments, trained=images, study=own, where=path)
    this.paths["weights"] = found.changes
    side = found.model.patch_embed.grid_size[0]
    sizes = {} if found.grid is None else {"weights_patches": found.grid**2, "patches": side**2}
    return found.model, {**sizes, "images_folded": int(images is not None)}


if __name__ == "__main__":
    run_script("pretrain", main, __file__, why_alone, teacher=str)
