"""The way that docs/bring-your-own.md describes, command by command, on generated JPEGs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import prepared_study
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from test_commands_new import draw

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
COMMANDS = [
    line
    for block in re.findall(
        r"(?ms)^```\n(.*?)^```", (ROOT / "docs/bring-your-own.md").read_text(encoding="utf-8")
    )
    for line in block.splitlines()
    if line.startswith(("python", "make"))
]
PRESET = Path("presets/flowers.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with what a study needs, a folder of images, and a teacher."""
    root = tmp_path_factory.mktemp("flowers")
    for name in (
        "dvc.yaml",
        "where.yaml",
        "params.yaml",
        ".gitignore",
        ".dvcignore",
        "Makefile",
        "requirements.lock",
        "pyproject.toml",
    ):
        shutil.copy(ROOT / name, root)
    for name in ("pipeline", "src"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "presets").mkdir()
    for split, count in (("train", 40), ("test", 10)):
        draw(root / "data/flowers", split, count)
    sizes = {"img_size": 36, "patch_size": 12, "embed_dim": 24, "depth": 2, "num_heads": 12}
    save_file(
        timm.models.VisionTransformer(**sizes, num_classes=0).state_dict(), root / "data/teacher.safetensors"
    )
    run(root, "git init -q")
    run(root, "python -m dvc init -q")
    run(root, "python -m dvc config core.analytics false")
    return root


def run(folder: Path, command: str) -> str:
    """What a command says, which must succeed. Of make, what it would run once everything is set up."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "src"),
        "ATTENTION_TRANSFER_DEVICE": "cpu",
        "ATTENTION_TRANSFER_THREADS": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    answer = subprocess.run(
        shlex.split(command),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert answer.returncode == 0, f"{command}\n{answer.stdout[-3000:]}\n{answer.stderr[-3000:]}"
    return answer.stdout


def make(folder: Path, command: str) -> str:
    """Runs what `make` would once everything is set up, but for the plan, which has been made.

    The stages run as forks first, which takes a quarter of DVC's time, so that DVC finds them done.
    """
    lines = run(folder, command.replace("make", "make --dry-run", 1)).splitlines()
    steps = [line for line in lines if line.startswith("python -m attention_transfer")]
    assert [step.split()[3] for step in steps] == ["check", "plan", "run", "show"]
    check, _, stages, show = steps
    run(folder, check)
    run(folder, f"python {ROOT / 'tests/prepared_study.py'} {PRESET}")
    run(folder, stages)
    assert run(folder, f"dvc status {prepared_study.graph(PRESET)}").strip() == (
        "Data and pipelines are up to date."
    )
    return run(folder, show)


def shorten(folder: Path) -> None:
    """Seconds in place of minutes: the numbers then mean nothing."""
    values: dict[str, Any] = yaml.safe_load((folder / PRESET).read_text(encoding="utf-8"))
    values |= {"seeds": [0, 1]}
    values["data"] |= {"labelled": 30, "validation": 24}
    values["views"]["per_image"] = 2
    values["training"] |= {"curve_images": 24, "validate_every": 2}
    values["evaluation"] |= {"shifts": ["contrast"], "severities": [1], "shift_images": 9, "bootstrap": 50}
    for each in values["runs"].values():
        each |= {"epochs": 2, "warmup_epochs": 1, "batch_size": 10}
    (folder / PRESET).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def test_the_whole_way(folder: Path) -> None:
    first, own_teacher, *others = COMMANDS
    run(folder, first)
    assert yaml.safe_load((folder / PRESET).read_text())["teachers"]["teacher"]["kind"] == "mae"
    (folder / PRESET).unlink()
    shutil.rmtree(folder / "studies")
    run(folder, own_teacher)
    shorten(folder)
    said = {command: (make if command.startswith("make") else run)(folder, command) for command in others}
    assert [command.split()[3] if "python" in command else "make" for command in said] == [
        *("check", "plan", "make", "report", "export")
    ]
    report = " ".join((folder / "reports/flowers/report.md").read_text(encoding="utf-8").split())
    assert "Of the test images, training from scratch gets" in report
    answers = (
        "Where the teacher looks, copied at every pass, is worth",
        "fine-tuning is not shown to differ from training from scratch",
    )
    assert any(answer in report for answer in answers), report[:3000]
    assert "\ndistill  " in said["make study STUDY=flowers"]
    model = timm.create_model(f"local-dir:{folder}/exports/flowers/distill-0", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["daisy", "rose", "tulip"]
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 36, 36)).shape == (2, 3)
