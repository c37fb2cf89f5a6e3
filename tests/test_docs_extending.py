"""docs/extending.md, done for real: its blocks applied to a copy of the code, and what they add looked at."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # one process that trains the tiny study

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"

# In the copy: what each section adds is used, and what is seen is printed.
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
import torch
import synthetic_records as synthetic
import tiny_study
from attention_transfer import config
from attention_transfer.data import shifts
from attention_transfer.layout import Layout
from attention_transfer.models import pretraining, vit
from attention_transfer.reporting import page
from safetensors.torch import load_file
from test_pretrain import SHARED

found, layout = {}, Layout("tiny")
tiny_study.METHODS["tune_norms"] = {"initial": "first"}
tiny_study.write_inputs(Path())
study = tiny_study.make_study("tune_norms")
weights, metrics = tiny_study.train(study)
teacher = load_file(layout.teacher_weights("first"))
found["moved"] = sorted(n for n, w in weights.items() if n in teacher and not torch.equal(w, teacher[n]))
found["kept"] = sorted(n for n, w in weights.items() if n in teacher and torch.equal(w, teacher[n]))
found["loss"] = metrics

study = tiny_study.make_study("scratch", {"teachers.first": {"kind": "rotation", **SHARED}})
this = tiny_study.InMemory(
    "pretrain", {"teacher": "first"}, study, Path("params.yaml"), tiny_study.PIPELINE / "pretrain.py", layout
)
tiny_study.script("pretrain").main(this)
found["rotation"] = this.metrics
params = study.teachers["first"]
arguments = vit.model_arguments(params.architecture, image_size=8, channels=1, classes=0)
model = pretraining.build(params, arguments, steps=1).eval()
images = torch.rand(3, 1, 8, 8)
found["rotation"]["loss"] = model(images).item()
logs = []
for image in images:
    for turns in range(4):
        turned = torch.from_numpy(np.rot90(image.numpy(), turns, axes=(1, 2)).copy())
        logs.append(model.head(model.encoder(turned[None])).double().softmax(1)[0, turns].log().item())
found["rotation"]["expected"] = -float(np.mean(logs))

images = np.random.default_rng(0).integers(0, 256, (2, 1, 16, 16), dtype=np.uint8)
found["negative"] = [shifts.corrupt(images, "negative", severity, seed=0).tolist() for severity in (1, 5)]
found["clean"] = images.tolist()
found["listed"] = "negative" in config.SHIFTS

made = synthetic.study(evaluation__severities=(1,), evaluation__shifts=("fog",))
metrics, artifacts = synthetic.write(Path("synthetic"), made)
page.build(made, metrics, artifacts, Path("out"))
print("@" + json.dumps(found))
"""


def changes() -> list[tuple[str, list[tuple[str, str]]]]:
    """Of each block its file and hunks: text that is there, and what comes in its place."""
    blocks = re.findall(r"(?ms)^```diff (\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"))
    return [
        (
            file,
            [
                tuple(
                    "".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[0] in kept)
                    for kept in (" -", " +")
                )
                for hunk in text.split("@@\n")
            ],  # type: ignore[misc]
        )
        for file, text in blocks
    ]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code with all that the page adds."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("src", "pipeline", "docs", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file, hunks in changes():
        path = root / file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for old, new in hunks:
            assert not old or text.count(old) == 1, f"{file} has not once:\n{old}"
            text = text.replace(old, new) if old else text + new
        path.write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def found(copy: Path) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy / 'tests'}",
        "ATTENTION_TRANSFER_DEVICE": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen: dict[str, Any] = json.loads(done.stdout.rpartition("@")[2])
    return seen


def test_a_method_trains_what_it_says(found: dict[str, Any]) -> None:
    assert found["moved"]
    assert all("norm" in name for name in found["moved"])
    assert any("qkv" in name for name in found["kept"])
    assert not [name for name in found["kept"] if re.search(r"norm\d", name)]
    assert 0 <= found["loss"]["validation_accuracy"] <= 1


def test_a_kind_of_teacher_is_pretrained(found: dict[str, Any]) -> None:
    assert 0 < found["rotation"]["pretraining_loss"] < 3
    assert found["rotation"]["steps"] > 0
    assert found["rotation"]["loss"] == pytest.approx(found["rotation"]["expected"], rel=1e-5)


def test_a_shift_changes_the_images_as_it_says(found: dict[str, Any]) -> None:
    import numpy as np

    clean = np.array(found["clean"])
    weak, strong = map(np.array, found["negative"])
    assert found["listed"]
    np.testing.assert_array_equal(strong, 255 - clean)
    np.testing.assert_allclose(weak, 0.4 * clean + 0.6 * (255 - clean), atol=0.6)


def test_a_figure_is_on_the_page(found: dict[str, Any], copy: Path) -> None:
    caption = "Accuracy on the two sets of images, a point for each student."
    assert caption in (copy / "out" / "report.html").read_text(encoding="utf-8")
    assert caption in (copy / "out" / "report.md").read_text(encoding="utf-8")
    for ending in ("svg", "png"):
        assert (copy / "out" / "figures" / f"validation.{ending}").stat().st_size > 1000


def test_what_is_added_keeps_the_style_of_the_house(copy: Path) -> None:
    """Lint, format, and the page of keys."""
    files = sorted({file for file, _ in changes()})
    for command in (("check",), ("format", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml"), *files],
            cwd=copy, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    subprocess.run([sys.executable, "docs/params.py"], cwd=copy, check=True)
    text = (copy / "docs" / "params.md").read_text(encoding="utf-8")
    assert "### kind: rotation" in text
    assert "`tune_norms`" in text
    assert "`negative`" in text
