"""The model card: README.md of an exported folder, with the header that the Hugging Face hub reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from attention_transfer.config import FromFile, Pretrained, Study, Untrained
from attention_transfer.data.images import Description
from attention_transfer.exporting.accuracies import Accuracy
from attention_transfer.exporting.onnx_file import INPUT, OPSET, OUTPUT
from attention_transfer.exporting.subject import Subject
from attention_transfer.files import sha256, write_text
from attention_transfer.models import vit

FILE = "README.md"
UNKNOWN = "unknown"  # as the hub calls a licence that nobody has named
HERE = "mit"  # this repository's
# Data sets whose licence allows a model to be passed on under this repository's: source to the hub's name of it.
OPEN = {"fashion-mnist": "zalando-datasets/fashion_mnist"}

METHODS = {
    "scratch": "trained on the labelled images alone: the baseline",
    "finetune": "fine-tuned from its teacher's weights",
    "linear_probe": "its teacher's frozen features with a linear head, which alone was trained",
    "distill": "Attention Distill: trained with a loss that draws its attention to its teacher's",
    "distill_features": "trained with a loss that draws its features to its teacher's",
    "distill_logits": "trained with a loss that draws its predictions to those of a fine-tuned teacher",
}
KINDS = {
    "mae": "masked autoencoder (He et al., 2022), without labels",
    "simmim": "masked image modelling (SimMIM: Xie et al., 2022), without labels",
    "moco_v3": "momentum contrast (MoCo v3: Chen et al., 2021), without labels",
    "dino": "self-distillation (DINO: Caron et al., 2021), without labels",
    "supervised": "classification of groups of the classes",
}
IMAGES = {"test": "test", "validation": "validation", "shifts": "shifted test images"}


def licence(subject: Subject) -> str:
    """This repository's where nothing of others is in the weights but what allows that, else `UNKNOWN`."""
    brought = any(isinstance(subject.study.teachers[name], FromFile) for name in teachers(subject))
    return UNKNOWN if brought or subject.study.data.source not in OPEN else HERE


def teachers(subject: Subject) -> tuple[str, ...]:
    """Pre-trained ones that have a part in the weights, at first or second hand."""
    study, run = subject.study, subject.run
    used = [] if run.method in ("scratch", "distill_logits") else [run.teacher]
    if run.initial is not None:
        used.append(run.initial)
    if run.logit_loss is not None:
        used.append(study.finetuned_teachers[run.logit_loss.teacher].run.teacher)
    return tuple(dict.fromkeys(used))


