"""Random reading of the attention cache, against raw os.preadv of the same rows from the same files.

    python benchmarks/cache_reading.py [folder]

Writes 20,000 rows of 26 KB to a temporary folder (0.5 GB; the argument says where), then reads random
batches of 50 from the operating system's page cache. Prints the ratio of medians preadv / cache: 1 means
as fast as preadv. Target: at least 0.8 with checksums verified already. The two alternate on the same
batches, so that a busy machine slows both.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from attention_transfer.transfer.cache import CacheReader, CacheWriter, Layout

ROWS, BATCH, BATCHES, WARM_UP = 20_000, 50, 400, 20
LAYOUT = Layout(layers=4, heads=3, tokens=50, head_dim=11, dtype="float16")  # 26,400 bytes a row


def write(folder: Path) -> np.ndarray:
    """Writes the cache of random rows and returns its keys (ROWS, 2)."""
    keys = np.stack(np.divmod(np.arange(ROWS), 40), axis=1)
    generator = torch.Generator().manual_seed(0)
    with CacheWriter(folder, layout=LAYOUT, recipe={"benchmark": "cache_reading"}, keys=keys) as writer:
        for piece in writer.pending():
            for start in range(piece.start, piece.stop, 500):
                count = min(500, piece.stop - start)
                writer.write(torch.randn(count, *LAYOUT.shape, generator=generator))
    return keys


class Preadv:
    """One os.preadv a row, at offsets computed beforehand, into one new tensor; nothing is checked."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("shard-*.safetensors"))
        self.files = [os.open(path, os.O_RDONLY) for path in paths]
        self.offsets = []  # (file, offset) of each row; the rows lie at the end of their file
        for file in self.files:
            size = os.fstat(file).st_size
            rows = size // (LAYOUT.row_bytes + 8)
            start = size - rows * LAYOUT.row_bytes
            self.offsets += [(file, start + row * LAYOUT.row_bytes) for row in range(rows)]

    def read(self, rows: list[int]) -> torch.Tensor:
        """Returns (batch, *LAYOUT.shape)."""
        out = torch.empty((len(rows), *LAYOUT.shape), dtype=torch.float16)
        target = memoryview(out.numpy().reshape(-1).view(np.uint8).data)
        for place, row in enumerate(rows):
            file, offset = self.offsets[row]
            os.preadv(file, [target[place * LAYOUT.row_bytes : (place + 1) * LAYOUT.row_bytes]], offset)
        return out


def seconds(read: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Wall-clock time of one call, and what it returned."""
    start = time.perf_counter()
    result = read()
    return time.perf_counter() - start, result


def compare(name: str, reader: CacheReader, raw: Preadv, keys: np.ndarray, batches: list[np.ndarray]) -> None:
    """Times both on each batch, checks that they agree, prints medians and their ratio."""
    times: tuple[list[float], list[float]] = ([], [])
    for number, rows in enumerate(batches):
        examples, views = keys[rows].T
        listed = rows.tolist()
        raw_time, expected = seconds(lambda listed=listed: raw.read(listed))  # type: ignore[misc]
        cache_time, found = seconds(lambda e=examples, v=views: reader.read(e, v))  # type: ignore[misc]
        if not torch.equal(found, expected):
            raise SystemExit(f"{name}: the cache and preadv disagree")
        if number >= WARM_UP:
            times[0].append(raw_time)
            times[1].append(cache_time)
    plain, cache = (statistics.median(values) for values in times)
    rate = BATCH * LAYOUT.row_bytes / 1e9
    print(
        f"{name:28} preadv {plain * 1e6:6.0f} us ({rate / plain:.2f} GB/s)  "
        f"cache {cache * 1e6:6.0f} us ({rate / cache:.2f} GB/s)  ratio {plain / cache:.2f}"
    )


def main() -> None:
    """Writes, reads, prints."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name) / "cache"
        start = time.perf_counter()
        keys = write(folder)
        print(f"{ROWS} rows of {LAYOUT.row_bytes} bytes written in {time.perf_counter() - start:.1f} s")
        raw = Preadv(folder)
        generator = np.random.default_rng(0)
        shuffled = generator.permutation(ROWS)
        # Each row once, so that every batch is new to the reader.
        new = list(shuffled[: ROWS // BATCH * BATCH].reshape(-1, BATCH))
        any_rows = [generator.choice(ROWS, BATCH, replace=False) for _ in range(BATCHES)]
        compare("verified when first read", CacheReader(folder, expect=None), raw, keys, new)
        compare("verified before", CacheReader(folder, expect=None, verify="all"), raw, keys, any_rows)


if __name__ == "__main__":
    main()
