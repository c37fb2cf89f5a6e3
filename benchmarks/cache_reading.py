"""Random reading of the attention cache, against raw os.preadv of the same rows from the same files.

    python benchmarks/cache_reading.py [--quick]

Rows of the default study (params.yaml) and of ViT-S/16 at 224 pixels, in random batches, from a cache of a
few hundred MB in the folder that the environment variable TMPDIR names. Values: seconds of preadv / seconds
of the cache; 1 means as fast as preadv, which verifies nothing and looks nothing up. Both allocate the batch
that they return, and are checked to return the same.

Warm: from the operating system's page cache, with checksums verified before, as in all epochs but a row's
first; also timed with the checksums computed, as in a row's first read. The two sides alternate batch by batch.

Cold: from the disk, a pass over new rows by a new reader, checksums computed. Before each pass the files,
which the cache has fsynced, are dropped from the page cache (posix_fadvise DONTNEED), and after it Linux must
have counted at least the rows' bytes as fetched from storage for this process; otherwise the benchmark stops.
What lies below, such as a virtual machine's host, may still hold them: both sides alternate, so it holds them
for both.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import torch

from attention_transfer import config, plan
from attention_transfer.transfer.cache import CacheReader, CacheWriter, Layout

PARAMS = Path(__file__).parents[1] / "params.yaml"
TARGET = 0.8
WARM_UP = 5  # batches
Read = Callable[[np.ndarray], torch.Tensor]


def write(folder: Path, layout: Layout, rows: int) -> None:
    """A cache of random rows: example i, view 0."""
    keys = np.stack([np.arange(rows), np.zeros(rows, np.int64)], axis=1)
    generator = torch.Generator().manual_seed(0)
    with CacheWriter(folder, layout=layout, recipe={"benchmark": "cache_reading"}, keys=keys) as writer:
        for piece in writer.pending():
            writer.write(torch.randn(piece.stop - piece.start, *layout.shape, generator=generator))


class Preadv:
    """One os.preadv a row, at offsets computed beforehand, into one new tensor; nothing is checked."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout = layout
        paths = sorted(folder.glob("shard-*.safetensors"))
        self.files = [os.open(path, os.O_RDONLY) for path in paths]
        self.offsets = []  # (file, offset) of each row; the rows lie at the end of their file
        for file in self.files:
            size = os.fstat(file).st_size
            rows = size // (layout.row_bytes + 8)
            start = size - rows * layout.row_bytes
            self.offsets += [(file, start + row * layout.row_bytes) for row in range(rows)]

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Returns (batch, *layout.shape)."""
        size = self.layout.row_bytes
        out = torch.empty((len(rows), *self.layout.shape), dtype=torch.float16)
        target = memoryview(out.numpy().reshape(-1).view(np.uint8).data)
        for place, row in enumerate(rows.tolist()):
            file, offset = self.offsets[row]
            os.preadv(file, [target[place * size : (place + 1) * size]], offset)
        return out

    def drop(self) -> None:
        """Takes the files out of the page cache."""
        for file in self.files:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for file in self.files:
            os.close(file)


def from_cache(reader: CacheReader) -> Read:
    return lambda rows: reader.read(rows, 0)


def warm(raw: Preadv, reader: CacheReader, batches: list[np.ndarray]) -> dict[str, float]:
    """Median seconds of a batch, both sides alternating."""
    times: dict[str, list[float]] = {"preadv": [], "cache": []}
    for number, rows in enumerate(batches):
        found = []
        for side, read in (("preadv", raw.read), ("cache", from_cache(reader))):
            start = time.perf_counter()
            found.append(read(rows))
            if number >= WARM_UP:
                times[side].append(time.perf_counter() - start)
        if not torch.equal(*found):
            raise SystemExit("the cache and preadv disagree")
    return {side: statistics.median(values) for side, values in times.items()}


def cold(raw: Preadv, folder: Path, passes: list[list[np.ndarray]]) -> dict[str, float]:
    """Median seconds of a pass over new rows from the disk, both sides alternating."""
    times: dict[str, list[float]] = {"preadv": [], "cache": []}
    for batches in passes:
        for side, taken in times.items():
            raw.drop()
            read = raw.read if side == "preadv" else from_cache(CacheReader(folder, expect=None))
            fetched = bytes_fetched()
            start = time.perf_counter()
            for rows in batches:
                read(rows)
            taken.append(time.perf_counter() - start)
            wanted = sum(map(len, batches)) * raw.layout.row_bytes
            if (fetched := bytes_fetched() - fetched) < wanted:
                raise SystemExit(
                    f"not a cold read: {fetched} bytes fetched from storage, of {wanted}; "
                    "name a folder on a local disk in TMPDIR"
                )
    return {side: statistics.median(values) for side, values in times.items()}


def bytes_fetched() -> int:
    """Bytes that this process has caused to be fetched from storage."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def compare(name: str, layout: Layout, *, rows: int, batch: int, quick: bool) -> list[measure.Result]:
    """Writes a cache, and reads it warm and cold."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name) / "cache"
        write(folder, layout, rows)
        raw = Preadv(folder, layout)
        new = np.array_split(random.permutation(rows), rows // batch)  # each row once
        any_rows = [random.choice(rows, batch, replace=False) for _ in range(10 if quick else 200)]
        per_pass = len(new) // 4 or 1
        passes = [new[start : start + per_pass] for start in range(0, len(new), per_pass)]
        found = {
            "warm": (warm(raw, CacheReader(folder, expect=None, verify="all"), any_rows), TARGET),
            "warm, first read with checksums": (warm(raw, CacheReader(folder, expect=None), new), None),
            "cold": (cold(raw, folder, passes if quick else passes * 2), TARGET),
        }
        raw.close()
    results = []
    for how, (taken, target) in found.items():
        size = (per_pass if how == "cold" else 1) * batch * layout.row_bytes / 1e9
        speeds = "  ".join(f"{side} {size / seconds:6.2f} GB/s" for side, seconds in taken.items())
        print(f"{name}, {how}: {speeds}")
        value = taken["preadv"] / taken["cache"]
        results.append(measure.Result(f"cache reading: {name}, {how} (cpu)", value, target, "higher", "x"))
    return results


def main() -> None:
    options = measure.arguments(__doc__)
    study = config.load(PARAMS)
    teacher = next(iter(study.teachers.values()))
    default = plan.cache_layout(teacher.architecture, study.data, study.attention)
    small = Layout(layers=12, heads=6, tokens=197, head_dim=64, dtype="float16")
    sizes = [("default study", default, 400 if options.quick else 10_000, 50)]
    if not options.quick:
        sizes.append(("ViT-S/16 at 224 pixels", small, 128, 8))
    results = []
    for name, layout, rows, batch in sizes:
        results += compare(name, layout, rows=rows, batch=batch, quick=options.quick)
    measure.write(results, options)


if __name__ == "__main__":
    main()
