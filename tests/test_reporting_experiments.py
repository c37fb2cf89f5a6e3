"""Experiments in the report: contrasts against hand-made numbers, tables, and the page that holds them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic_records as synthetic
from scipy import stats

from attention_transfer import config
from attention_transfer.commands import show_experiment
from attention_transfer.config import Study
from attention_transfer.errors import StudyError
from attention_transfer.reporting import claims, contrasts, experiments, page
from attention_transfer.reporting.contrasts import Contrast, difference, judge, mean_of, slope
from attention_transfer.reporting.experiment_claims import CONTRASTS
from attention_transfer.reporting.records import load

FULL = Path(__file__).parents[1] / "presets" / "full.yaml"
MARGIN = 0.01


def judged(contrast: Contrast, values: Mapping[str, Mapping[int, float]]) -> contrasts.Judged:
    found, untested = judge([contrast], lambda run: values.get(run, {}), margin=MARGIN, confidence=0.95)
    assert untested == {}
    return found[0][1]


def of(rule: contrasts.Rule) -> Contrast:
    return Contrast("x/y", "claim", "published", difference("a", "b"), rule)


@pytest.mark.parametrize(
    ("rule", "effect", "verdict"),
    [
        ("above", 0.02, "supported"),
        ("above", -0.02, "contradicted"),
        ("above", 0.0005, "not resolved"),
        ("below", -0.02, "supported"),
        ("below", 0.02, "contradicted"),
        ("below", -0.0005, "not resolved"),
        ("not below", 0.02, "supported"),
        ("not below", -0.004, "supported"),
        ("not below", -0.02, "contradicted"),
        ("not below", -0.0105, "not resolved"),
        ("equal", 0.004, "supported"),
        ("equal", -0.004, "supported"),
        ("equal", 0.02, "contradicted"),
        ("equal", -0.02, "contradicted"),
        ("equal", 0.0095, "not resolved"),
    ],
)
def test_a_verdict_follows_its_rule(rule: contrasts.Rule, effect: float, verdict: str) -> None:
    noise = (-0.001, 0.0, 0.001)
    a = {seed: 0.8 + effect + noise[seed] for seed in range(3)}
    found = judged(of(rule), {"a": a, "b": dict.fromkeys(range(3), 0.8)})
    assert found.verdict == verdict
    assert found.effect.mean == pytest.approx(effect)


def test_the_effect_is_paired_over_the_seeds_that_all_runs_have() -> None:
    generator = np.random.default_rng(0)
    values = {run: dict(enumerate(generator.normal(0.8, 0.02, 5))) for run in "ab"}
    del values["a"][4], values["b"][0]
    found = judged(of("above"), values)
    assert found.seeds == (1, 2, 3)
    differences = [values["a"][seed] - values["b"][seed] for seed in (1, 2, 3)]
    low, high = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
    assert (found.effect.low, found.effect.high) == pytest.approx((low, high))


def test_one_seed_resolves_nothing_and_none_is_said() -> None:
    found = judged(of("above"), {"a": {0: 0.9}, "b": {0: 0.1, 1: 0.2}})
    assert found.verdict == "not resolved"
    _, untested = judge(
        [of("above")], lambda run: {"a": {0: 0.9}, "b": {1: 0.1}}[run], margin=0.01, confidence=0.9
    )
    assert untested == {"x/y": "its runs have no seed in common"}
    _, untested = judge([of("above")], lambda run: {}, margin=0.01, confidence=0.9)
    assert untested == {"x/y": "the study has no run a, b"}


@pytest.mark.parametrize("rule", ["above", "below", "not below", "equal"])
def test_runs_that_are_one_kind_of_student_tell_nothing_about_a_direction(rule: contrasts.Rule) -> None:
    """As copying students with and without a norm of queries and keys, which they do not have."""
    same = {0: 0.8, 1: 0.7, 2: 0.9}
    found, untested = judge([of(rule)], {"a": same, "b": same}.__getitem__, margin=MARGIN, confidence=0.95)
    if rule in ("above", "below"):
        assert found == []
        assert untested == {"x/y": "its runs have the same accuracy with every seed"}
    else:
        assert [each.verdict for _, each in found] == ["supported"]
        assert untested == {}


def test_a_slope_is_that_of_least_squares() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=6)
    weights = slope([f"r{n}" for n in range(6)])
    found = sum(weights[f"r{n}"] * values[n] for n in range(6))
    assert found == pytest.approx(np.polyfit(np.arange(1, 7), values, 1)[0])


def test_a_mean_of_contrasts() -> None:
    assert mean_of([difference("a", "b"), difference("a", "c")]) == {"a": 1.0, "b": -0.5, "c": -0.5}


def test_weights_that_do_not_cancel_are_refused() -> None:
    with pytest.raises(ValueError, match="not to 0"):
        Contrast("x/y", "", "", {"a": 1.0, "b": -0.5}, "above")


def test_a_formula_names_its_runs() -> None:
    assert of("above").formula == "a − b"
    half = Contrast("x/y", "", "", {"a": 1.0, "b": -0.5, "c": -0.5}, "above")
    assert half.formula == "a − 0.5 b − 0.5 c"


def test_every_contrast_is_of_runs_that_the_full_study_has() -> None:
    study, found = config.load(FULL), config.experiments(FULL)
    runs = {*study.runs, *(run for experiment in found.values() for run in experiment.runs)}
    unknown = {run for contrast in CONTRASTS for run in contrast.weights} - runs
    assert unknown == set()
    assert len({contrast.id for contrast in CONTRASTS}) == len(CONTRASTS)
    assert {contrast.section for contrast in CONTRASTS} == set(study.experiments)
    assert {contrast.id.split("/")[0] for contrast in CONTRASTS if contrast.part} == {"families"}
    assert set(experiments.HEADINGS) == set(study.experiments)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Study, Path, Path, dict[str, Study]]:
    study = synthetic.study()
    metrics, artifacts = synthetic.write(tmp_path, study)
    copy = load(study, metrics).values("accuracy", "copy")
    accuracy = {
        "copy_query": {seed: float(copy[seed]) - 0.002 * (seed + 1) for seed in (0, 1)},
        "copy_value": {seed: float(copy[seed]) - 0.05 + 0.001 * seed for seed in (0, 1)},
    }
    return study, metrics, artifacts, {"qkv": synthetic.write_experiment(study, accuracy, metrics, "qkv")}


def test_claims_of_an_experiment_beside_the_main_comparison(
    written: tuple[Study, Path, Path, dict[str, Study]],
) -> None:
    study, metrics, _, studies = written
    assert study.report is not None
    records, found = load(study, metrics), experiments.load(studies, metrics)
    made, untested = claims.of_experiments(records, found, study.report)
    assert untested == {}
    by_id = {claim.id: claim for claim in made}
    assert by_id["qkv/query"].effect.mean == pytest.approx(-0.003)
    assert by_id["qkv/value"].verdict == "supported"
    assert all(claim.exploratory and claim.effect.n == 2 for claim in made)
    table = experiments.table(found[0], records, study.report).frame.set_index("run")
    scratch = records.values("accuracy", "scratch")
    copy = records.values("accuracy", "copy")
    expected = np.mean([copy[seed] - 0.002 * (seed + 1) - scratch[seed] for seed in (0, 1)])
    assert table.loc["copy_query", "minus_scratch_mean"] == pytest.approx(expected)


@pytest.mark.slow  # it draws all figures
def test_the_page_has_a_section_for_each_experiment(
    written: tuple[Study, Path, Path, dict[str, Study]], tmp_path: Path
) -> None:
    study, metrics, artifacts, studies = written
    fixed = {"qkv/query": "0123456789abcdef", "qkv/value": None}
    page.build(
        study,
        metrics,
        artifacts,
        tmp_path / "report",
        params=Path("presets/synthetic.yaml"),
        experiments=studies,
        rules_fixed=fixed,
        ui={
            "main": {"synthetic: comparison": "http://here/#main", "synthetic: shift": "http://here/#shift"},
            "qkv": {"synthetic/qkv: comparison": "http://here/#qkv"},
        },
    )
    html = (tmp_path / "report" / "report.html").read_text()
    section = html[html.index('<section id="qkv">') :].partition("</section>")[0]
    assert "<code>make study STUDY=synthetic/qkv</code>" in section
    assert "Params, in <code>presets/synthetic/qkv.yaml</code>" in section
    assert '<a href="http://here/#qkv">synthetic/qkv: comparison</a>' in section
    main = html[html.index('<section id="main">') :].partition("</section>")[0]
    assert "<code>make study STUDY=synthetic</code>" in main
    assert "Params, in <code>presets/synthetic.yaml</code>" in main
    assert "http://here/#main" in main
    shift = html[html.index('<section id="shifts">') :].partition("</section>")[0]
    assert "http://here/#shift" in shift
    assert "http://here/#main" not in shift
    assert section.count('<span class="soft">exploratory</span>') == 2
    assert html.count('<span class="soft">exploratory</span>') > 2
    assert re.search(r'<a href="#claims-qkv">Queries, keys, values</a></th><td>[^/]*</td><td>', html)
    assert "copy_query − copy, paired by seed" in html
    assert '<code>qkv/query</code> <span class="soft">0123456789ab</span>' in html
    assert '<code>qkv/value</code> <span class="soft">commit not known</span>' in html
    text = (tmp_path / "report" / "report.md").read_text()
    part = text[text.index("## Queries, keys, values") :].partition("\n## ")[0]
    assert "Copying queries alone is at least as good" in part
    assert "Rule (0123456789ab): copy_query − copy" in part
    assert "To reproduce it: `make study STUDY=synthetic/qkv`; params: `presets/synthetic/qkv.yaml`." in part
    found: list[dict[str, Any]] = json.loads((tmp_path / "report" / "claims.json").read_text())
    assert {"qkv/query", "qkv/value", "main/copy"} <= {claim["id"] for claim in found}
    assert {claim["exploratory"] for claim in found if claim["experiment"] == "qkv"} == {True}
    assert {claim["exploratory"] for claim in found if claim["experiment"] == "main"} == {False}
    commits = {claim["id"]: claim["rule_commit"] for claim in found}
    assert (commits["qkv/query"], commits["qkv/value"]) == ("0123456789abcdef", None)
    page.build(study, metrics, artifacts, tmp_path / "report")
    assert 'id="qkv"' not in (tmp_path / "report" / "report.html").read_text()
    assert not (tmp_path / "report" / "tables" / "experiment_qkv.csv").exists()


def test_an_experiment_is_shown_by_itself(
    written: tuple[Study, Path, Path, dict[str, Study]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, metrics, _, studies = written
    there = metrics.parent / "there"
    (there / "metrics").mkdir(parents=True)
    (there / "metrics" / "synthetic").symlink_to(metrics)
    monkeypatch.chdir(there)
    name, experiment = next(iter(studies.items()))
    text = show_experiment.text(experiment)
    values = pd.read_csv(metrics / "evaluate" / name / "scores.csv").query("set == 'test'")
    for run, mean in (100 * values.groupby("run")["accuracy"].mean()).items():
        assert re.search(rf"^{run} +2 +{mean:.2f} \[", text, flags=re.MULTILINE), text
    with pytest.raises(StudyError, match=r"(?s)heads: has not been run.*studies/synthetic/heads/dvc\.yaml"):
        show_experiment.text(experiment.model_copy(update={"name": "synthetic/heads"}))


@pytest.mark.slow
def test_the_page_says_which_experiments_have_not_been_run(
    written: tuple[Study, Path, Path, dict[str, Study]], tmp_path: Path
) -> None:
    """Each can be run by itself: until then nobody needs the teachers that it alone uses."""
    study, metrics, artifacts, studies = written
    first = next(iter(study.teachers.values()))
    more = study.model_copy(update={"teachers": study.teachers | {"dino": first}})
    dino = study.runs["copy"].model_copy(update={"teacher": "dino"})
    later = {
        "pretraining": more.model_copy(update={"name": "synthetic/pretraining", "runs": {"copy_dino": dino}})
    }
    page.build(more, metrics, artifacts, tmp_path / "report", experiments=studies | later)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Queries, keys, values" in text
    assert "- 6, because the experiment pretraining has not been run\n" in text
    assert text.count("pretraining has not been run") == 1, "one line an experiment"
    assert not any(
        claim["experiment"] == "pretraining"
        for claim in json.loads((tmp_path / "report" / "claims.json").read_text())
    )
    assert "dino" not in (tmp_path / "report" / "tables" / "teachers.csv").read_text()
    with pytest.raises(StudyError, match="probe/dino"):  # nobody else's teacher may lack its record
        page.build(more, metrics, artifacts, tmp_path / "report", experiments=studies)


def test_a_teacher_that_was_not_probed_is_named(
    written: tuple[Study, Path, Path, dict[str, Study]], tmp_path: Path
) -> None:
    """An experiment's graph does without `probe`, so that its teachers may lack the record."""
    study, metrics, artifacts, studies = written
    more = study.model_copy(
        update={"teachers": study.teachers | {"dino": next(iter(study.teachers.values()))}}
    )
    runs = studies["qkv"].runs | {
        "copy_query": studies["qkv"].runs["copy_query"].model_copy(update={"teacher": "dino"})
    }
    ran = studies | {"qkv": studies["qkv"].model_copy(update={"runs": runs, "teachers": more.teachers})}
    page.build(more, metrics, artifacts, tmp_path / "report", experiments=ran)
    assert "The stage probe has not been run for dino." in (tmp_path / "report" / "report.md").read_text()
    assert "dino" not in (tmp_path / "report" / "tables" / "teachers.csv").read_text()


def test_a_missing_row_of_an_experiment_is_named(written: tuple[Study, Path, Path, dict[str, Study]]) -> None:
    _, metrics, _, studies = written
    more = {"qkv": studies["qkv"].model_copy(update={"seeds": (0, 1, 2)})}
    with pytest.raises(StudyError, match="has no test accuracy of run copy_query, seed 2"):
        experiments.load(more, metrics)
    path = metrics / "evaluate" / "qkv" / "scores.csv"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(StudyError, match=r"scores\.csv"):
        experiments.load(studies, metrics)
