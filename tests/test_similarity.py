"""The stage `similarity`: what students see, against what their teacher and the fine-tuned student see."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_study
import torch

from attention_transfer.config import Report, Study
from attention_transfer.evaluation import attention_statistics, foreground
from attention_transfer.evaluation import similarity as measures
from attention_transfer.layout import Layout
from attention_transfer.models import students
from attention_transfer.models.attention import read
from attention_transfer.training import machine
from attention_transfer.transfer import methods

LAYOUT = Layout("tiny")
REPORT = Report(
    scratch="scratch",
    finetune="finetune",
    copied="copy",
    distilled="copy",
    attention_images=1,
    equivalence_margin=0.01,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_study.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "prepare", lambda: tiny_study.CPU)
    return tmp_path


def make_study(content: str = "queries_and_keys") -> Study:
    changes: dict[str, Any] = {"evaluation.sets": ("validation", "test"), "attention.content": content}
    study = tiny_study.make_study("scratch", changes)
    runs = {name: tiny_study.make_study(name).runs["run"] for name in ("scratch", "finetune", "copy")}
    runs["first_layer"] = runs["copy"].model_copy(update={"layers": (0,)})
    return study.model_copy(update={"runs": runs, "report": REPORT})


def save_students(study: Study) -> None:
    """Untrained ones; the fine-tuned student is its teacher with a head."""
    parts = tiny_study.make_parts(study)
    for seed, name in enumerate(study.runs):
        copied = methods.slimmed_layers(study, name)
        student = students.create(
            parts.student_arguments(name),
            seed=seed,
            drop_path=0.0,
            teacher=parts.teacher("first") if name == "finetune" else None,
            copied_layers=copied,
        )
        students.save(LAYOUT.student(name, 0), student, parts.student_arguments(name), copied)


def run_stage(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    this = tiny_study.InMemory(
        "similarity", {}, study, Path("params.yaml"), tiny_study.PIPELINE / "similarity.py", LAYOUT
    )
    this.record.mkdir(parents=True, exist_ok=True)
    tiny_study.script("similarity").main(this)
    layers, cka = (pd.read_csv(this.record / f"{name}.csv") for name in ("layers", "cka"))
    return layers.set_index(["run", "reference", "layer"]).sort_index(), cka


@pytest.mark.parametrize("content", ["queries_and_keys", "maps"])
def test_equal_models_are_alike_and_a_copied_map_is_the_teachers(content: str, folder: Path) -> None:
    study = make_study(content)
    save_students(study)
    layers, cka = run_stage(study)
    same = layers.loc["finetune", "teacher"]
    assert same["cka"].to_numpy() == pytest.approx(1.0, abs=1e-6)
    assert same["divergence"].to_numpy() == pytest.approx(0.0, abs=1e-6)
    copied = layers.loc["copy", "teacher"]
    assert copied["divergence"].to_numpy() == pytest.approx(0.0, abs=1e-5)  # within the number format
    assert (copied["cka"] < 0.999).all()  # other values: other features
    partly = layers.loc["first_layer", "teacher"]["divergence"]
    assert partly[0] == pytest.approx(0.0, abs=1e-5)
    assert partly[1] > 0.001
    scratch = layers.loc["scratch", "teacher"]
    assert (scratch["divergence"] > 0.001).all()
    assert (scratch["matched_divergence"] <= scratch["divergence"] + 1e-9).all()
    assert (scratch["divergence"] < math.log(2)).all()
    # The fine-tuned student is the teacher here, and no reference for itself.
    against = layers.loc["scratch", "finetune"]
    assert against["divergence"].to_numpy() == pytest.approx(scratch["divergence"].to_numpy(), abs=1e-6)
    assert ("finetune", "finetune") not in {(run, reference) for run, reference, _ in layers.index}
    assert len(cka) == (4 + 3) * tiny_study.DEPTH**2
    diagonal = cka[cka["layer"] == cka["reference_layer"]].set_index(["run", "reference", "layer"])["cka"]
    assert diagonal.sort_index().to_numpy() == pytest.approx(layers["cka"].sort_index().to_numpy(), abs=1e-6)


def test_a_fine_tuned_student_is_compared_with_that_of_another_seed(folder: Path) -> None:
    """How unlike two of them are by chance."""
    study = make_study()
    save_students(study)
    for name in study.runs:
        shutil.copytree(LAYOUT.student(name, 0), LAYOUT.student(name, 1))
    # The teacher with a head for one seed, the fresh model for the other.
    shutil.rmtree(LAYOUT.student("finetune", 1))
    shutil.copytree(LAYOUT.student("scratch", 0), LAYOUT.student("finetune", 1))
    layers, _ = run_stage(study.model_copy(update={"seeds": (0, 1)}))
    of = {seed: rows.drop(columns="seed") for seed, rows in layers.groupby("seed")}
    against_teacher = of[0].loc["scratch", "teacher"]
    for seed in (0, 1):
        same = of[seed].loc["finetune", "finetune"]
        assert same["cka"].tolist() == pytest.approx(against_teacher["cka"].tolist(), abs=1e-6)
        assert same["divergence"].tolist() == pytest.approx(against_teacher["divergence"].tolist(), abs=1e-6)


def test_features_and_maps_are_those_of_the_models_forward_pass(folder: Path) -> None:
    """Against features by timm's own extractor, and maps read in one batch."""
    study = make_study()
    save_students(study)
    parts = tiny_study.make_parts(study)
    images = parts.clean(parts.test.images)(range(12))
    student = students.load(LAYOUT.student("scratch", 0), made_by="train")
    features, maps = [], []
    for model in (student, parts.teacher("first")):
        with torch.no_grad(), read(model, range(tiny_study.DEPTH)) as found:
            streams = model.forward_intermediates(
                images, output_fmt="NLC", intermediates_only=True, norm=False
            )
        features.append([stream.mean(dim=1) for stream in streams])
        maps.append([found[layer].map() for layer in range(tiny_study.DEPTH)])
    layers, _ = run_stage(study)
    rows = layers.loc["scratch", "teacher"]
    expected = measures.cka_matrix(*features).diagonal().tolist()
    assert rows["cka"].tolist() == pytest.approx(expected, abs=1e-5)
    for layer, row in rows.iterrows():
        divergence = measures.head_divergence(maps[0][layer], maps[1][layer])
        assert row["divergence"] == pytest.approx(measures.unmatched(divergence), abs=1e-5)
        entropy = torch.special.entr(maps[0][layer]).sum(dim=-1).mean()
        assert row["entropy"] == pytest.approx(float(entropy), abs=1e-5)
        patch = study.architecture("scratch").patch_size
        shares = torch.from_numpy(foreground.shares(parts.test.images[:12], patch))
        looked = maps[0][layer].mean(dim=1, keepdim=True).float()  # of all heads together
        on = attention_statistics.attention_on(looked, shares, looked.shape[-1] - shares.shape[-1])
        assert row["on_objects"] == pytest.approx(float(on), abs=1e-2, nan_ok=True)


def test_a_search_that_reads_no_test_image_has_no_rows(folder: Path) -> None:
    study = tiny_study.make_study("scratch")
    save_students(study)
    layers, cka = run_stage(study)
    assert (len(layers), len(cka)) == (0, 0)