def write(
    folder: Path,
    subject: Subject,
    description: Description,
    accuracies: Sequence[Accuracy],
    *,
    licence: str,
    parameters: int,
    onnx: bool,
) -> None:
    """Writes README.md.

    Args:
        accuracies: `accuracies.read`.
        parameters: number of weights.
        onnx: whether a model as ONNX lies beside it.
    """
    environment = Environment(
        loader=PackageLoader("attention_transfer.exporting"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    study, record = subject.study, subject.record
    text = environment.get_template("README.md.j2").render(
        header=_header(subject, accuracies, licence).to_yaml(),
        subject=subject,
        data=study.data,
        dataset=_dataset(study),
        classes=[f"`{name}`" for name in description.classes],
        mean=", ".join(f"{value:g}" for value in description.mean),
        std=", ".join(f"{value:g}" for value in description.std),
        method=METHODS[subject.run.method],
        teachers=[_teacher(study, name) for name in teachers(subject)],
        licence=licence,
        recipe=json.dumps(_recipe(subject), indent=1, sort_keys=True),
        rows=[_row(accuracy) for accuracy in accuracies],
        measured=accuracies,
        confidence=f"{100 * study.evaluation.confidence:g} %",
        parameters=f"{parameters:,}",
        mode="L" if study.data.channels == 1 else "RGB",
        bfloat16=study.training.precision == "bfloat16",
        initial=f"the weights of `{subject.run.initial}`" if subject.run.initial else None,
        sha256=sha256(folder / vit.WEIGHTS),
        revision=record["git_revision"] or "not in git",
        dirty=record["git_dirty"],
        versions=record["versions"],
        onnx=onnx,
        opset=OPSET,
        input=INPUT,
        output=OUTPUT,
    )  # fmt: skip
    write_text(folder / FILE, text)


def _header(subject: Subject, accuracies: Sequence[Accuracy], licence: str) -> ModelCardData:
    source = subject.study.data.source
    return ModelCardData(
        license=licence,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["timm", "image-classification", "vision-transformer", "attention-transfer"],
        datasets=[OPEN[source]] if source in OPEN else None,
        metrics=["accuracy"],
        model_name=f"{subject.layout.study.replace('/', '-')}-{subject.name}-{subject.seed}",
        eval_results=[_result(subject.study, accuracy) for accuracy in accuracies],
    )


def _result(study: Study, accuracy: Accuracy) -> EvalResult:
    shifted = accuracy.images == "shifts"
    return EvalResult(
        task_type="image-classification",
        dataset_type=OPEN.get(study.data.source, study.data.source),
        dataset_name=_dataset(study) + (", shifted" if shifted else ""),
        dataset_split="train" if accuracy.images == "validation" else "test",
        metric_type="accuracy",
        metric_name=f"Accuracy, {IMAGES[accuracy.images]}",
        metric_value=accuracy.value,
    )


def _dataset(study: Study) -> str:
    """For readers. The folder's name is nobody's business."""
    names = {
        "fashion-mnist": "Fashion-MNIST",
        "digits": "scikit-learn's digits",
        "folder": "a folder of images",
    }
    return names.get(study.data.source, study.data.source)


def _teacher(study: Study, name: str) -> str:
    teacher = study.teachers[name]
    if isinstance(teacher, FromFile):
        return (
            f"`{name}`: weights that were brought to the study (SHA-256 `{teacher.sha256}`). The study knows "
            "nothing of their licence: look it up before you pass this model on"
        )
    if isinstance(teacher, Untrained):
        return f"`{name}`: random weights, seed {teacher.seed}: the control without pre-training"
    assert isinstance(teacher, Pretrained)
    images = {
        "task": "the task's training images",
        "digits": "scikit-learn's digits",
        "fractals": "rendered fractals",
    }
    return (
        f"`{name}`: pre-trained in the study on {images[teacher.images]}, seed {teacher.seed}; {KINDS[teacher.kind]}. "
        "Nobody else's weights are in it: this model's licence is its own"
    )


def _recipe(subject: Subject) -> Mapping[str, Any]:
    """The resolved params that its stage recorded, and its teachers', without where files lie on the machine."""
    params = dict(subject.record["params"])
    if not subject.is_student:
        params["finetuned_teachers"] = {subject.name: params["finetuned_teachers"][subject.name]}
    params["data"] = {key: value for key, value in params["data"].items() if key != "folder"}
    params["teachers"] = {
        name: subject.study.teachers[name].model_dump(mode="json", exclude={"path"})
        for name in teachers(subject)
    }
    return params


def _row(accuracy: Accuracy) -> dict[str, str]:
    """A line of the table, in per cent."""
    own, seeds = f"{100 * accuracy.value:.2f}", accuracy.seeds
    if accuracy.low is not None and accuracy.high is not None:
        own += f" [{100 * accuracy.low:.2f}, {100 * accuracy.high:.2f}]"
    mean = "–"
    if seeds is not None:
        mean = f"{100 * seeds.mean:.2f}"
        if not math.isnan(seeds.low):
            mean += f" [{100 * seeds.low:.2f}, {100 * seeds.high:.2f}]"
        mean += f", n = {seeds.n}"
    return {"images": IMAGES[accuracy.images], "examples": f"{accuracy.examples:,}", "own": own, "mean": mean}
