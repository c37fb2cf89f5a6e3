"""Writes docs/params.md, every key of params.yaml, from config.py and its parts.

python docs/params.py

A test tells when the page is not what the code says.
"""

from __future__ import annotations

import ast
import inspect
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from attention_transfer import config, config_runs, config_teachers, config_values  # noqa: E402
from attention_transfer.files import write_text  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Every key of params.yaml

Written by `python docs/params.py` from [config.py](../src/attention_transfer/config.py): what stands here is what
is checked. A key that is not here is an error, which names its nearest neighbour. Where no default is given, the
key has to be there. [params.yaml](../params.yaml) is an example of a whole study.
"""
# Kinds of values that config_values.py has names for, in words.
WORDS = {
    config_values.Name: "name",
    config_values.StudyName: "name, or study/experiment",
    config_values.Positive: "whole number above 0",
    config_values.Seed: "whole number from 0",
    config_values.Probability: "number from 0 to 1",
    config_values.Fraction: "number between 0 and 1",
    config_values.Share: "number above 0, up to 1",
    config_values.Rate: "number above 0, up to 10",
    config_runs.Layer: "whole number from 0",
    config_teachers.Teacher: "a [teacher](#teachers)",
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}
BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "up to"}
SECTIONS: dict[type[BaseModel], str] = {
    config.Study: "The file",
    config.Data: "data",
    config.Views: "views",
    config.AttentionCache: "attention",
    config.Training: "training",
    config_runs.Run: "runs",
    config_runs.AttentionLoss: "attention_loss of a run",
    config_runs.FeatureLoss: "feature_loss of a run",
    config_runs.LogitLoss: "logit_loss of a run",
    config_runs.FinetunedTeacher: "finetuned_teachers",
    config.Evaluation: "evaluation",
    config.PublishedSet: "published sets",
    config.Ensemble: "ensembles",
    config.Report: "report",
    config_teachers.Architecture: "architecture of a teacher or a run",
}
TEACHERS = get_args(get_args(config_teachers.Teacher)[0])
# Of keys without a text in the source. config_runs.py and config_teachers.py are inputs of the stage `resolve`, which
# writes their defaults: a word there would make that stage of every study stale.
TEXTS: dict[type[BaseModel], dict[str, str]] = {
    config_teachers.Architecture: {
        "patch_size": "Side of a patch in pixels; it must divide `data.image_size`.",
        "width": "Numbers of a token in the residual stream.",
        "depth": "Transformer layers.",
        "heads": "Attention heads of each layer; they must divide `width`.",
        "mlp_ratio": "Hidden width of each MLP, as a multiple of `width`; two thirds of that with `swiglu`.",
    },
    config_teachers.Decoder: {
        "width": "Numbers of a token.",
        "depth": "Transformer layers.",
        "heads": "Attention heads of each layer; they must divide `width`.",
    },
    config_teachers.Pretrained: {
        "architecture": "Of the teacher; students have the same unless they name another.",
        "epochs": "Passes over the pre-training images.",
        "warmup_epochs": "Of these, those in which the learning rate rises from 0, in a straight line.",
        "batch_size": "Images in a step.",
        "learning_rate": "Peak learning rate of AdamW, not scaled by the batch size; then half a cosine down to 0.",
        "weight_decay": "Of AdamW.",
        "crop_scale": "Smallest and largest share of an image's area that a random crop keeps.",
        "seed": "Of the first weights, the crops and whatever else is random.",
    },
    config_teachers.MaskedAutoencoder: {
        "decoder": "Reconstructs the hidden patches; thrown away afterwards.",
        "mask_ratio": "Share of the patches that the encoder does not see.",
    },
    config_teachers.MaskedImageModelling: {
        "mask_ratio": "Share of the patches whose pixels are replaced by learnt ones.",
    },
    config_teachers.MomentumContrast: {
        "hidden_width": "Of the projector's and the predictor's hidden layers.",
        "projection_width": "Of the vectors that are compared.",
        "temperature": "Divides the similarities; the loss is multiplied by twice it.",
        "base_momentum": "Of the slowly following encoder at the first step; it rises to 1 along half a cosine.",
        "frozen_patches": "Whether the projection of the patches keeps its first weights, as the paper advises.",
    },
    config_teachers.SelfDistillation: {
        "hidden_width": "Of the head's hidden layers.",
        "bottleneck_width": "Of the head's last layer before the prototypes.",
        "prototypes": "Outputs of the head, over which both networks give a distribution.",
        "student_temperature": "Divides the student's outputs.",
        "teacher_temperature": "Divides the teacher's; lower, so that its distribution is sharper.",
        "centre_momentum": "Of the mean output that is taken off the teacher's.",
        "base_momentum": "Of the teacher's weights at the first step; it rises to 1 along half a cosine.",
    },
    config_teachers.GroupClassification: {
        "label_smoothing": "Share of the target that is spread over all groups.",
    },
    config_teachers.Untrained: {
        "architecture": "Of the teacher; students have the same unless they name another.",
        "seed": "Of the weights.",
    },
    config_teachers.FromTimm: {
        "architecture": "What timm builds by that name: its entry under `timm`, its sizes and components beside it.",
    },
    config_teachers.FromFile: {
        "architecture": "That of the weights; of these, heads alone cannot be read off their shapes.",
        "path": "Of the safetensors file, from the repository's root.",
    },
    config_runs.Run: {
        "method": "How the student is trained: [the method](method.md).",
        "weight_decay": "Of AdamW; biases and norms have none.",
        "betas": "Of AdamW.",
        "epochs": "Passes over the labelled images.",
        "warmup_epochs": "Of these, those in which the learning rate rises from 0, in a straight line.",
        "batch_size": "Images in a step.",
        "label_smoothing": "Share of the target that is spread over all classes.",
        "drop_path": "Stochastic depth: chance that an image skips the last layer; lower layers are skipped less.",
    },
    config_runs.AttentionLoss: {"weight": "Of this loss beside the task's, whose weight is 1."},
    config_runs.FeatureLoss: {"weight": "Of this loss beside the task's, whose weight is 1."},
    config_runs.LogitLoss: {"weight": "Of this loss beside the task's, whose weight is 1."},
    config_runs.FinetunedTeacher: {"seed": "Of its fine-tuning; not one of the study's `seeds`."},
}


def anchor(heading: str) -> str:
    """As code hosts make it."""
    return heading.lower().replace(" ", "-").replace("`", "").replace(":", "")


def words(kind: Any) -> str:
    """A type in words."""
    for known, text in WORDS.items():
        if kind is known or kind == known:
            return text
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        text = ", ".join(f"`{value}`" for value in arguments)
    elif origin is Annotated:
        text = " ".join([words(arguments[0]), *_bounds(arguments[1:])])
    elif origin in (Union, types.UnionType):
        text = " or ".join(words(each) for each in arguments)
    elif origin is tuple and arguments[-1] is Ellipsis:
        text = f"list: {words(arguments[0])}"
    elif origin is tuple:
        text = f"list of {len(arguments)}: {words(arguments[0])}"
    elif origin is dict:
        text = f"by name: {words(arguments[1])}"
    else:
        text = f"[keys](#{anchor(SECTIONS.get(kind, kind.__name__))})"
    return text


def _bounds(metadata: tuple[Any, ...]) -> list[str]:
    found = []
    for each in metadata:
        parts = each.metadata if isinstance(each, FieldInfo) else [each]
        found += [
            f"{text} {getattr(part, bound):g}"
            for part in parts
            for bound, text in BOUNDS.items()
            if hasattr(part, bound)
        ]
        found += [f"like `{part.pattern}`" for part in parts if getattr(part, "pattern", None)]
    return [" ".join(found)] if found else []


def explanations(section: type[BaseModel]) -> dict[str, str]:
    """What stands below each key in the source."""
    found: dict[str, str] = {}
    for each in reversed(section.__mro__):
        if not issubclass(each, BaseModel) or each is BaseModel:
            continue
        body = ast.parse(inspect.getsource(each)).body[0]
        assert isinstance(body, ast.ClassDef)
        for key, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(key.target, ast.Name)
                assert isinstance(text.value, ast.Constant)
                found[key.target.id] = " ".join(str(text.value.value).split())
    return found


def texts(section: type[BaseModel]) -> dict[str, str]:
    """An explanation of each key: that of the source, or of this file."""
    found = {"kind": "Says how the teacher is obtained."}
    for each in reversed(section.__mro__):
        found |= TEXTS.get(each, {})
    return found | explanations(section)


def table(section: type[BaseModel]) -> str:
    """A row for each key."""
    hints, said = get_type_hints(section, include_extras=True), texts(section)
    lines = ["| key | value | default | |", "|:--|:--|:--|:--|"]
    for key, field in section.model_fields.items():
        default = field.get_default()
        shown = "" if default is PydanticUndefined else f"`{_yaml(default)}`"
        lines.append(f"| `{key}` | {words(hints[key])} | {shown} | {said.get(key, '')} |")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    return {None: "null", (): "[]"}.get(value, str(value)) if isinstance(value, tuple | None) else str(value)


def page() -> str:
    parts = [HEAD]
    for section, heading in SECTIONS.items():
        doc = inspect.cleandoc(section.__doc__ or "")
        parts.append(f"## {heading}\n\n{doc}\n\n{table(section)}\n")
        if section is config.Training:
            parts.append(_teachers())
    return "\n".join(parts)


def _teachers() -> str:
    parts = ["## teachers\n\nA teacher's `kind` says how it is obtained, and which keys it has.\n"]
    for teacher in TEACHERS:
        kind = get_args(get_type_hints(teacher, include_extras=True)["kind"])[0]
        parts.append(f"### kind: {kind}\n\n{inspect.cleandoc(teacher.__doc__ or '')}\n\n{table(teacher)}\n")
    decoder = config_teachers.Decoder
    parts.append(
        f'<a id="decoder"></a>\n\n### decoder of `kind: mae`\n\n{decoder.__doc__}\n\n{table(decoder)}\n'
    )
    return "\n".join(parts)


if __name__ == "__main__":
    write_text(PAGE, page())
