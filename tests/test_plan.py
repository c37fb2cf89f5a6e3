"""What is cached, what it takes on disk, and what of params.yaml training depends on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_transfer import plan
from attention_transfer.assembly import Parts
from attention_transfer.config import Study
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout
from attention_transfer.teaching import teacher_source
from attention_transfer.transfer import cache
from attention_transfer.transfer.cache_size import exact_bytes
from attention_transfer.transfer.method import Needs
from attention_transfer.transfer.teacher_source import CachedTeacher, OnlineTeacher

TINY = Layout("tiny")
ENOUGH, TOO_LITTLE = 1.0, 1e-6  # GB


@pytest.mark.parametrize("source", ["cache", "online"])
@pytest.mark.parametrize("wanted", [0, 10**15])
def test_a_choice_made_in_params_stands(source: Any, wanted: int) -> None:
    assert plan.choose(source, wanted=wanted, budget=1e9) == plan.Choice(source, "params.yaml says so")


def test_auto_is_the_cache_up_to_the_budget() -> None:
    fits, over = (plan.choose("auto", wanted=wanted, budget=1e9) for wanted in (10**9, 10**9 + 1))
    assert (fits.source, over.source) == ("cache", "online")
    assert str(fits) == "cache: the training views, 1 GB, fit attention.budget_gb, 1 GB"
    assert str(over).startswith("online: the training views would take 1 GB, more than attention.budget_gb")


def auto(**changes: Any) -> Study:
    return tiny_study.make_study("distill", {"attention.source": "auto", **changes})


@given(
    labelled=st.integers(8, 10**7), views=st.integers(1, 1000), budget=st.floats(1e-6, 1e6, exclude_min=True)
)
def test_what_auto_caches_is_never_refused_for_its_size(labelled: int, views: int, budget: float) -> None:
    study = auto(**{"data.labelled": labelled, "views.per_image": views, "attention.budget_gb": budget})
    row = plan.teacher_layout(study, "first")
    chosen = plan.attention_source(study, "first").source

    def size(budget_bytes: float | None) -> cache.Plan:
        return cache.plan(
            labelled * views, row, budget_bytes=budget_bytes, free_bytes=10**18, where=Path("here")
        )

    if chosen == "cache":
        assert size(budget * 1e9) == size(None)
    else:
        with pytest.raises(StudyError, match=r"budget_gb"):
            size(budget * 1e9)


def test_auto_looks_at_nothing_that_may_be_added_later() -> None:
    """Another run, seed or teacher, or a longer schedule, moves no trained student to the other source."""
    for budget in (ENOUGH, 2e-4, TOO_LITTLE):
        study = auto(**{"attention.budget_gb": budget})
        values = study.model_dump()
        before = plan.attention_source(study, "first")
        values["seeds"] = (0, 1, 2)
        values["runs"]["another"] = {**values["runs"]["run"], "epochs": 999}
        values["teachers"]["large"] = {
            "kind": "untrained",
            "seed": 0,
            "architecture": {"patch_size": 1, "width": 2048, "depth": 24, "heads": 16, "mlp_ratio": 4.0},
        }
        grown = Study.model_validate(values)
        assert plan.attention_source(grown, "first") == before
        assert plan.attention_source(grown, "large").source == ("cache" if budget == ENOUGH else "online")


def test_views_that_no_run_shows_are_named() -> None:
    assert plan.unread_views(auto(**{"views.per_image": 3, "runs.run.epochs": 3})) == ""
    assert "3 gives the same training images" in plan.unread_views(
        auto(**{"views.per_image": 4, "runs.run.epochs": 3})
    )
    assert plan.unread_views(tiny_study.make_study("scratch", {"views.per_image": 9})) == ""


def test_room_is_checked_for_what_is_cached_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"attention.budget_gb": TOO_LITTLE}
    plan.check_room(auto(**small), TINY, Path("params.yaml"))
    with pytest.raises(StudyError, match=r"allows 1000 bytes"):
        plan.check_room(
            tiny_study.make_study("distill", {"attention.source": "cache", **small}), TINY, Path("p")
        )


def test_images_are_counted_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan.image_counts(TINY) == (60_000, 10_000, False)
    tiny_study.write_inputs(tmp_path)
    assert plan.image_counts(TINY) == (60, 12, True)


ROWS = st.integers(1, 70)
LAYOUTS = st.builds(
    cache.Layout,
    layers=st.integers(1, 12),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 20),
    head_dim=st.integers(1, 8),
    dtype=st.sampled_from(["float16", "float32"]),
)
RECIPES = st.dictionaries(
    st.text("abc", min_size=1, max_size=5), st.floats(-1, 1) | st.text("xyz") | st.integers()
)


@settings(deadline=None, max_examples=25)  # every file is fsynced
@given(rows=ROWS, layout=LAYOUTS, recipe=RECIPES, per_shard=st.integers(1, 80))
def test_bytes_are_those_of_the_files(
    rows: int,
    layout: cache.Layout,
    recipe: Mapping[str, Any],
    per_shard: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("cache") / "rows"
    keys = np.stack([np.arange(rows) * 12345, np.zeros(rows, np.int64)], axis=1)
    size = per_shard * layout.row_bytes
    with cache.CacheWriter(folder, layout=layout, recipe=recipe, keys=keys, shard_bytes=size) as writer:
        writer.write(torch.zeros(rows, *layout.shape))
    found = sum(path.stat().st_size for path in folder.iterdir())
    assert exact_bytes(rows, layout, recipe, shard_bytes=size) == found


class Told(tiny_study.InMemory):
    """A stage that keeps the params that it would record."""

    def run(
        self,
        *,
        params: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[], Mapping[str, float]],
        live: bool,
    ) -> None:
        self.params = dict(params)
        super().run(params=params, inputs=inputs, work=work, live=live)


def run_stage(name: str, study: Study, **instance: str) -> Told:
    script = tiny_study.PIPELINE / f"{name}.py"
    this = Told(name, instance, study, Path("params.yaml"), script, TINY)
    tiny_study.script(name).main(this)
    return this


def resolved(study: Study) -> dict[str, Any]:
    """What training depends on, after the stages `cache` and `resolve`."""
    run_stage("cache", study, teacher="first")
    run_stage("resolve", study, run="run")
    found: dict[str, Any] = json.loads(TINY.resolved("run").read_text())
    return found


@pytest.mark.parametrize(("budget", "source"), [(ENOUGH, "cache"), (TOO_LITTLE, "online")])
def test_training_depends_on_the_resolved_source(
    budget: float, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_study.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    study = auto(**{"attention.budget_gb": budget})
    found = resolved(study)
    assert found["attention"]["source"] == source
    parts = Parts(study, TINY, tiny_study.CPU)
    assert parts.attention_source("first") == source
    kind = CachedTeacher if source == "cache" else OnlineTeacher
    assert isinstance(teacher_source(parts, "run", "views", Needs("attention", (0,))), kind)
    written = {path.name for path in TINY.cache("first").iterdir() if path.is_dir()}
    assert written == ({"views", "validation"} if source == "cache" else set())
    # Said in so many words in params.yaml, it is the same: nothing that depends on this file runs again.
    said = tiny_study.make_study("distill", {"attention.source": source})
    assert resolved(said) == found


def test_the_record_says_which_source_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_study.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    recorded = run_stage("cache", auto(), teacher="first").params["attention"]
    assert recorded["source"] == "cache"
    assert recorded["because"] in capsys.readouterr().out
    assert recorded["because"].startswith("the training views, ")
