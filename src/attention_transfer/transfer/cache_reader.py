"""Reading the attention cache: random access to verified rows, never a shard as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from attention_transfer.errors import StudyError, repro
from attention_transfer.transfer.cache_manifest import Integers, read_manifest, require_recipe
from attention_transfer.transfer.shards import (
    REMEDY,
    STAGE,
    Shard,
    digest,
    open_shard,
    shard_fingerprint,
)


class CacheReader:
    """A finished cache on disk, which may be read-only and read by several processes at once.

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
        self._fingerprint, self._entries = manifest.fingerprint, manifest.shards
        self._starts = np.cumsum([0, *(entry.rows for entry in self._entries)])
        self._examples, self._views = np.ascontiguousarray(self.keys.T)
        composite = _composite(self._examples, self._views)
        self._order = np.argsort(composite, kind="stable")
        self._sorted = composite[self._order]
        self._opened: list[Shard | None] = [None] * len(self._entries)
        self._verified = np.zeros(len(self.keys), dtype=bool)
        if verify == "all":
            for index, entry in enumerate(self._entries):
                self._verified_shard(index, np.arange(entry.rows))

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Callable[..., CacheReader], tuple[Path]]:
        """A copy for another process maps the files anew instead of carrying the rows along."""
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
            (batch, 2, layers, heads, tokens, head_dim), contiguous, in the layout's dtype, on the CPU;
            index 0 of the second axis holds the queries.

        Raises:
            StudyError: a row is not in the cache, or fails its checksum, or its shard is missing.
            ValueError: a layer that the teacher does not have.
        """
        rows = self._find(np.asarray(examples, dtype=np.int64), np.asarray(views, dtype=np.int64))
        layout = self.layout
        every = list(range(layout.layers))
        chosen = every if layers is None else list(layers)
        if not all(0 <= layer < layout.layers for layer in chosen):
            raise ValueError(f"layers {chosen}: the cache holds layers 0 to {layout.layers - 1}")
        out = torch.empty((len(rows), 2, len(chosen), *layout.shape[2:]), dtype=getattr(torch, layout.dtype))
        # The gather copies units: whole rows or, of some layers, the queries or keys of one layer.
        if chosen == every:
            per_row, units = 1, np.zeros(1, dtype=np.int64)
        else:
            per_row = 2 * layout.layers
            units = np.add.outer([0, layout.layers], np.array(chosen, dtype=np.int64)).ravel()
        unit = 2 * layout.layers * layout.layer_values // per_row
        target = out.numpy().reshape(len(rows), len(units), unit)
        order = np.argsort(rows)
        ends = np.searchsorted(rows[order], self._starts)
        for index in np.flatnonzero(ends[1:] > ends[:-1]).tolist():
            positions = order[ends[index] : ends[index + 1]]
            local = rows[positions] - self._starts[index]
            source = self._verified_shard(index, local).rows.reshape(-1, unit)
            target[positions] = source[np.add.outer(local * per_row, units)]
        return out

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

    def _verified_shard(self, index: int, local: Integers) -> Shard:
        """The shard, after verifying those of its rows `local` that this process has not read before."""
        shard = self._opened[index]
        if shard is None:
            shard = self._opened[index] = self._open(index)
        verified = self._verified[self._starts[index] : self._starts[index + 1]]
        if not (seen := verified[local]).all():
            fresh = local[~seen]
            if len(damaged := shard.damaged(fresh)):
                raise StudyError(self._damage(index, int(damaged[0])), where=str(shard.path), remedy=REMEDY)
            verified[fresh] = True
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

    def _damage(self, index: int, local: int) -> str:
        example, view = self.keys[self._starts[index] + local].tolist()
        return f"row {local} (example {example}, view {view}) fails its checksum"

    def damages(self) -> tuple[int, tuple[str, ...]]:
        """Number of intact rows, and one line for each damaged row or shard; reads every byte."""
        intact, problems = 0, []
        for index, entry in enumerate(self._entries):
            try:
                shard = self._open(index)
            except StudyError as error:
                problems.append(f"{entry.file}: {error.problem}")
                continue
            damaged = shard.damaged().tolist()
            problems += [f"{entry.file}: {self._damage(index, row)}" for row in damaged]
            intact += entry.rows - len(damaged)
        return intact, tuple(problems)


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found: rows of the cache, intact rows, and a line for each damaged row or shard."""

    rows: int
    intact: int
    problems: tuple[str, ...]


def verify(folder: Path) -> VerifyReport:
    """Recomputes every checksum of a cache.

    Raises:
        StudyError: the cache is unfinished, or its manifest or keys are damaged.
    """
    reader = CacheReader(folder, expect=None)
    intact, problems = reader.damages()
    return VerifyReport(rows=len(reader), intact=intact, problems=problems)


def _composite(examples: Integers, views: Integers) -> Integers:
    """One number for each pair, unique among the pairs that a cache may hold."""
    return (examples << 32) + views
