"""Predictions, not scores: per-example logits on disk, from which every metric is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from attention_transfer import processes
from attention_transfer.ahead import announced
from attention_transfer.errors import StudyError, repro
from attention_transfer.files import atomic

RECORD = "record"  # key of the file's metadata: fingerprint and checksum, as JSON
BATCH = 125  # images a pass: 1.3 x as fast as 500, which a core's cache does not hold

Predict = Callable[[np.ndarray], Tensor]
"""Rows of an image set to their logits, (rows, classes)."""


@dataclass(frozen=True)
class Predictions:
    """Logits of one model on one image set.

    Attributes:
        logits: float32 (examples, classes).
        labels: int64 (examples,).
        examples: int64 (examples,), the images' numbers in their set.
        groups: int64 (classes,), where the set's labels are not the model's classes: the label that each class
            counts as, or -1 for none, whose logits do not count.
    """

    logits: Tensor
    labels: Tensor
    examples: Tensor
    groups: Tensor | None = None

    @property
    def judged(self) -> Tensor:
        """Logits of the set's labels, (examples, labels): of several classes the largest."""
        if self.groups is None:
            return self.logits
        kept = self.groups >= 0
        where = self.groups[kept].expand(len(self.logits), -1)
        lowest = self.logits.new_full((len(self.logits), int(self.groups.max()) + 1), -torch.inf)
        return lowest.scatter_reduce(1, where, self.logits[:, kept], "amax")

    @property
    def correct(self) -> Tensor:
        """bool (examples,): whether the largest logit is the label's."""
        return self.judged.argmax(dim=1) == self.labels


@torch.inference_mode()
def predict_all(predict: Predict, count: int, begin: Callable[[np.ndarray], None]) -> Tensor:
    """Logits of all rows of a set, every one once: float32 (count, classes), on the CPU.

    Several processes share out whole batches, so that each batch is computed as by one process, and all have them all.

    Args:
        begin: told the rows of each batch before the one in front of it is computed: images in files are decoded
            meanwhile.
    """
    batches = [np.arange(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    mine = batches[processes.share(len(batches))]
    parts = [predict(rows).float().cpu() for rows in announced(mine, begin)]
    sizes = [
        sum(map(len, batches[processes.share_of(len(batches), process, processes.count())]))
        for process in range(processes.count())
    ]
    return processes.joined(torch.cat(parts) if parts else None, sizes)


def save(path: Path, predictions: Predictions, fingerprint: str) -> None:
    """Writes logits, labels and example numbers, with a checksum and the fingerprint of what made them."""
    tensors = {name: value for name, value in vars(predictions).items() if value is not None}
    # One entry, because safetensors writes several in an order that changes: equal predictions, equal bytes.
    record = {"fingerprint": fingerprint, "checksum": _checksum(tensors, fingerprint)}
    metadata = {RECORD: json.dumps(record, sort_keys=True)}
    with atomic(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=metadata)


def load(path: Path, *, made_by: str) -> Predictions:
    """Reads and checks what `save` wrote.

    Raises:
        StudyError: missing or damaged.
    """
    try:
        tensors = load_file(path)
        record = _metadata(path)
        whole = _checksum(tensors, record["fingerprint"]) == record["checksum"]
    except FileNotFoundError as error:
        raise StudyError(
            "does not exist", where=str(path), remedy=f"run the stage that writes it: {repro(made_by)}"
        ) from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, str(error), made_by) from error
    if not whole:
        raise _damaged(path, "its checksum is not the recorded one", made_by)
    return Predictions(**tensors)


def matches(path: Path, fingerprint: str) -> bool:
    """Whether the file is whole and of this fingerprint, so that it need not be computed again."""
    try:
        return _metadata(path)["fingerprint"] == fingerprint and bool(load(path, made_by="predict"))
    except (StudyError, FileNotFoundError, SafetensorError, OSError, KeyError, ValueError):
        return False


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})[RECORD])


def _checksum(tensors: dict[str, Tensor], fingerprint: str) -> str:
    digest = xxhash.xxh3_64(fingerprint.encode())
    digest.update(
        json.dumps(
            {name: [str(tensors[name].dtype), list(tensors[name].shape)] for name in sorted(tensors)}
        ).encode()
    )
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def _damaged(path: Path, problem: str, made_by: str) -> StudyError:
    return StudyError(
        f"is damaged: {problem}",
        where=str(path),
        remedy=f"delete this file and run: {repro(made_by, again=True)}",
    )
