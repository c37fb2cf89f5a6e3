"""A study without its data: random images of its shape, its architectures, its methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from attention_transfer.config import Architecture, Pretrained, Study
from attention_transfer.data import views
from attention_transfer.data.labelled import LabelledViews
from attention_transfer.data.mixing import Mixing
from attention_transfer.data.rendering import clean_images, views_of
from attention_transfer.models import pretraining, students, vit
from attention_transfer.training.pretraining_task import PretrainingTask
from attention_transfer.training.student_task import StudentTask
from attention_transfer.transfer import methods
from attention_transfer.transfer.method import Method
from attention_transfer.transfer.teacher_source import TeacherSource

CLASSES = 10
"""Of the student's head, whose share of a step is too small to see."""


class Subject:
    """What is measured in place of a study's own images and teachers.

    Args:
        images: how many random ones there are.
    """

    def __init__(self, study: Study, device: torch.device, images: int) -> None:
        self.study, self.device = study, device
        self.bfloat16 = study.training.precision == "bfloat16"
        shape = (images, study.data.channels, study.data.image_size, study.data.image_size)
        self.images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.recipe = self._view_recipe(study.views)
        self.clean = clean_images(self.recipe, self.images, device)
        numbers, size = np.arange(images), study.data.image_size
        self.labelled = LabelledViews(
            single=views_of(self.recipe, self.images, numbers),
            mixing=Mixing.of(study.views, dataset="", examples=numbers, seed=0, size=size),
            labels=numbers % CLASSES,
            examples=numbers,
            classes=CLASSES,
            device=device,
        )

    def teacher(self, name: str) -> nn.Module:
        """A frozen network of a teacher's architecture."""
        model = vit.create(self._arguments(self.study.teachers[name].architecture, 0), seed=0).eval()
        return model.requires_grad_(False).to(self.device)

    def tutor(self, name: str) -> nn.Module:
        """A frozen network like one of the fine-tuned teachers."""
        teacher = self.study.teachers[self.study.finetuned_teachers[name].run.teacher]
        model = vit.create(self._arguments(teacher.architecture, CLASSES), seed=0).eval()
        return model.requires_grad_(False).to(self.device)

    def method(self, name: str) -> Method:
        """A run's method around a new student."""
        student = students.create(
            self._arguments(self.study.architecture(name), CLASSES),
            seed=0,
            drop_path=self.study.runs[name].drop_path,
            teacher=None,
            copied_layers=methods.slimmed_layers(self.study, name),
        )
        return methods.build(self.study, name, student.to(self.device))

    def training(self, method: Method, teacher: TeacherSource | None, *, batch_size: int) -> StudentTask:
        """Training of a student on one view of each of the images."""
        return StudentTask(
            method,
            images=self.labelled,
            views=1,
            teacher=teacher,
            accuracy=lambda model: 0.0,
            batch_size=batch_size,
            seed=0,
            device=self.device,
            bfloat16=self.bfloat16,
        )

    def pretraining(self, teacher: Pretrained, *, batch_size: int) -> PretrainingTask:
        """Pre-training of a teacher."""
        recipe = self._view_recipe(views.PretrainingViews(teacher.crop_scale))
        render = views_of(recipe, self.images, np.arange(len(self.images)))
        steps = len(self.images) // batch_size
        arguments = self._arguments(teacher.architecture, 0)
        model: Any = pretraining.build(teacher, arguments, steps=steps).to(self.device)
        return PretrainingTask(
            model,
            count=len(self.images),
            views=model.views,
            labels=np.zeros(len(self.images), np.int64) if model.labelled else None,
            render=render,
            batch_size=batch_size,
            seed=0,
            device=self.device,
            bfloat16=self.bfloat16,
        )

    def _arguments(self, architecture: Architecture, classes: int) -> vit.Arguments:
        data = self.study.data
        return vit.model_arguments(
            architecture, image_size=data.image_size, channels=data.channels, classes=classes
        )

    def _view_recipe(self, params: views.ViewParams) -> views.ViewRecipe:
        channels = self.study.data.channels
        return views.ViewRecipe.of(params, dataset="", seed=0, mean=[0.5] * channels, std=[0.25] * channels)
