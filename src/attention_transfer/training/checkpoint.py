"""Checkpoints by fingerprint: a killed stage goes on where it was, a changed one starts anew."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash

from attention_transfer.errors import StudyError
from attention_transfer.files import atomic

_DIGEST_BYTES = 8


class Checkpoint:
    """One file, replaced atomically, that begins with a checksum of the folder's name and of the rest.

    Args:
        folder: of this stage and fingerprint alone; whatever has changed has another folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "state.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Writes tensors, numbers, strings and containers of them."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        with atomic(self.path) as temporary, temporary.open("wb") as file:
            file.write(self._digest(payload))
            file.write(payload)

    def load(self) -> dict[str, Any] | None:
        """The saved state; None if there is none.

        Raises:
            StudyError: the file is damaged, or that of another computation.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if self._digest(payload) != digest:
            raise StudyError(
                "is damaged: its checksum is not the recorded one",
                where=str(self.path),
                remedy="delete this file: the stage then starts from its beginning",
            )
        return torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")

    def _digest(self, payload: bytes) -> bytes:
        digest = xxhash.xxh3_64(self.folder.name.encode())
        digest.update(payload)
        return digest.digest()

    def remove(self) -> None:
        """Once the stage's outputs are written, the checkpoint has done its work."""
        shutil.rmtree(self.folder, ignore_errors=True)
