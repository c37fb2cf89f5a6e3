"""Tables hold what the records say, for the runs that the study names and no other."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_records as synthetic
from hypothesis import given
from hypothesis import strategies as st
from synthetic_records import Numbers

from attention_transfer.config import Study
from attention_transfer.errors import StudyError
from attention_transfer.evaluation.statistics import Interval
from attention_transfer.files import write_sealed, xxh3
from attention_transfer.reporting import tables
from attention_transfer.reporting.records import Records, load

MAIN_COLUMNS = [
    *("run", "seeds", "accuracy_mean", "accuracy_low", "accuracy_high"),
    *("gap_recovered_mean", "gap_recovered_low", "gap_recovered_high"),
]


def records_of(tmp_path: Path, study: Study, numbers: Numbers | None = None) -> Records:
    return load(study, synthetic.write(tmp_path, study, numbers)[0])


def frames(records: Records) -> dict[str, pd.DataFrame]:
    assert records.study.report is not None
    return {table.name: table.frame for table in tables.build(records, records.study.report)}


def test_main_table_columns_order_and_definitions(tmp_path: Path) -> None:
    study = synthetic.study(runs=("copy", "scratch", "linear_probe", "distill", "finetune"))
    records = records_of(tmp_path, study)
    tables.write(tables.build(records, study.report), tmp_path / "out")
    main = pd.read_csv(tmp_path / "out" / "main.csv").set_index("run")
    assert [main.index.name, *main.columns] == MAIN_COLUMNS
    assert list(main.index) == list(study.runs)
    assert main["seeds"].tolist() == [3] * 5
    assert main.loc["scratch", MAIN_COLUMNS[5:]].tolist() == [0, 0, 0]
    assert main.loc["finetune", MAIN_COLUMNS[5:]].tolist() == [1, 1, 1]
    scores = pd.read_csv(tmp_path / "metrics" / "evaluate" / "scores.csv")
    by_run = scores[scores["set"] == "test"].groupby("run")["accuracy"]
    for run in study.runs:
        mean, half = (
            by_run.mean()[run],
            4.302653 * by_run.std()[run] / np.sqrt(3),
        )  # t of 2 degrees of freedom
        assert main.loc[run, "accuracy_mean"] == pytest.approx(mean, abs=1e-6)
        assert main.loc[run, "accuracy_low"] == pytest.approx(mean - half, abs=1e-6)


def test_unbounded_gap_gives_empty_cells(tmp_path: Path) -> None:
    numbers = Numbers(accuracy={"finetune": (0.80, 0.84, 0.88), "scratch": 0.84})
    records = records_of(tmp_path, synthetic.study(), numbers)
    tables.write([tables.main_table(records, records.study.report)], tmp_path / "out")
    [line] = [
        row for row in (tmp_path / "out" / "main.csv").read_text().splitlines() if row.startswith("copy")
    ]
    assert line.endswith(",,")
    assert "unbounded" in (tmp_path / "out" / "main.md").read_text()


def test_a_removed_run_vanishes(tmp_path: Path) -> None:
    """Its records still lie there; nothing may count them."""
    ensembles = {"pair": ("finetune", "distill"), "gone": ("finetune", "linear_probe")}
    full = synthetic.study(
        runs=("scratch", "finetune", "copy", "distill", "linear_probe"),
        seeds=(0, 1, 2, 3),
        ensembles=ensembles,
    )
    synthetic.write(tmp_path, full)
    less = synthetic.study(
        seeds=(0, 1, 2), ensembles={"pair": ("finetune", "distill")}, evaluation__shifts=("fog",)
    )
    found = frames(load(less, tmp_path / "metrics"))
    for name, frame in found.items():
        text = frame.to_csv()
        for gone in ("linear_probe", "gone", "rotate"):
            assert gone not in text, name
    assert found["main"]["seeds"].eq(3).all()
    assert found["ensembles"]["pairs"].tolist() == [3]
    assert found["time"].set_index("stage").loc["train", "instances"] == 4 * 3
    assert found["time"].set_index("stage").loc["train", "seconds"] == pytest.approx(12 * 12.5)


def test_teachers_table(tmp_path: Path) -> None:
    """One row a teacher of the study; what a removed one has left does not count."""
    study = synthetic.study()
    teachers = {"first": study.teachers["untrained"], **study.teachers}
    both = study.model_copy(update={"teachers": teachers})
    records = records_of(tmp_path, both)
    found = frames(records)["teachers"].set_index("teacher")
    assert found.index.tolist() == ["first", "untrained"]
    assert found["logistic_regression_accuracy"].tolist() == pytest.approx([0.6, 0.7])
    assert found["kind"].tolist() == ["untrained", "untrained"]
    assert tables.teachers_table(records).shown["effective rank"].tolist() == ["12.3", "12.3"]
    assert frames(load(study, tmp_path / "metrics"))["teachers"]["teacher"].tolist() == ["untrained"]


@pytest.mark.parametrize("value", [None, "high", float("nan")])
def test_a_probe_without_a_number_is_an_error(value: object, tmp_path: Path) -> None:
    study = synthetic.study()
    metrics, _ = synthetic.write(tmp_path, study)
    path = metrics / "probe" / "untrained" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"knn_accuracy": value}))
    (values := json.loads((path.parent / "run.json").read_text())).pop("digest")
    values["outputs"][path.name] = xxh3(path)
    write_sealed(path.parent / "run.json", values)
    with pytest.raises(StudyError, match="has no knn_accuracy"):
        load(study, metrics)


def test_similarity_table(tmp_path: Path) -> None:
    found = frames(records_of(tmp_path, synthetic.study()))["similarity"].set_index(["run", "reference"])
    assert found.loc[("copy", "teacher"), "cka_mean"] == pytest.approx(0.75)
    assert found.loc[("copy", "finetune"), "last_cka_mean"] == pytest.approx(0.25)
    assert found.loc[("scratch", "teacher"), "divergence_mean"] == pytest.approx(0.11)
    spread = 0.01 / 3**0.5 * 4.302653  # Student's t of two degrees of freedom
    assert found.loc[("scratch", "teacher"), "divergence_low"] == pytest.approx(0.11 - spread, rel=1e-5)
    assert found.loc[("finetune", "finetune"), "cka_mean"] == pytest.approx(0.8 * 0.75)  # of another seed
    assert found.loc[("copy", "teacher"), "on_objects_mean"] == pytest.approx(1.5)


def test_a_run_without_similarity_is_an_error(tmp_path: Path) -> None:
    study = synthetic.study()
    metrics, _ = synthetic.write(tmp_path, study)
    path = metrics / "similarity" / "layers.csv"
    table = pd.read_csv(path)
    synthetic.overwrite(path, table[(table["run"] != "copy") | (table["seed"] != 1)])
    with pytest.raises(StudyError, match="has no row for run copy, seed 1"):
        load(study, metrics)


def test_shifts_table(tmp_path: Path) -> None:
    records = records_of(tmp_path, synthetic.study(), Numbers(drop={"distill": 0.2}))
    shifts = frames(records)["shifts"].set_index(["run", "shift"])
    assert len(shifts) == 4 * (3 + 1)
    scores = pd.read_csv(tmp_path / "metrics" / "evaluate" / "scores.csv")
    fog = scores[(scores["run"] == "distill") & (scores["shift"] == "fog")]
    clean = scores[(scores["run"] == "distill") & (scores["set"] == "test")]
    row = shifts.loc[("distill", "fog")]
    assert row["accuracy_mean"] == pytest.approx(fog["accuracy"].mean())
    assert row["ece_mean"] == pytest.approx(fog["ece"].mean())
    assert row["drop_mean"] == pytest.approx(clean["accuracy"].mean() - fog["accuracy"].mean())
    assert row["drop_relative_to_finetune"] == pytest.approx(2, abs=0.1)
    assert shifts.loc[("finetune", "all"), "drop_relative_to_finetune"] == pytest.approx(1)
    means = shifts.loc["distill"].drop("all")["accuracy_mean"].mean()
    assert shifts.loc[("distill", "all"), "accuracy_mean"] == pytest.approx(means)


def test_recipes_stand_side_by_side(tmp_path: Path) -> None:
    recipes = frames(records_of(tmp_path, synthetic.study()))["recipes"].set_index("param")
    assert recipes.loc["learning_rate"].tolist() == ["0.001"] * 4
    assert recipes.loc["attention_loss.weight"].tolist() == ["", "", "", "3.0"]


def test_tables_follow_the_image_sets(tmp_path: Path) -> None:
    found = frames(records_of(tmp_path, synthetic.study(ensembles={}, evaluation__sets=("test",))))
    assert not {"ood", "shifts", "ensembles"} & set(found)


@pytest.mark.parametrize(
    ("record", "stage"),
    [
        ("train/copy/1/metrics.json", "train@copy-1"),
        ("train/copy/1/run.json", "train@copy-1"),
        ("train/copy/1/curve.csv", "train@copy-1"),
        ("similarity/layers.csv", "similarity"),
        ("probe/untrained/metrics.json", "probe@untrained"),
        ("evaluate/scores.csv", "evaluate"),
        ("evaluate/ood.csv", "evaluate"),
        ("evaluate/ensembles.csv", "evaluate"),
        ("evaluate/comparisons.csv", "evaluate"),
    ],
)
def test_a_missing_or_damaged_record_names_file_and_stage(tmp_path: Path, record: str, stage: str) -> None:
    study = synthetic.study()
    metrics, _ = synthetic.write(tmp_path, study)
    path = metrics / record
    content = path.read_text()
    for damage in ("", "{}" if record.endswith("run.json") else "no such column\n1\n"):
        path.write_text(damage)
        with pytest.raises(StudyError) as error:
            load(study, metrics)
        assert record in str(error.value)
        assert f"python -m attention_transfer remake {stage}" in str(error.value)
    path.unlink()
    with pytest.raises(StudyError) as error:
        load(study, metrics)
    assert record in str(error.value)
    assert f"dvc repro {stage}" in str(error.value)
    path.write_text(content)
    load(study, metrics)


@pytest.mark.parametrize("fault", ["missing", "twice", "nan"])
def test_faulty_rows_of_scores_are_named(tmp_path: Path, fault: str) -> None:
    study = synthetic.study()
    metrics, _ = synthetic.write(tmp_path, study)
    path = metrics / "evaluate" / "scores.csv"
    frame = pd.read_csv(path)
    row = (
        (frame["run"] == "copy") & (frame["seed"] == 2) & (frame["shift"] == "fog") & (frame["severity"] == 3)
    )
    assert row.sum() == 1
    if fault == "missing":
        frame = frame[~row]
    elif fault == "twice":
        frame = pd.concat([frame, frame[row]])
    else:
        frame.loc[row, "accuracy"] = np.nan
    synthetic.overwrite(path, frame)
    with pytest.raises(StudyError, match="run copy, seed 2, set shifts, shift fog, severity 3"):
        load(study, metrics)


def test_a_seed_without_detection_is_an_error(tmp_path: Path) -> None:
    study = synthetic.study()
    metrics, _ = synthetic.write(tmp_path, study)
    path = metrics / "evaluate" / "ood.csv"
    frame = pd.read_csv(path)
    synthetic.overwrite(path, frame[(frame["run"] != "copy") | (frame["seed"] != 1)])
    with pytest.raises(StudyError, match="run copy, seed 1"):
        load(study, metrics)


def test_stale_members_of_an_ensemble_are_not_used(tmp_path: Path) -> None:
    metrics, _ = synthetic.write(tmp_path, synthetic.study(ensembles={"pair": ("finetune", "copy")}))
    with pytest.raises(StudyError, match="ensemble pair of finetune and distill"):
        load(synthetic.study(ensembles={"pair": ("finetune", "distill")}), metrics)


def test_a_folder_without_training_is_an_error(tmp_path: Path) -> None:
    study = synthetic.study()
    metrics, _ = synthetic.write(tmp_path, study)
    shutil.rmtree(metrics / "train" / "distill")
    with pytest.raises(StudyError, match="train/distill/0"):
        load(study, metrics)


@pytest.mark.parametrize("text", ["a|b", "<b>x</b>", "[x](y)", "`x`", "two\nlines", "back\\slash|"])
def test_markdown_cells_stay_one_cell(text: str) -> None:
    shown = pd.DataFrame({"a": [text], "b": ["end"]})
    [_, _, row] = tables.markdown(tables.Table("t", "", shown, shown)).splitlines()
    unescaped = row.replace("\\\\", "").replace("\\|", "")
    assert unescaped.count("|") == 3
    assert "<" not in row
    assert "[x](" not in row


WORDS = "textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar"
ESCAPED = re.compile(rf"\\(?:{WORDS})\{{\}}|\\[&%$#_{{}}]|\$-\$|\$\^2\$")


@given(text=st.text(alphabet="ab \\&%$#_{}~^<>|−²–’\n", max_size=12))
def test_latex_cells_stay_one_cell(text: str) -> None:
    """What is left when every escape is taken away has no character that means something to LaTeX."""
    escaped = tables.escape_latex(text)
    assert not set(ESCAPED.sub("", escaped)) & set("\\&%$#_{}~^<>|\n")
    assert escaped.isascii()


def test_a_latex_table_has_a_row_for_each_row(tmp_path: Path) -> None:
    study = synthetic.study()
    metrics, _ = synthetic.write(tmp_path, study)
    assert study.report is not None
    for table in tables.build(load(study, metrics), study.report):
        lines = tables.latex(table).splitlines()
        rules = [lines.index(rf"\{name}rule") for name in ("top", "mid", "bottom")]
        body = lines[rules[1] + 1 : rules[2]]
        assert len(body) == len(table.shown)
        for line in (lines[rules[0] + 1], *body):
            assert line.endswith(r"\\")
            assert len(re.findall(r"(?<!\\)&", line)) == table.shown.shape[1] - 1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, tables.LATEX_ROWS + 30])
def test_latex_sets_a_table_within_the_text(rows: int, tmp_path: Path) -> None:
    program = shutil.which("pdflatex")
    if program is None:
        pytest.skip("no LaTeX: install texlive-latex-recommended")
    cells = {
        f"a long name of column {n}, %": [f"−{n}.25 [−1.00, {row}.00]" for row in range(rows)]
        for n in range(9)
    }
    shown = pd.DataFrame({"run_name & more": [f"run_{row} <{{~^" for row in range(rows)]} | cells)
    (tmp_path / "table.tex").write_text(
        tables.latex(
            tables.Table("wide", "R² of 100 % – of_all", shown, shown if rows < 9 else shown.iloc[:, :4])
        )
    )
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,graphicx,longtable}"
        "\\begin{document}\\input{table}\\end{document}"
    )
    answer = subprocess.run(
        [program, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout[-2000:]
    assert "Overfull" not in answer.stdout
    assert f"({1 if rows < 9 else 2} page" in answer.stdout


def test_a_difference_that_rounds_to_zero_has_no_sign() -> None:
    assert tables.per_cent(Interval(-2e-5, -0.0017, 0.0017, 5)) == "0.00 [−0.17, 0.17]"
