"""run.json: it vouches for the files of its stage, and for itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attention_transfer import run_record
from attention_transfer.errors import StudyError

STAGE = "train@copy-0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stage's record, and one of its outputs elsewhere."""
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "metrics.json").write_text('{"accuracy": 0.75}')
    (tmp_path / "record" / "curve.csv").write_text("epoch\n1\n")
    (tmp_path / "maps.npz").write_bytes(b"maps")
    outputs = [tmp_path / "record" / "metrics.json", tmp_path / "record" / "curve.csv", tmp_path / "maps.npz"]
    run_record.write(tmp_path / "record", {"stage": "train", "seconds": 1.5}, outputs)
    return tmp_path / "record"


def test_a_whole_record_reads_as_written(folder: Path) -> None:
    values = run_record.read(folder, made_by=STAGE)
    assert {key: values[key] for key in ("stage", "seconds")} == {"stage": "train", "seconds": 1.5}
    run_record.require_whole(folder.parent / "maps.npz", values, made_by=STAGE)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "another": lambda path: path.write_text('{"accuracy": 0.99}'),
}


def require_all(folder: Path, path: Path, values: dict[str, Any]) -> None:
    run_record.read(folder, made_by=STAGE)
    run_record.require_whole(path, values, made_by=STAGE)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["metrics.json", "curve.csv", "run.json", "../maps.npz"])
def test_damage_is_found_and_named(file: str, damage: str, folder: Path) -> None:
    values = run_record.read(folder, made_by=STAGE)
    path = folder.parent / "maps.npz" if file.startswith("..") else folder / file
    DAMAGES[damage](path)
    with pytest.raises(StudyError, match="is damaged") as caught:
        require_all(folder, path, values)
    assert caught.value.where == str(path)
    assert f"remake {STAGE}" in caught.value.remedy


def test_a_missing_record_or_output_is_named(folder: Path) -> None:
    values = run_record.read(folder, made_by=STAGE)
    (folder.parent / "maps.npz").unlink()
    with pytest.raises(StudyError, match="does not exist"):
        run_record.require_whole(folder.parent / "maps.npz", values, made_by=STAGE)
    (folder / "run.json").unlink()
    with pytest.raises(StudyError, match="does not exist"):
        run_record.read(folder, made_by=STAGE)


def test_a_file_for_which_no_record_vouches_is_refused(folder: Path) -> None:
    (folder / "other.npz").write_bytes(b"")
    values = run_record.read(folder, made_by=STAGE)
    with pytest.raises(StudyError, match="was replaced"):
        run_record.require_whole(folder / "other.npz", values, made_by=STAGE)
