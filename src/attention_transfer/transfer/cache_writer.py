"""Writing the attention cache: write-once shards, resumed from those that verify."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock
import numpy as np
import torch

from attention_transfer import files
from attention_transfer.errors import StudyError
from attention_transfer.transfer.cache_layout import Layout
from attention_transfer.transfer.cache_manifest import Bias, Entry, Manifest, bias_digest, write_manifest
from attention_transfer.transfer.packing import pack
from attention_transfer.transfer.quantisation import STEPS, Stored, stored
from attention_transfer.transfer.shards import (
    BIAS,
    MANIFEST,
    SHARD_BYTES,
    cache_fingerprint,
    digest,
    json_like,
    open_shard,
    shard_fingerprint,
    shard_name,
    write_shard,
)


class CacheWriter:
    """Writes rows in the order of their keys; a folder is a cache once the manifest is in it.

        with CacheWriter(folder, layout=layout, recipe=recipe, keys=keys) as writer:
            for piece in writer.pending():          # a slice of keys
                writer.write(teacher(keys[piece]))  # or in several smaller pieces

    Entering it takes the writer lock, a file beside the folder, and removes what does not verify:
    shards of another recipe or of other keys, damaged ones, leftovers of a killed process. Leaving
    it without an error writes keys, bias and, last, the manifest. Equal rows give equal bytes.

    Several processes write one cache together: one of them as above, the others as its helpers, each some of the
    missing shards. What they have `written` is to be handed to it before it leaves:

        with CacheWriter(.., helps=number > 0) as writer:
            writer.take(some of the first one's writer.missing)
            ...
            writer.accept(of every process writer.written)

    Args:
        folder: where the cache lies; made if need be.
        layout: content, shape and number format of a row.
        recipe: JSON-like; everything that the rows depend on (teacher, data set, views, ...).
        keys: (rows, 2) int64, unique; example >= 0 and view >= -1, where -1 is the clean image.
        shard_bytes: size of a shard's rows; the last shard may be smaller.
        bias: floats (layers, heads or 1, tokens, tokens) that the teacher adds to its logits, stored once,
            as float32; None where it adds none. Maps hold its effect already.
        helps: whether another process has the lock and writes the manifest; `take` says what is left to do.

    Raises:
        StudyError: the bias is not finite; or on entering, when another process writes this cache or
            the folder is not writable.
        ValueError: keys of another shape, type or range, or not unique; a bias of another shape.
    """

    def __init__(
        self,
        folder: Path,
        *,
        layout: Layout,
        recipe: Mapping[str, Any],
        keys: np.ndarray[Any, np.dtype[np.int64]],
        shard_bytes: int = SHARD_BYTES,
        bias: torch.Tensor | None = None,
        helps: bool = False,
    ) -> None:
        if keys.ndim != 2 or keys.shape[1] != 2 or keys.dtype != np.int64:
            raise ValueError(f"keys are int64 of shape (rows, 2), not {keys.dtype} of shape {keys.shape}")
        if (keys < (0, -1)).any() or (keys >= 2**31).any():
            raise ValueError("keys are (example, view), with 0 <= example < 2**31 and -1 <= view < 2**31")
        if len(np.unique(keys, axis=0)) != len(keys):
            raise ValueError("keys: a pair (example, view) is given twice")
        self.folder, self.layout, self.keys = folder, layout, keys
        self._recipe = json_like(recipe)
        self._bias = None if bias is None else _checked_bias(bias, layout, where=str(folder))
        bias_xxh3 = None if self._bias is None else bias_digest(self._bias)
        self._fingerprint = cache_fingerprint(self._recipe, layout, bias_xxh3)
        per_shard = layout.rows_per_shard(shard_bytes)
        self._slices = [
            slice(start, min(start + per_shard, len(keys))) for start in range(0, len(keys), per_shard)
        ]
        self._digests: dict[int, str] = {}  # of the checksums of each shard on disk
        self._missing: list[int] = []  # shards still to be written, in order
        self._helps = helps
        self._left_to_others: list[int] = []
        self._written: list[int] = []
        self._buffer = np.empty((0, layout.units, layout.unit_bytes), np.uint8)
        self._filled = 0  # rows in the buffer, the first ones of shard self._missing[0]
        self._lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)

    def __enter__(self) -> Self:
        if self._helps:
            return self
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout as error:
            raise StudyError(
                "another process is writing this cache",
                where=str(self.folder),
                remedy="wait until it has finished, or stop it: finished shards are kept",
            ) from error
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        try:
            self._keep_what_verifies()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._helps:
                self._finish()
        finally:
            self._buffer = self._buffer[:0]
            self._lock.release()

    @property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not on disk."""
        return list(self._missing)

    def take(self, shards: Sequence[int]) -> None:
        """Leaves all missing shards but these to others; in rising order."""
        self._left_to_others = [index for index in self._missing if index not in shards]
        self._missing = list(shards)

    @property
    def written(self) -> dict[int, str]:
        """Digests of the shards that this process has written, by number."""
        return {index: self._digests[index] for index in self._written}

    def accept(self, written: Mapping[int, str]) -> None:
        """Counts shards that another process has written."""
        self._digests |= written
        self._left_to_others = [index for index in self._left_to_others if index not in written]

    def pending(self) -> Iterator[slice]:
        """The slices of `keys` that are not on disk, one a shard, in the order that `write` wants."""
        return iter([self._slices[index] for index in self._missing])

    def write(self, rows: torch.Tensor) -> None:
        """Takes the next pending rows: floating point, (any number, *layout.shape), on any device.

        Raises:
            StudyError: a value is not finite in the layout's number format, or the disk is full.
            ValueError: the shape is another one, or there are more rows than are pending.
        """
        if rows.shape[1:] != self.layout.shape or not rows.is_floating_point():
            raise ValueError(
                f"rows are (n, {self.layout.shape}) floats, not {tuple(rows.shape)} {rows.dtype}"
            )
        rows = rows.detach()
        while len(rows):
            if not self._missing:
                raise ValueError(f"{len(rows)} rows more than are pending")
            size = self._size(self._missing[0])
            first = self._slices[self._missing[0]].start + self._filled
            if len(self._buffer) != size:
                self._buffer = np.empty((size, *self._buffer.shape[1:]), np.uint8)
            piece = rows[: size - self._filled]
            numbers = stored(piece, self.layout.dtype)
            self._refuse_overflow(numbers, piece, first=first)
            place = self._buffer[self._filled : self._filled + len(piece)]
            pack(numbers, torch.from_numpy(place), self.layout)
            self._filled += len(piece)
            rows = rows[len(piece) :]
            if self._filled == size:
                self._write_shard()

    def _refuse_overflow(self, numbers: Stored, given: torch.Tensor, *, first: int) -> None:
        finite = numbers.finite()
        if finite.all():
            return
        row = int(finite.logical_not().nonzero()[0, 0])
        example, view = self.keys[first + row].tolist()
        where = f"{self.folder}: example {example}, view {view}"
        name = "weight of a map" if self.layout.content == "maps" else "query or key"
        if given[row].isfinite().all():
            if numbers.scales is None:
                largest = torch.finfo(numbers.numbers.dtype).max
            else:
                largest = STEPS * torch.finfo(numbers.scales.dtype).max
            raise StudyError(
                f"a {name} of size {given[row].abs().max().item():g} does not fit {self.layout.dtype}, "
                f"whose largest number is {largest:g}",
                where=where,
                remedy="set attention.dtype: float32",
            )
        raise StudyError(
            f"a {name} of the teacher is NaN or infinite",
            where=where,
            remedy="compute the teacher in float32 (training.precision) and set attention.dtype: float32; "
            "if it stays so, the teacher's weights are not finite",
        )

    def _write_shard(self) -> None:
        index = self._missing[0]
        path = self.folder / shard_name(index)
        found = write_shard(
            path, self._buffer, layout=self.layout, fingerprint=self._shard_fingerprint(index)
        )
        self._digests[index] = digest(found)
        self._written.append(index)
        del self._missing[0]
        self._filled = 0

    def _shard_fingerprint(self, index: int) -> str:
        return shard_fingerprint(self._fingerprint, self.keys[self._slices[index]])

    def _keeps(self, index: int) -> bool:
        """Whether a shard is on disk as it should be, every row with its checksum; recomputes them."""
        path, rows = self.folder / shard_name(index), self._size(index)
        try:
            fingerprint = self._shard_fingerprint(index)
            shard = open_shard(path, layout=self.layout, rows=rows, fingerprint=fingerprint)
        except StudyError:
            return False  # missing, damaged or of another recipe: written anew, whatever the reason
        if shard.damaged():
            return False
        self._digests[index] = digest(shard.checksums)
        return True

    def _size(self, index: int) -> int:
        return self._slices[index].stop - self._slices[index].start

    def _keep_what_verifies(self) -> None:
        self._missing = [index for index in range(len(self._slices)) if not self._keeps(index)]
        kept = {shard_name(index) for index in self._digests}
        kept |= set() if self._bias is None else {BIAS}
        found = [*self.folder.glob("shard-*.safetensors"), *self.folder.glob(BIAS)]
        stale = [path for path in found if path.name not in kept]
        leftovers = list(self.folder.glob(f"{files.TEMPORARY}*"))
        try:
            if self._missing or stale:
                # First, so that no moment sees a manifest beside shards that it does not describe.
                (self.folder / MANIFEST).unlink(missing_ok=True)
            for path in stale + leftovers:
                path.unlink()
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _finish(self) -> None:
        if missing := [*self._missing, *self._left_to_others]:
            rows = sum(map(self._size, missing))
            raise StudyError(
                f"{rows} of {len(self.keys)} rows are not on disk",
                where=str(self.folder),
                remedy="start again: finished shards are kept",
            )
        entries = [
            Entry(file=shard_name(index), rows=self._size(index), xxh3=self._digests[index])
            for index in range(len(self._slices))
        ]
        manifest = Manifest(
            fingerprint=self._fingerprint,
            recipe=self._recipe,
            layout=self.layout,
            keys=self.keys,
            shards=tuple(entries),
            bias=self._bias,
        )
        write_manifest(self.folder, manifest)


def _checked_bias(bias: torch.Tensor, layout: Layout, *, where: str) -> Bias:
    """As it is stored: float32, contiguous."""
    shapes = [(layout.layers, heads, layout.tokens, layout.tokens) for heads in (layout.heads, 1)]
    if layout.content == "maps":
        raise ValueError("maps hold the bias already: it is stored beside queries and keys alone")
    if tuple(bias.shape) not in shapes or not bias.is_floating_point():
        raise ValueError(f"a bias is floats of shape {shapes}, not {bias.dtype} of shape {tuple(bias.shape)}")
    values: Bias = np.ascontiguousarray(bias.detach().float().cpu().numpy())
    if not np.isfinite(values).all():
        raise StudyError(
            "the bias that the teacher adds to its logits is NaN or infinite",
            where=where,
            remedy="use a teacher whose weights are finite",
        )
    return values


def _unwritable(folder: Path, error: OSError) -> StudyError:
    return StudyError(
        f"cannot be written: {error.strerror or error}",
        where=str(folder),
        remedy="make the folder and the one around it writable, or free disk room",
    )
