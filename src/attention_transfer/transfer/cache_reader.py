"""Reading the attention cache: random access to verified rows, never a shard as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from attention_transfer.errors import StudyError, repro
from attention_transfer.transfer.cache_layout import Content
from attention_transfer.transfer.cache_manifest import Entry, Integers, read_manifest, require_recipe
from attention_transfer.transfer.packing import unpack
from attention_transfer.transfer.shards import (
    MANIFEST,
    REMEDY,
    STAGE,
    Shard,
    digest,
    open_shard,
    shard_fingerprint,
)

Progress = Callable[[Sequence[Entry]], Iterable[Entry]]
"""Shows how far an iteration over shards has come."""

_NAMES: dict[Content, str] = {"queries_and_keys": "queries and keys", "maps": "attention maps"}


class CacheReader:
    """A finished cache on disk, which may be read-only and read by several processes at once.

    Attributes:
        layout: what a row holds; `layout.content` says which of `read` and `read_maps` it answers.
        keys: int64 (rows, 2), example and view.
        bias: float32 (layers, heads or 1, tokens, tokens), which the teacher adds to the logits of every
            image; None where it adds none.

    Args:
        folder: as written by `CacheWriter`.
        expect: the recipe that the cache must have; None accepts any.
        verify: `first`: a row's checksum is recomputed when this process first reads the row;
            `all`: those of all rows at once, here.

    Raises:
        StudyError: the cache is unfinished, damaged, or made from another recipe.
    """

    def __init__(
        self, folder: Path, *, expect: Mapping[str, Any] | None, verify: Literal["first", "all"] = "first"
    ) -> None:
        if verify not in ("first", "all"):
            raise ValueError(f"verify is 'first' or 'all', not {verify!r}")
        self.folder = folder
        self._arguments = {"expect": expect, "verify": verify}
        manifest = read_manifest(folder)
        if expect is not None:
            require_recipe(folder, manifest.recipe, expect)
        self.recipe, self.layout, self.keys = manifest.recipe, manifest.layout, manifest.keys
        self.bias = None if manifest.bias is None else torch.tensor(manifest.bias)
        self._fingerprint, self._entries = manifest.fingerprint, manifest.shards
        self._starts = np.cumsum([0, *(entry.rows for entry in self._entries)])
        self._examples, self._views = np.ascontiguousarray(self.keys.T)
        composite = _composite(self._examples, self._views)
        self._order = np.argsort(composite, kind="stable")
        self._sorted = composite[self._order]
        self._opened: list[Shard | None] = [None] * len(self._entries)
        self._verified = np.zeros(len(self.keys), dtype=bool)
        if verify == "all":
            for index in range(len(self._entries)):
                if damaged := self._shard(index).damaged():
                    raise self._damaged(index, damaged[0])
            self._verified[:] = True

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Callable[..., CacheReader], tuple[Path]]:
        """A copy for another process opens the files anew."""
        return functools.partial(CacheReader, **self._arguments), (self.folder,)  # type: ignore[arg-type]

    def read(
        self, examples: Integers, views: Integers | int, layers: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Queries and keys of a batch, from disk.

        Args:
            examples: (batch,) example ids.
            views: (batch,) view numbers, or one for all; -1 is the clean image.
            layers: which layers, in this order; None for all.

        Returns:
            (batch, 2, layers, heads, tokens, head_dim), contiguous, on the CPU; index 0 of the second axis
            holds the queries. float16 from a cache in float16, float32 from one in float32 or int8.

        Raises:
            StudyError: the cache holds maps; or a row is not in it, or fails its checksum, or its shard
                is missing.
            ValueError: a layer that the teacher does not have.
        """
        return self._read("queries_and_keys", examples, views, layers)

    def read_maps(
        self, examples: Integers, views: Integers | int, layers: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Attention maps of a batch, as stored: (batch, layers, heads, tokens, tokens); see `Layout`.

        Arguments and errors are those of `read`; it is an error, too, where the cache holds queries and keys.
        """
        return self._read("maps", examples, views, layers)

    def _read(
        self, content: Content, examples: Integers, views: Integers | int, layers: Sequence[int] | None
    ) -> torch.Tensor:
        layout = self.layout
        if layout.content != content:
            raise StudyError(
                f"holds {_NAMES[layout.content]}, and {_NAMES[content]} are asked for",
                where=str(self.folder / MANIFEST),
                remedy=f"set attention.content: {content}, and make the cache anew: {repro(STAGE)}",
            )
        rows = self._find(np.asarray(examples, dtype=np.int64), np.asarray(views, dtype=np.int64))
        chosen = list(range(layout.layers) if layers is None else layers)
        if not all(0 <= layer < layout.layers for layer in chosen):
            raise ValueError(f"layers {chosen}: the cache holds layers 0 to {layout.layers - 1}")
        starts = np.arange(0, layout.units, layout.layers)  # of the queries' units and of the keys'
        units = np.add.outer(starts, np.array(chosen, dtype=np.int64)).ravel()
        breaks = np.flatnonzero(np.diff(units) != 1) + 1
        runs = [(int(run[0]), len(run)) for run in np.split(units, breaks) if len(run)]
        whole = runs == [(0, layout.units)]
        stored = torch.empty((len(rows), len(units), layout.unit_bytes), dtype=torch.uint8)
        room, size = stored.numpy().reshape(-1).data, len(units) * layout.unit_bytes
        scratch = memoryview(bytearray(layout.row_bytes))
        order = np.argsort(rows)
        ends = np.searchsorted(rows[order], self._starts)
        for index in np.flatnonzero(ends[1:] > ends[:-1]).tolist():
            positions = order[ends[index] : ends[index + 1]]
            local = rows[positions] - self._starts[index]
            shard = self._shard(index)
            verified = self._verified[self._starts[index] : self._starts[index + 1]]
            for position, row in zip(positions.tolist(), local.tolist(), strict=True):
                place = room[position * size : (position + 1) * size]
                if not verified[row]:  # a checksum is that of the whole row
                    filled = place if whole else scratch
                    shard.read(row, filled)
                    if not shard.intact(row, filled):
                        raise self._damaged(index, row)
                    verified[row] = True
                    if whole:
                        continue
                done = 0
                for first, count in runs:
                    end = done + count * layout.unit_bytes
                    shard.read(row, place[done:end], first=first * layout.unit_bytes)
                    done = end
        return unpack(stored, layout).floats().view(len(rows), *layout.of_layers(len(chosen)))

    def _find(self, examples: Integers, views: Integers) -> Integers:
        """Rows of the keys (batch,); a key that is not there is an error."""
        examples, views = np.broadcast_arrays(examples, views)
        places = np.searchsorted(self._sorted, _composite(examples, views))
        if len(self.keys):
            rows = self._order[np.minimum(places, len(self.keys) - 1)]
            # Compared as pairs: a number out of range can share its composite with another pair.
            found = (self._examples[rows] == examples) & (self._views[rows] == views)
        else:
            rows, found = places, np.zeros(len(examples), dtype=bool)
        if not found.all():
            missing = int(np.flatnonzero(~found)[0])
            raise StudyError(
                f"holds no row of example {examples[missing]}, view {views[missing]}; "
                f"it holds {self._summary()}",
                where=str(self.folder),
                remedy=f"make the cache for the present params.yaml: {repro(STAGE)}",
            )
        return rows

    def _summary(self) -> str:
        if not len(self.keys):
            return "no rows"
        return (
            f"{len(self.keys)} rows: {len(np.unique(self._examples))} examples from "
            f"{self._examples.min()} to {self._examples.max()}, "
            f"views from {self._views.min()} to {self._views.max()}"
        )

    def _shard(self, index: int) -> Shard:
        """The shard, opened when a row of it is first read."""
        shard = self._opened[index]
        if shard is None:
            shard = self._opened[index] = self._open(index)
        return shard

    def _open(self, index: int) -> Shard:
        entry = self._entries[index]
        keys = self.keys[self._starts[index] : self._starts[index + 1]]
        shard = open_shard(
            self.folder / entry.file,
            layout=self.layout,
            rows=entry.rows,
            fingerprint=shard_fingerprint(self._fingerprint, keys),
        )
        if digest(shard.checksums) != entry.xxh3:
            raise StudyError(
                "the checksums of its rows are not those of the manifest",
                where=str(shard.path),
                remedy=REMEDY,
            )
        return shard

    def _damaged(self, index: int, local: int) -> StudyError:
        example, view = self.keys[self._starts[index] + local].tolist()
        return StudyError(
            f"row {local} (example {example}, view {view}) fails its checksum",
            where=str(self.folder / self._entries[index].file),
            remedy=REMEDY,
        )

    def damages(self, progress: Progress) -> tuple[int, tuple[str, ...]]:
        """Number of intact rows, and one line for each damaged row or shard; reads every byte."""
        intact, problems = 0, []
        for index, entry in enumerate(progress(self._entries)):
            try:
                shard = self._open(index)
            except StudyError as error:
                problems.append(f"{entry.file}: {error.problem}")
                continue
            damaged = shard.damaged()
            problems += [f"{entry.file}: {self._damaged(index, row).problem}" for row in damaged]
            intact += entry.rows - len(damaged)
        return intact, tuple(problems)


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found: rows of the cache, intact rows, and a line for each damaged row or shard."""

    rows: int
    intact: int
    problems: tuple[str, ...]


def verify(folder: Path, *, progress: Progress = iter) -> VerifyReport:
    """Recomputes every checksum of a cache.

    Args:
        progress: gives the shards on as it gets them, such as tqdm.

    Raises:
        StudyError: the cache is unfinished, or its manifest or keys are damaged.
    """
    reader = CacheReader(folder, expect=None)
    intact, problems = reader.damages(progress)
    return VerifyReport(rows=len(reader), intact=intact, problems=problems)


def _composite(examples: Integers, views: Integers) -> Integers:
    """One number for each pair, unique among the pairs that a cache may hold."""
    return (examples << 32) + views
