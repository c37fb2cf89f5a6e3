"""A study on 8 x 8 images whose stages run in memory, in milliseconds."""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from attention_transfer import stage
from attention_transfer.assembly import Parts
from attention_transfer.config import Study, Untrained
from attention_transfer.data import images, splits
from attention_transfer.files import write_sealed
from attention_transfer.layout import Layout
from attention_transfer.models import vit

PIPELINE = Path(__file__).parents[1] / "pipeline"
DEPTH, HEADS, TOKENS, HEAD_DIM = 2, 2, 5, 8
CPU = torch.device("cpu")

ARCHITECTURE = {"patch_size": 4, "width": 16, "depth": DEPTH, "heads": HEADS, "mlp_ratio": 2.0}
RECIPE: dict[str, Any] = {
    "learning_rate": 0.01, "epochs": 3, "warmup_epochs": 1.0, "batch_size": 8, "label_smoothing": 0.1,
}  # fmt: skip
_PARAMS: dict[str, Any] = {
    "name": "tiny",
    "seeds": (0,),
    "experiments": (),
    "data": {
        "source": "fashion-mnist", "folder": "data", "train_split": "train", "test_split": "test",
        "resize": 8, "image_size": 8, "channels": 1, "labelled": 24, "validation": 9, "seed": 0,
    },
    "views": {"per_image": 2, "crop_scale": (0.5, 1.0), "crop_ratio": (0.8, 1.25), "flip": 0.5, "erase": 0.0,
        "mixup": 0.0, "cutmix": 0.0,
    },
    "attention": {"source": "online", "content": "queries_and_keys", "dtype": "float16", "budget_gb": 1.0},
    "training": {"precision": "float32", "clip_norm": None, "validate_every": 3, "curve_images": 8},
    "teachers": {
        "first": {"kind": "untrained", "architecture": ARCHITECTURE, "seed": 1},
        "second": {"kind": "untrained", "architecture": {**ARCHITECTURE, "mlp_ratio": 3.0}, "seed": 2},
    },
    "evaluation": {
        "sets": ("validation",), "shifts": (), "severities": (), "shift_images": 9, "published": {},
        "calibration_bins": 5, "confidence": 0.95, "bootstrap": 10,
    },
    "finetuned_teachers": {
        name: {
            "seed": seed,
            "run": {"method": "finetune", "teacher": "first", **RECIPE},
        }
        for name, seed in (("tutor", 3), ("other", 4))
    },
    "ensembles": {},
    "report": None,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "scratch": {},
    "finetune": {},
    "linear_probe": {},
    "copy": {"layers": "all"},
    "distill": {"layers": "all", "attention_loss": {"weight": 3.0}},
    "distill_features": {"layers": "all", "feature_loss": {"weight": 1.0}},
    "distill_logits": {"logit_loss": {"weight": 1.0, "teacher": "tutor"}},
}


def make_study(method: str, changes: Mapping[str, Any] | None = None) -> Study:
    """A study of one run, called `run`.

    Args:
        changes: values by dotted key, such as `runs.run.epochs`, over the default ones; `data.resize` is image_size.
    """
    params = _copy(
        {**_PARAMS, "runs": {"run": {"method": method, "teacher": "first", **RECIPE, **METHODS[method]}}}
    )
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        node = params
        for part in path:
            node = node[part]
        node[last] = value
    if "data.resize" not in (changes or {}):
        params["data"]["resize"] = params["data"]["image_size"]
    return Study.model_validate(params)


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def write_inputs(folder: Path, size: int = 8) -> None:
    """Writes images, splits and teachers below `folder`, where the stages then have to run.

    Args:
        size: of the images in pixels, a multiple of 8.
    """
    study, layout = make_study("scratch"), Layout("tiny")
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pixels = generator.integers(0, 120, (60, 1, 8, 8)) + 60 * labels[:, None, None, None] * np.eye(
        8, dtype=int
    )
    pixels = pixels.repeat(size // 8, axis=2).repeat(size // 8, axis=3)
    train = images.ImageSet(np.clip(pixels, 0, 255).astype(np.uint8), labels)
    test = images.ImageSet(train.images[:12], labels[:12])
    images.save(folder / layout.images, "made up", ["a", "b", "c"], {"train": train, "test": test})
    splits.save(folder / layout.splits, splits.draw(labels, study.data))
    write_sealed(folder / layout.resolved("run"), {})
    for name in study.teachers:
        write_teacher(folder, study, name, size)
    arguments = vit.model_arguments(
        study.teachers["first"].architecture, image_size=size, channels=1, classes=3
    )
    for name, made in study.finetuned_teachers.items():
        tutor = vit.create(arguments, seed=made.seed)
        with torch.no_grad():
            tutor.head.weight.mul_(20.0)  # predictions that are far from uniform
        vit.save(folder / layout.finetuned_teacher(name), tutor, arguments)


def write_teacher(folder: Path, study: Study, name: str, size: int = 8) -> None:
    """Writes an untrained teacher."""
    teacher = study.teachers[name]
    assert isinstance(teacher, Untrained)
    arguments = vit.model_arguments(teacher.architecture, image_size=size, channels=1, classes=0)
    model = vit.create(arguments, seed=teacher.seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(teacher.seed)
        for block in model.blocks:
            block.attn.qkv.weight.normal_(std=0.5)  # maps that are far from uniform
    vit.save(folder / Layout("tiny").teacher(name), model, arguments)


def script(name: str) -> ModuleType:
    """A script of pipeline/ as a module."""
    qualified = f"pipeline_{name}"
    if qualified not in sys.modules:
        spec = importlib.util.spec_from_file_location(qualified, PIPELINE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[qualified] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[qualified])
    return sys.modules[qualified]


@dataclass
class InMemory(stage.Stage):
    """A stage that does its work without tracking, and never from a checkpoint."""

    metrics: dict[str, float] = field(default_factory=dict)
    unique: str = field(default_factory=lambda: uuid.uuid4().hex)

    def run(
        self,
        *,
        params: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[], Mapping[str, float]],
        live: bool,
    ) -> None:
        self.params, self.inputs = dict(params), dict(inputs)
        self.metrics = dict(work())

    def checkpoints(self) -> Path:
        return Path("checkpoints") / self.unique


def run_train(study: Study, layout: Layout, run: str, seed: int) -> dict[str, float]:
    """Runs the stage `train` in the present folder: the student's metrics."""
    instance = {"run": run, "seed": seed}
    this = InMemory("train", instance, study, Path("params.yaml"), PIPELINE / "train.py", layout)
    script("train").main(this)
    return this.metrics


def train(study: Study) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same in the tiny study: the student's weights and its metrics."""
    layout = Layout("tiny")
    metrics = run_train(study, layout, "run", 0)
    return load_file(layout.student("run", 0) / vit.WEIGHTS), metrics


def make_parts(study: Study) -> Parts:
    return Parts(study, Layout("tiny"), CPU)
