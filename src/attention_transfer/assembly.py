"""Puts the rooms together for the stages: a study's images, views, teachers and caches, by its layout."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch

from attention_transfer.config import Architecture, Study
from attention_transfer.data import images, mixing, rendering, shifted, splits, views
from attention_transfer.data.file_pixels import FilePixels
from attention_transfer.data.labelled import LabelledViews
from attention_transfer.files import read_sealed, sha256
from attention_transfer.layout import Layout
from attention_transfer.models import vit

CachedSet = Literal["views", "validation", "test"]
"""What a teacher's cache holds: training views of the labelled images, and two sets of clean images."""


class Parts:
    """The parts of one study, loaded when they are first asked for."""

    def __init__(self, study: Study, layout: Layout, device: torch.device) -> None:
        self.study, self.layout, self.device = study, layout, device

    @functools.cached_property
    def description(self) -> images.Description:
        return images.describe(self.layout.images)

    @functools.cached_property
    def train(self) -> images.ImageSet:
        return images.load(self.layout.images, "train")

    @functools.cached_property
    def test(self) -> images.ImageSet:
        return images.load(self.layout.images, "test")

    def split(self, name: str) -> np.ndarray:
        """Numbers of a split's images in the training images."""
        return splits.load(self.layout.splits, name)

    def view_recipe(
        self, params: views.ViewParams, description: images.Description | None = None
    ) -> views.ViewRecipe:
        """Of the task's images, or of others."""
        description = description or self.description
        return views.ViewRecipe.of(
            params,
            dataset=description.fingerprint,
            seed=self.study.data.seed,
            mean=description.mean,
            std=description.std,
        )

    def renderer(self, examples: np.ndarray, params: views.ViewParams) -> rendering.Render:
        """Gives normalised views of the training images with these numbers, by row and view number."""
        return rendering.views_of(self.view_recipe(params), self.train.take(examples).images, examples)

    @functools.cached_property
    def labelled(self) -> LabelledViews:
        """The labelled images in the views that students see."""
        examples, data = self.split("labelled"), self.study.data
        chosen = self.train.take(examples)
        return LabelledViews(
            single=rendering.views_of(self.view_recipe(self.study.views), chosen.images, examples),
            mixing=mixing.Mixing.of(
                self.study.views,
                dataset=self.description.fingerprint,
                examples=examples,
                seed=data.seed,
                size=data.image_size,
            ),
            labels=chosen.labels,
            examples=examples,
            classes=self.classes,
            device=self.device,
        )

    def clean(self, pixels: np.ndarray | FilePixels) -> rendering.CleanImages:
        """Gives normalised images, without augmentation, by row."""
        return rendering.clean_images(self.view_recipe(self.study.views), pixels, self.device)

    def evaluated(self, name: str) -> tuple[images.ImageSet, np.ndarray]:
        """An image set to predict on, and its images' numbers: validation, test, or a shifted set."""
        if name == "validation":
            indices = self.split("validation")
            return self.train.take(indices), indices
        if name == "test":
            return self.test, np.arange(len(self.test))
        return shifted.load(self.layout.shifts, name)

    @functools.cached_property
    def classes(self) -> int:
        return len(self.description.classes)

    @property
    def bfloat16(self) -> bool:
        """Whether matrix products and attention run in that format."""
        return self.study.training.precision == "bfloat16"

    def student_arguments(self, run: str) -> vit.Arguments:
        """What timm needs to build a run's student."""
        return self._arguments(self.study.architecture(run), self.classes)

    def teacher_arguments(self, teacher: str) -> vit.Arguments:
        return self._arguments(self.study.teachers[teacher].architecture, 0)

    def _arguments(self, architecture: Architecture, classes: int) -> vit.Arguments:
        data = self.study.data
        return vit.model_arguments(
            architecture, image_size=data.image_size, channels=data.channels, classes=classes
        )

    def teacher(self, name: str) -> vit.ViT:
        """The frozen teacher, in eval mode."""
        teacher = vit.load(self.layout.teacher(name), made_by=f"pretrain@{name}")
        return teacher.requires_grad_(False).to(self.device)

    def cache_keys(self, which: CachedSet) -> np.ndarray:
        """Keys of a cached set's rows: int64 (rows, 2), example and view."""
        if which == "views":
            labelled = self.split("labelled")
            numbers = np.arange(self.study.views.per_image)
            # View by view, so that an epoch, which shows one view of each image, reads one stretch of a shard.
            return np.stack([np.tile(labelled, len(numbers)), np.repeat(numbers, len(labelled))], axis=1)
        _, examples = self.evaluated(which)
        return np.stack([examples, np.full(len(examples), views.CLEAN)], axis=1)

    def cache_recipe(self, teacher: str, which: CachedSet) -> dict[str, Any]:
        """Everything that a cached row depends on."""
        views_recipe = self.view_recipe(self.study.views)
        recipe: dict[str, Any] = {
            "teacher": sha256(self.layout.teacher_weights(teacher)),
            "dataset": self.description.fingerprint,
            "set": which,
            "keys": hashlib.sha256(np.ascontiguousarray(self.cache_keys(which)).tobytes()).hexdigest(),
            "content": self.study.attention.content,
            "dtype": self.study.attention.dtype,
            "precision": self.study.training.precision,
        }
        if which == "views":
            mixed = self.labelled.mixing
            return {**recipe, "views": views_recipe.record(), "mixing": mixed and asdict(mixed)}
        return {**recipe, "mean": list(views_recipe.mean), "std": list(views_recipe.std)}

    def attention_source(self, teacher: str) -> Literal["cache", "online"]:
        """How students get at this teacher's attention: `auto` is as the stage `cache` has resolved it."""
        source = self.study.attention.source
        if source == "auto":
            manifest = read_sealed(self.layout.cache_manifest(teacher), made_by=f"cache@{teacher}")
            return "cache" if manifest else "online"
        return source
