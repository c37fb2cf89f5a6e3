"""The tiny study after its stages have run, records included: something to export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tiny_study import ARCHITECTURE, METHODS, PIPELINE, RECIPE, make_study, script, write_inputs

from attention_transfer import stage
from attention_transfer.config import Study
from attention_transfer.files import write_sealed
from attention_transfer.layout import Layout


def study() -> Study:
    """Of two seeds: Attention Distill and Copy, and a run without a teacher that has most components."""
    parts = ("rotary", "swiglu", "registers", "pre_norm", "qk_norm", "layer_scale")
    runs: dict[str, Any] = {
        name: {"method": name, "teacher": "first", **RECIPE, **METHODS[name]} for name in ("distill", "copy")
    }
    runs["many"] = {
        **{"method": "scratch", "teacher": "first", **RECIPE},
        "architecture": ARCHITECTURE | {"components": parts},
    }
    changes = {"runs": runs, "seeds": (0, 1), "evaluation.sets": ("validation", "test")}
    return make_study("scratch", changes)


@dataclass
class Unshown(stage.Stage):
    """A stage that leaves its records, and shows nothing in MLflow."""

    def run(
        self,
        *,
        params: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[], Mapping[str, Any]],
        live: bool,
        patience: float = 0.0,
    ) -> None:
        super().run(params=params, inputs=inputs, work=work, live=False)


def build(folder: Path) -> Study:
    """Runs the stages from the training to the evaluation in a folder; gives the study, which params.yaml holds."""
    made = study()
    (folder / "params.yaml").write_text(
        yaml.safe_dump(made.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
    )
    layout = Layout.of(made)
    with contextlib.chdir(folder):
        write_inputs(Path())
        run("shifts", made)
        run("finetuned", made)
        for name in made.runs:
            write_sealed(layout.resolved(name), {})
        for name, seed in made.grid:
            run("train", made, {"run": name, "seed": seed})
            run("predict", made, {"run": name, "seed": seed})
        run("evaluate", made)
    return made


def run(name: str, made: Study, instance: Mapping[str, Any] | None = None) -> None:
    """One stage, in this process."""
    file = PIPELINE / f"{name}.py"
    script(name).main(Unshown(name, dict(instance or {}), made, Path("params.yaml"), file, Layout.of(made)))
