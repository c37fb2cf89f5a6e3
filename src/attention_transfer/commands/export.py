"""`export`: a trained student, or a fine-tuned teacher, as a folder that timm opens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from attention_transfer.assembly import Parts
from attention_transfer.config import Study
from attention_transfer.errors import StudyError
from attention_transfer.exporting import accuracies, card, hub, onnx_file, timm_folder
from attention_transfer.exporting.subject import find
from attention_transfer.files import atomic_folder
from attention_transfer.layout import Layout
from attention_transfer.models import students
from attention_transfer.training import machine

CHECKED = 64  # test images on which the exported model must give the student's logits


@dataclass(frozen=True)
class Wishes:
    """What is asked for beside the folder itself.

    Attributes:
        folder: where to; None: exports/<study>/<run>-<seed>.
        onnx: a model as ONNX too.
        push: repository on the Hugging Face hub, if any.
        public: anyone may read it there.
        licence: of the model, as the hub names it; None for what the study knows.
    """

    folder: Path | None = None
    onnx: bool = False
    push: str | None = None
    public: bool = False
    licence: str | None = None


def export(study: Study, name: str, seed: int | None, wishes: Wishes, *, graph: str = "") -> Path:
    """Writes the folder, whole or not at all, and says what was checked.

    Args:
        graph: see `subject.find`.

    Raises:
        StudyError: see `subject.find`; a record is missing or damaged; the folder is there and is something else; a
            check fails; the hub cannot be reached.
    """
    if wishes.public and wishes.push is None:
        raise StudyError(
            "says who may read what is uploaded, and nothing is",
            where="--public",
            remedy="say where to, --push OWNER/NAME, or leave it out",
        )
    if wishes.onnx:
        onnx_file.require()
    if wishes.push is not None:
        hub.require(wishes.push)
    subject = find(study, name, seed, graph=graph)
    folder = wishes.folder or Layout.of(study).export(subject.name, subject.seed)
    parts = Parts(subject.study, subject.layout, machine.prepare())
    measured, images = accuracies.read(subject), _some(parts)
    licence = wishes.licence or card.licence(subject)
    student = students.load(subject.folder, made_by=subject.made_by(subject.stage))
    says = []
    with atomic_folder(folder) as made:
        timm_folder.write(made, subject, parts.description, licence)
        card.write(
            made, subject, parts.description, measured, licence=licence,
            parameters=sum(weight.numel() for weight in student.parameters()), onnx=wishes.onnx,
        )  # fmt: skip
        timm_folder.check(made, student.to(parts.device), images.to(parts.device))
        says.append(f"timm gives the student's logits, to the bit, on {len(images)} test images")
        if wishes.onnx:
            found = onnx_file.write(made / onnx_file.FILE, student.cpu(), images)
            says.append(
                f"{onnx_file.FILE}, opset {onnx_file.OPSET}: logits differ from PyTorch's by at most "
                f"{found.difference:.1e} ({found.allowed:.1e} is allowed)"
            )
    print("\n".join([f"{folder}: {subject.section}.{subject.name}, seed {subject.seed}", *says]))
    if licence == card.UNKNOWN:
        print(
            "Its licence is not known to the study: look it up, and say it with --license before you pass it on."
        )
    if wishes.push is not None:
        print(f"Uploaded: {hub.upload(folder, wishes.push, public=wishes.public)}")
    return folder


def _some(parts: Parts) -> Tensor:
    """Test images, spread over the set, normalised: (CHECKED, channels, size, size), on the CPU."""
    images = parts.test.images
    rows = np.unique(np.linspace(0, len(images) - 1, CHECKED).astype(int))
    return parts.clean(images)(rows).cpu()
