"""From a run in params.yaml to its method."""

from __future__ import annotations

from torch import nn

from attention_transfer.config import Run
from attention_transfer.transfer.attention_copy import AttentionCopy
from attention_transfer.transfer.attention_distill import AttentionDistill
from attention_transfer.transfer.method import Method
from attention_transfer.transfer.supervised import Supervised


def build(run: Run, student: nn.Module, layers: tuple[int, ...]) -> Method:
    """The method of a run around its student; `layers` as resolved by `Study.layers`."""
    smoothing = run.label_smoothing
    match run.method:
        case "scratch" | "finetune":
            return Supervised(student, trained="all", label_smoothing=smoothing)
        case "linear_probe":
            return Supervised(student, trained="head", label_smoothing=smoothing)
        case "copy":
            return AttentionCopy(student, layers=layers, label_smoothing=smoothing)
        case "distill":
            assert run.attention_loss is not None  # checked by config
            return AttentionDistill(
                student,
                layers=layers,
                weight=run.attention_loss.weight,
                reduction=run.attention_loss.reduction,
                label_smoothing=smoothing,
            )
