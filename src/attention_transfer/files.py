"""Files that are whole or absent: atomic writes, checksums and fingerprints."""

from __future__ import annotations

import contextlib
import csv
import filecmp
import glob
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from attention_transfer.errors import StudyError, repro

DIGEST = "digest"  # key of a sealed JSON file
TEMPORARY = ".tmp-"  # prefix of unfinished files; nothing reads a file of this name


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, which takes its place only when the block has succeeded.

    The content is fsynced before the rename and the folder after it, so that after a crash the
    file is the old one or the new one, whole. What a killed process left of this file is removed.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be written holds no temporary either
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path`, which takes its place, whole, only when the block has succeeded.

    A folder that is there and holds the same files is kept.

    Raises:
        StudyError: something else is there, or nothing can be written.
    """
    whole = path.absolute()  # the present folder has no name of its own
    temporary = whole.with_name(f"{TEMPORARY}{os.getpid()}-{whole.name}")
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(whole)
        temporary.mkdir()
        yield temporary
        for inner in [*temporary.rglob("*"), temporary]:
            _fsync(inner)
        if path.exists() or path.is_symlink():
            _require_same(temporary, path)
            return
        temporary.rename(path)
        _fsync(whole.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _require_same(made: Path, path: Path) -> None:
    """StudyError unless a folder holds the files that have been made, and no others."""
    wanted = {str(file.relative_to(made)) for file in made.rglob("*")}
    found = {str(file.relative_to(path)) for file in path.rglob("*")} if path.is_dir() else set()
    equal, *_ = filecmp.cmpfiles(made, path, wanted & found, shallow=False)
    if different := sorted((wanted | found) - set(equal)):
        raise StudyError(
            f"is there already, and is something else: {', '.join(different[:3])} "
            f"{'differs' if len(different) == 1 else 'differ'}",
            where=str(path),
            remedy="name another folder, or remove this one",
        )


def _fsync(path: Path) -> None:
    """Puts a file's content, or a folder's list of names, on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _unwritable(path: Path, error: OSError) -> StudyError:
    return StudyError(
        f"cannot be written: {error.strerror or error}",
        where=str(path),
        remedy="free disk room, or make the folder writable, and start again: finished work is kept",
    )


def _remove_leftovers(path: Path) -> None:
    for left in path.parent.glob(f"{TEMPORARY}*-{glob.escape(path.name)}"):
        if not is_left_over(left):
            continue
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def is_left_over(temporary: Path) -> bool:
    """Whether the process that was writing an unfinished file, which its name tells, has gone."""
    import psutil  # there is seldom need of it

    writer = temporary.name.removeprefix(TEMPORARY).partition("-")[0]
    return not (writer.isdecimal() and psutil.pid_exists(int(writer)))


def write_text(path: Path, text: str) -> None:
    """Writes `text` atomically as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically as JSON that reads well in a diff. NaN is refused."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """`write_json` with a digest of the values, by which `read_sealed` knows that none has changed."""
    write_json(path, {**values, DIGEST: fingerprint(values)})


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, float]]) -> None:
    """Writes a table atomically; a cell is empty where a row has no such value.

    For stages that train, which would import pandas, the readers' own way, for this alone.
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path, *, made_by: str) -> Any:
    """Reads a JSON file; `made_by` names the stage that writes it, for the error message."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StudyError(
            "does not exist", where=str(path), remedy=f"run the stage that writes it: {repro(made_by)}"
        ) from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StudyError(
            f"is damaged: {error}",
            where=str(path),
            remedy=f"make it anew: {repro(made_by, again=True)}",
        ) from error


def read_sealed(path: Path, *, made_by: str) -> dict[str, Any]:
    """The values that `write_sealed` wrote.

    Raises:
        StudyError: the file is missing or damaged, or a value has been changed.
    """
    values = read_json(path, made_by=made_by)
    if not isinstance(values, dict) or values.pop(DIGEST, None) != fingerprint(values):
        raise StudyError(
            "is damaged: its digest is not that of its values",
            where=str(path),
            remedy=f"make it anew: {repro(made_by, again=True)}",
        )
    return values


def xxh3(path: Path) -> str:
    """64-bit xxh3 of a file's bytes, in hexadecimal: against damage, not against malice."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StudyError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            remedy="run the stage that makes it: dvc repro",
        ) from error


def fingerprint(value: Any) -> str:
    """A short hash of a JSON-like value, equal for equal values on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
