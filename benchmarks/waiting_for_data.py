"""Share of a training step spent waiting for data, in the default study.

    python benchmarks/waiting_for_data.py [--quick]

The runs `copy` and `distill` of params.yaml, as pipeline/train.py makes them: rendering and cache reading in
`StudentTask.losses`, the study's optimiser, batch and sizes. Images and teacher are random; a few views of
all labelled images are cached, and are in the page cache as they are after the first epoch.

A step with data is timed in turns with the same step on tensors that are already there, so that whatever the
data cost counts, on any thread: 1 - median without / median with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import torch
from torch import Tensor

from attention_transfer import config, plan
from attention_transfer.data import views
from attention_transfer.data.labelled import LabelledViews
from attention_transfer.data.mixing import Mixing
from attention_transfer.data.rendering import views_of
from attention_transfer.models import students, vit
from attention_transfer.training.machine import prepare
from attention_transfer.training.optimisation import optimiser
from attention_transfer.training.student_task import StudentTask
from attention_transfer.transfer import methods
from attention_transfer.transfer.cache import CacheReader, CacheWriter
from attention_transfer.transfer.method import Needs
from attention_transfer.transfer.teacher_source import CachedTeacher, TeacherSource, teacher_attention

PARAMS = Path(__file__).parents[1] / "params.yaml"
CLASSES, TARGET = 10, 0.05


class Data:
    """Random images in the study's sizes, and a random teacher's cached attention for some of their views."""

    def __init__(self, study: config.Study, folder: Path, device: torch.device, count: int) -> None:
        data, teacher = study.data, next(iter(study.teachers.values()))
        random = np.random.default_rng(0)
        shape = (data.labelled, data.channels, data.image_size, data.image_size)
        pixels = random.integers(256, size=shape, dtype=np.uint8)
        examples = np.arange(data.labelled)
        of_teacher, self.arguments = (
            vit.model_arguments(
                teacher.architecture, image_size=data.image_size, channels=data.channels, classes=classes
            )
            for classes in (0, CLASSES)
        )
        moments = [0.5] * data.channels
        recipe = views.ViewRecipe.of(study.views, dataset="random", seed=data.seed, mean=moments, std=moments)
        self.images = LabelledViews(
            single=views_of(recipe, pixels, examples),
            mixing=Mixing.of(
                study.views, dataset="random", examples=examples, seed=data.seed, size=data.image_size
            ),
            labels=random.integers(CLASSES, size=data.labelled),
            examples=examples,
            classes=CLASSES,
            device=device,
        )
        model = vit.create(of_teacher, seed=0).to(device).eval()
        layers = tuple(range(teacher.architecture.depth))
        layout = plan.cache_layout(teacher.architecture, data, study.attention)
        keys = np.stack([np.tile(examples, count), np.repeat(np.arange(count), data.labelled)], axis=1)
        with CacheWriter(folder, layout=layout, recipe={}, keys=keys) as writer:
            for view in range(count):
                for rows in np.array_split(examples, 4):
                    attention = teacher_attention(model, self.images.render(rows, view), layers)
                    writer.write(attention.cpu())
        self.reader = CacheReader(folder, expect=None, verify="all")


def task_of(
    study: config.Study,
    name: str,
    data: Data,
    *,
    images: LabelledViews,
    teacher: TeacherSource,
    count: int,
    device: torch.device,
) -> tuple[StudentTask, Callable[[int, int], None]]:
    """A run's task and its training step, by epoch and step."""
    run = study.runs[name]
    student = students.create(
        data.arguments,
        seed=0,
        drop_path=run.drop_path,
        teacher=None,
        copied_layers=methods.slimmed_layers(study, name),
    ).to(device)
    task = StudentTask(
        methods.build(study, name, student),
        images=images,
        views=count,
        teacher=teacher,
        accuracy=lambda model: 0.0,
        batch_size=run.batch_size,
        seed=0,
        device=device,
        bfloat16=study.training.precision == "bfloat16",
    )
    optimizer = optimiser(student, run)
    task.train()

    def step(epoch: int, number: int) -> None:
        losses = task.losses(epoch, number)
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        optimizer.step()

    return task, step


def share(
    study: config.Study, name: str, data: Data, *, count: int, epochs: int, device: torch.device
) -> float:
    """The share of a run's step that the same step without data does not take."""
    source = CachedTeacher(data.reader, Needs("attention", study.layers(name)))
    rows = np.arange(study.runs[name].batch_size)
    batch, targets = data.images.render(rows, 0), data.images.targets(rows, 0)
    given = source(batch, rows, 0)

    class Ready(LabelledViews):
        """Images that are already there."""

        def render(self, rows: np.ndarray, view: int) -> Tensor:
            return batch

        def targets(self, rows: np.ndarray, view: int) -> Tensor:
            return targets

    task, real = task_of(study, name, data, images=data.images, teacher=source, count=count, device=device)
    _, ready = task_of(
        study,
        name,
        data,
        images=Ready(**vars(data.images)),
        teacher=lambda *_: given,
        count=count,
        device=device,
    )
    number = iter(range(10**9))

    def with_data() -> None:
        real(*divmod(next(number), task.steps_per_epoch))

    taken = measure.medians(
        {"with": with_data, "without": lambda: ready(0, 0)},
        repeats=epochs * task.steps_per_epoch,
        warm_up=task.steps_per_epoch,
        device=device,
    )
    print(f"{name:10} step {1e3 * taken['with']:.2f} ms, without data {1e3 * taken['without']:.2f} ms")
    return 1 - taken["without"] / taken["with"]


def main() -> None:
    options = measure.arguments(__doc__)
    device = prepare()
    study = config.load(PARAMS)
    count, epochs = (1, 1) if options.quick else (10, 20)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        data = Data(study, Path(folder) / "cache", device, count)
        for name in ("copy", "distill"):
            value = share(study, name, data, count=count, epochs=epochs, device=device)
            results.append(
                measure.Result(
                    f"waiting for data: share of a {name} step, default study ({device.type})",
                    value,
                    TARGET,
                    "lower",
                    "of a step",
                )
            )
    measure.write(results, options)


if __name__ == "__main__":
    main()
