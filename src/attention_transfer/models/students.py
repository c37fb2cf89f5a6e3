"""Students: the teacher's architecture, initialised as the method asks."""

from __future__ import annotations

from pathlib import Path

from attention_transfer.models import vit
from attention_transfer.models.attention import slim

COPIED = "copied_layers"  # key of config.json: layers that hold no query and key weights


def create(
    arguments: vit.Arguments,
    *,
    seed: int,
    drop_path: float,
    teacher: vit.ViT | None,
    copied_layers: tuple[int, ...],
) -> vit.ViT:
    """A student before its first step.

    Args:
        arguments: of the model, with the task's number of classes.
        seed: of the initial weights; a fine-tuned student draws its head (and LayerNorm) from it.
        teacher: whose weights are the initialisation (fine-tune, linear probe), if any.
        copied_layers: layers that will be handed the teacher's attention at every pass.
    """
    student = vit.create(arguments, seed=seed, drop_path=drop_path)
    if teacher is not None:
        # The pre-trained model has no head, and its last norm was not pre-trained: both start anew.
        fresh = {k: v for k, v in student.state_dict().items() if k.startswith(("head.", "fc_norm."))}
        student.load_state_dict({**teacher.state_dict(), **fresh})
    slim(student, copied_layers)
    return student


def save(folder: Path, student: vit.ViT, arguments: vit.Arguments, copied_layers: tuple[int, ...]) -> None:
    """As vit.save; a student that copies no layer is an ordinary timm model."""
    vit.save(folder, student, arguments, {COPIED: list(copied_layers)} if copied_layers else {})


def load(folder: Path, *, made_by: str) -> vit.ViT:
    """The student that `save` wrote, in eval mode."""
    return vit.load(
        folder, made_by=made_by, change=lambda student, config: slim(student, config.get(COPIED, ()))
    )
