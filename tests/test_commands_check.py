"""`check`: what it notes about a study whose teachers have been made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from test_data_layouts import jpeg

from attention_transfer.commands import check

PRESET = Path(__file__).parents[1] / "presets/smoke.yaml"
PARAMS = Path("own.yaml")
RECORD = Path("metrics/own/pretrain/mae/metrics.json")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three images on which the study's teacher has been pre-trained."""
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(PRESET.read_text(encoding="utf-8")) | {"name": "own"}
    values["teachers"]["mae"]["images"] = "data/photographs"
    PARAMS.write_text(yaml.safe_dump(values), encoding="utf-8")
    for number in range(3):
        jpeg(Path(f"data/photographs/{number}.jpg"), number)
    RECORD.parent.mkdir(parents=True)
    RECORD.write_text(json.dumps({"images": 3}), encoding="utf-8")
    return Path("data/photographs")


def test_images_that_came_after_the_teacher_are_told(images: Path) -> None:
    assert check.examine(PARAMS)["notes"] == []
    jpeg(images / "late/4.jpg", 4)
    [note] = check.examine(PARAMS)["notes"]
    assert note.startswith(
        "teachers.mae.images: data/photographs holds 4 images, 3 when the teacher was pre-trained"
    )
    assert "dvc repro -f -s dvc.yaml:pretrain@mae, then run the study" in note
    for name in ("0.jpg", "late/4.jpg"):
        (images / name).unlink()
    [note] = check.examine(PARAMS)["notes"]
    assert "holds 2 images, 3 when" in note


def test_a_teacher_that_is_made_needs_no_images_and_one_to_be_made_is_not_counted(images: Path) -> None:
    moved = images.rename("elsewhere")
    assert check.examine(PARAMS)["notes"] == []
    moved.rename(images)
    (images / "0.jpg").unlink()
    RECORD.unlink()
    assert check.examine(PARAMS)["notes"] == []
