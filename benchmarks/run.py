"""All benchmarks, one after the other, each in a process of its own; then docs/benchmarks.md.

    python benchmarks/run.py [--quick]

They want the machine for themselves. With --quick nothing is kept: a smoke test of every benchmark's code.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import measure
import page

HERE = Path(__file__).parent
SHARED = ("baseline", "flops", "measure", "page", "passes", "run", "steps")
"""Modules that the benchmarks use; every other file here is a benchmark."""


def benchmarks() -> list[Path]:
    return sorted(path for path in HERE.glob("*.py") if path.stem not in SHARED)


def main() -> None:
    options = measure.arguments(__doc__)
    flags = ["--results", str(options.results), *(["--quick"] if options.quick else [])]
    for script in benchmarks():
        print(f"\n{script.name}", flush=True)
        subprocess.run([sys.executable, str(script), *flags], check=True)
    if not options.quick:
        page.write(options.results)


if __name__ == "__main__":
    main()
