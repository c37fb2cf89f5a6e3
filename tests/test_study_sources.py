"""Cached and online attention on real images: final accuracies. Beside test_study.py, on another worker."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny_study
import yaml

from attention_transfer import config
from attention_transfer.files import write_sealed
from attention_transfer.layout import Layout

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PRESET = Path("smoke.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, warm_path: str) -> Path:
    """The smoke study's images, teacher and cache."""
    root = tmp_path_factory.mktemp("sources")
    shutil.copy(ROOT / "presets" / "smoke.yaml", root / PRESET)
    shutil.copytree(ROOT / "data", root / "data", dirs_exist_ok=True)
    environment = {
        **os.environ,
        "PATH": warm_path,
        "PYTHONPATH": str(ROOT / "src"),
        "ATTENTION_TRANSFER_DEVICE": "cpu",
        "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db",
    }
    for stage, *arguments in (
        ("data",),
        ("split",),
        ("pretrain", "--teacher", "mae"),
        ("cache", "--teacher", "mae"),
    ):
        done = subprocess.run(
            [
                "/usr/bin/env",
                "python",
                str(ROOT / "pipeline" / f"{stage}.py"),
                "--params",
                str(PRESET),
                *arguments,
            ],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("method", ["copy", "distill"])
def test_cached_and_online_training_end_within_the_spread_of_seeds(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, with a schedule that teaches."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ATTENTION_TRANSFER_DEVICE", "cpu")
    values = yaml.safe_load(PRESET.read_text(encoding="utf-8"))
    values["training"]["validate_every"] = 60
    values["runs"][method] |= {"epochs": 60, "learning_rate": 0.003, "batch_size": 20}
    write_sealed(Layout("smoke").resolved(method), {})  # what `resolve` writes, of which only the hash counts
    accuracy = {}
    for source in ("cache", "online"):
        values["attention"]["source"] = source
        written = Path(f"{method}-{source}.yaml")
        written.write_text(yaml.safe_dump(values), encoding="utf-8")
        params = config.load(written)
        accuracy[source] = [
            tiny_study.run_train(params, Layout("smoke"), method, seed)["validation_accuracy"]
            for seed in (0, 1, 2)
        ]
    spread = max(accuracy["cache"]) - min(accuracy["cache"])
    assert min(accuracy["cache"]) > 0.4  # ten classes: it has learnt
    assert spread > 0
    for cached, online in zip(accuracy["cache"], accuracy["online"], strict=True):
        assert abs(cached - online) <= spread, accuracy
