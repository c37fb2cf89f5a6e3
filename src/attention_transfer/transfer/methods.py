"""From a run in params.yaml to its method."""

from __future__ import annotations

from torch import nn

from attention_transfer.config import Study
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
