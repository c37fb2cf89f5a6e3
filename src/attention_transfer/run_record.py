"""run.json, the record of one stage instance: how a result came about, and that it is still that result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attention_transfer.errors import StudyError, repro
from attention_transfer.files import read_sealed, write_sealed, xxh3

RUN = "run.json"


def write(folder: Path, values: Mapping[str, Any], outputs: Iterable[Path]) -> None:
    """Writes run.json, which vouches for these files of the stage, wherever they lie."""
    write_sealed(folder / RUN, {**values, "outputs": {path.name: xxh3(path) for path in outputs}})


def read(folder: Path, *, made_by: str) -> dict[str, Any]:
    """run.json, once it and every file in the same folder that it vouches for are known to be whole.

    Raises:
        StudyError: one of them is missing or damaged.
    """
    values = read_sealed(folder / RUN, made_by=made_by)
    beside = {path.name for path in folder.iterdir()}
    for name in sorted(beside & values.get("outputs", {}).keys()):
        require_whole(folder / name, values, made_by=made_by)
    return values


def require_whole(path: Path, values: Mapping[str, Any], *, made_by: str) -> None:
    """StudyError unless a file is the one for which the run.json with these values vouches."""
    try:
        found = xxh3(path)
    except FileNotFoundError as error:
        raise StudyError(
            "does not exist", where=str(path), remedy=f"run the stage that writes it: {repro(made_by)}"
        ) from error
    except OSError as error:
        raise StudyError(
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            remedy=f"make it anew: {repro(made_by, again=True)}",
        ) from error
    if found != values.get("outputs", {}).get(path.name):
        raise StudyError(
            "is damaged or was replaced: its checksum is not the one in the run.json of its stage",
            where=str(path),
            remedy=f"make it anew: {repro(made_by, again=True)}",
        )
