"""From a run in params.yaml to its method."""

from __future__ import annotations

from torch import nn

from attention_transfer.config import COPIES_ATTENTION, Study
from attention_transfer.models import constant_map
from attention_transfer.transfer import joint_attention
from attention_transfer.transfer.attention_copy import AttentionCopy
from attention_transfer.transfer.attention_distill import AttentionDistill
from attention_transfer.transfer.distill_features import FeatureDistill
from attention_transfer.transfer.distill_logits import LogitDistill
from attention_transfer.transfer.method import Method
from attention_transfer.transfer.supervised import Supervised


def slimmed_layers(study: Study, name: str) -> tuple[int, ...]:
    """The layers in which a run's student holds no queries and keys: those whose whole map is copied."""
    run, heads = study.runs[name], study.architecture(name).heads
    if run.method != "copy" or run.transfer != "map":
        return ()
    pairs = zip(study.layers(name), study.heads(name), strict=True)
    return tuple(layer for layer, chosen in pairs if len(chosen) == heads)


def paths(study: Study, name: str, *, device: str) -> dict[str, str]:
    """How a run computes what it could compute in several ways: by rules of shapes and device, for its record.

    `maps` is a product with maps that were given as such; else see `constant_map.path`, and for the loss
    `joint_attention.path`.
    """
    run = study.runs[name]
    if run.method not in COPIES_ATTENTION or run.transfer != "map":
        return {}
    teacher, student = study.teachers[run.teacher].architecture, study.architecture(name)
    as_maps = study.attention.content == "maps" or run.average is not None or teacher.heads > student.heads
    tokens = student.tokens(study.data.image_size)
    biased = "relative_bias" in (*teacher.components, *student.components)
    if run.method == "distill":
        assert run.attention_loss is not None  # checked by config
        whole_maps = all(len(heads) == student.heads for heads in study.heads(name))
        plain = run.attention_loss.temperature == 1 and whole_maps and not biased
        how = joint_attention.path(device, tokens, student.width // student.heads) if plain else "streamed"
        return {"attention_loss": "maps" if as_maps else how}
    head_dim = teacher.width // teacher.heads
    whole = "maps" if as_maps else constant_map.path(device, tokens, head_dim)
    found: dict[str, str] = {"copied_layers": whole} if slimmed_layers(study, name) else {}
    if len(slimmed_layers(study, name)) < len(study.layers(name)):
        one_call = head_dim == student.width // student.heads and not biased  # see CopiedHeads
        found["layers_of_copied_heads"] = "fused" if one_call and not as_maps else whole
    return found


def build(study: Study, name: str, student: nn.Module) -> Method:
    """The method of a run around its student."""
    run, layers, heads = study.runs[name], study.layers(name), study.heads(name)
    student_heads = study.architecture(name).heads
    smoothing = run.label_smoothing
    match run.method:
        case "scratch" | "finetune":
            return Supervised(student, trained="all", label_smoothing=smoothing)
        case "linear_probe":
            return Supervised(student, trained="head", label_smoothing=smoothing)
        case "copy":
            return AttentionCopy(
                student,
                layers=layers,
                heads=heads,
                transfer=run.transfer,
                student_heads=student_heads,
                label_smoothing=smoothing,
            )
        case "distill":
            assert run.attention_loss is not None  # checked by config
            return AttentionDistill(
                student,
                layers=layers,
                heads=heads,
                transfer=run.transfer,
                weight=run.attention_loss.weight,
                reduction=run.attention_loss.reduction,
                temperature=run.attention_loss.temperature,
                student_heads=student_heads,
                label_smoothing=smoothing,
            )
        case "distill_features":
            assert run.feature_loss is not None
            return FeatureDistill(
                student,
                layers=layers,
                weight=run.feature_loss.weight,
                reduction=run.feature_loss.reduction,
                label_smoothing=smoothing,
            )
        case "distill_logits":
            assert run.logit_loss is not None
            return LogitDistill(
                student,
                weight=run.logit_loss.weight,
                temperature=run.logit_loss.temperature,
                label_smoothing=smoothing,
            )
