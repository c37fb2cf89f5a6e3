"""A trained student as ONNX, checked in onnxruntime: the only importer of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from attention_transfer.errors import StudyError

FILE = "model.onnx"
OPSET = 18  # torch's exporter writes this one without a conversion; runtimes have it since 2023
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4  # of the largest absolute logit: sums in another order, in float32


@dataclass(frozen=True)
class Agreement:
    """Between onnxruntime and PyTorch, on the CPU.

    Attributes:
        difference: largest absolute one of a logit.
        allowed: `TOLERANCE` in logits.
    """

    difference: float
    allowed: float


def require() -> None:
    """StudyError unless the packages are there: said before any work is done."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise StudyError(
            f"needs the package {error.name}, which is not installed",
            where="--onnx",
            remedy="pip install -r requirements.lock, which the study is tested with; or: pip install -e '.[export]'",
        ) from error


@torch.inference_mode()
def write(path: Path, student: nn.Module, images: Tensor) -> Agreement:
    """Writes one file, weights included, for batches of any size, and checks it on images.

    Args:
        student: on the CPU, in eval mode.
        images: normalised, (batch, channels, size, size), at least three.

    Raises:
        StudyError: onnxruntime's logits differ by more than `TOLERANCE`.
    """
    program = torch.onnx.export(
        student,
        (images[:2],),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None  # with dynamo
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where on this machine the code lies that made it
    program.save(path, external_data=False)
    expected = student(images)
    difference = float((_run(path, images) - expected).abs().max())
    allowed = TOLERANCE * float(expected.abs().max())
    if not difference <= allowed:  # NaN too
        raise StudyError(
            f"gives other logits in onnxruntime than in PyTorch, by up to {difference:.1e}; allowed: {allowed:.1e}",
            where=FILE,
            remedy="install the onnx, onnxscript and onnxruntime of requirements.lock, or export without --onnx",
        )
    return Agreement(difference, allowed)


def _run(path: Path, images: Tensor) -> Tensor:
    """Logits by onnxruntime, in batches of one and of all others."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [session.run([OUTPUT], {INPUT: part.numpy()})[0] for part in (images[:1], images[1:])]
    return torch.cat([torch.from_numpy(part) for part in parts])
