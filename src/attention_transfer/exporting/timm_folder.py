"""A trained student as a folder that timm opens: weights, and how images are made ready for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from attention_transfer.data.images import Description
from attention_transfer.errors import StudyError
from attention_transfer.exporting.subject import Subject
from attention_transfer.files import read_sealed, write_json
from attention_transfer.models import vit

PAPER = "arXiv:2411.09702"


def write(folder: Path, subject: Subject, description: Description, licence: str) -> None:
    """Copies the weights byte by byte, and writes config.json with what timm calls the pretrained_cfg.

    Args:
        description: of the images; its mean, deviation and classes are the model's.
        licence: as the Hugging Face hub names it.
    """
    data = subject.study.data
    made = read_sealed(subject.folder / vit.CONFIG, made_by=subject.made_by(subject.stage))
    shutil.copyfile(subject.folder / vit.WEIGHTS, folder / vit.WEIGHTS)
    prepared = PretrainedCfg(
        **made["pretrained_cfg"],
        fixed_input_size=True,
        # As data/sources.py and data/decoding.py do it: shorter side to `resize`, then the centre.
        interpolation="bicubic" if data.source == "files" else "bilinear",
        crop_pct=data.image_size / data.resize,
        crop_mode="center",
        mean=tuple(description.mean),
        std=tuple(description.std),
        license=licence,
        description=f"{subject.run.method}, study {subject.layout.study}, seed {subject.seed}",
        paper_ids=PAPER,
    )
    write_json(
        folder / vit.CONFIG,
        {
            "architecture": made["architecture"],
            "num_classes": made["num_classes"],
            "global_pool": made["model_args"]["global_pool"],
            "label_names": description.classes,
            "model_args": made["model_args"],
            "pretrained_cfg": prepared.to_dict(remove_source=True),
        },
    )


@torch.inference_mode()
def check(folder: Path, student: nn.Module, images: Tensor) -> None:
    """Loads the folder as any user of timm would: the logits must be the student's, to the bit.

    Args:
        images: normalised, (batch, channels, size, size), on the student's device.

    Raises:
        StudyError: they are not.
    """
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).to(images.device).eval()
    difference = (loaded(images) - student(images)).abs().max()
    if difference != 0:
        raise StudyError(
            f"the student gives other logits there than in the study, by up to {float(difference):.1e}",
            where=f"timm {timm.__version__}",
            remedy="install the timm of requirements.lock",
        )
