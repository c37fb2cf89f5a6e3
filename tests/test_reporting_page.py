"""The report as a whole: files, safety of the page, what it must say and must not."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import synthetic_records as synthetic
from PIL import Image
from synthetic_records import Numbers

from attention_transfer.config_runs import Method
from attention_transfer.errors import StudyError
from attention_transfer.reporting import figures, page
from attention_transfer.reporting.records import load

HOSTILE = "<script>alert(1)</script>\"'|&"
FIGURES = (
    *("main", "learning_curves", "ensembles", "ensemble_matrix"),
    *("shift_severity", "shift_scatter", "contact_sheet", "attention_maps", "cka", "divergence"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all sections, from records with hostile texts."""
    root = tmp_path_factory.mktemp("report")
    study = synthetic.study(
        evaluation__severities=(1, 5), evaluation__shifts=("fog", "jpeg"), data__source=HOSTILE
    )
    metrics, artifacts = synthetic.write(root, study, Numbers(version=HOSTILE, revision=HOSTILE))
    out = root / "out"
    (out / "figures").mkdir(parents=True)
    (out / "figures" / "of_an_earlier_report.png").write_bytes(b"old")
    page.build(study, metrics, artifacts, out)
    return out


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert not tags.open
    return tags


@pytest.mark.slow
def test_the_page_needs_no_network_and_no_other_file_to_be_seen(report: Path) -> None:
    html = (report / "report.html").read_text()
    tags = parse(html)
    assert not {"link", "iframe", "object"} & tags.seen
    sources = [value for _, key, value in tags.attributes if key in ("src", "srcset", "data", "poster")]
    assert len(sources) == len(FIGURES)
    assert all(source.startswith("data:image/") for source in sources)
    assert not [value for _, key, value in tags.attributes if key == "href" and "//" in value]
    assert "default-src 'none'" in html, (
        "the browser keeps it from asking for anything; a test in a browser sees to that"
    )
    assert len(html.encode()) < 8e6
    assert len(
        [value for tag, key, value in tags.attributes if (tag, key) == ("img", "alt") and value]
    ) == len(FIGURES)
    ids = [value for _, key, value in tags.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


@pytest.mark.slow
def test_links_lead_somewhere(report: Path) -> None:
    tags = parse((report / "report.html").read_text())
    anchors = {value for _, key, value in tags.attributes if key == "id"}
    targets = [value for tag, key, value in tags.attributes if (tag, key) == ("a", "href")]
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors
        elif target != "../tune/" and "://" not in target:
            assert (report / target).exists(), target
    for target in re.findall(r"\]\(([^)]*)\)", (report / "report.md").read_text()):
        assert target == "../tune/" or (report / target).exists(), target


@pytest.mark.slow
def test_text_from_records_and_params_is_escaped(report: Path) -> None:
    html = (report / "report.html").read_text()
    assert html.count("&lt;script&gt;alert(1)") >= 3, "source, version and revision are shown"
    for name in ("report.html", "report.md"):
        assert "<script>alert" not in (report / name).read_text()


@pytest.mark.slow
def test_the_page_says_what_it_must(report: Path) -> None:
    for name in ("report.html", "report.md"):
        text = " ".join((report / name).read_text().split())
        for words in (
            "draw of the labelled images fixed",
            "last epoch",
            "validation split",
            "reports/tune/",
            "over layers: sum",
            "weight 3.",
            "Attention source",
            "dvc repro",
            "published: ImageNet-1K, ViT-L/16, MAE: accuracy, %",
            "77.8",
            "86.3",
        ):
            assert words in text, (name, words)
        assert "Not tested" not in text


@pytest.mark.slow
def test_the_markdown_has_whole_tables_and_folds(report: Path) -> None:
    lines = (report / "report.md").read_text().splitlines()
    folds = [line for line in lines if line.startswith(("<details>", "</details>"))]
    assert [line[:9] for line in folds] == ["<details>", "</details"] * (len(folds) // 2)
    columns, tables = 0, 0
    for place, line in enumerate(lines):
        if not line.startswith("|"):
            columns = 0
            continue
        found = len(re.findall(r"(?<!\\)\|", line))
        tables += not columns
        assert columns in (0, found), line
        if not columns:
            assert lines[place - 1] == "", "a code host needs an empty line in front of a table"
            assert set(lines[place + 1]) <= set("|:-"), line
        columns = found
    assert tables > 20
    for place, line in enumerate(lines):
        if line.startswith("<details>"):
            assert lines[place + 1] == ""
        if line == "</details>":
            assert lines[place - 1] == ""


@pytest.mark.slow
def test_claims_json(report: Path) -> None:
    claims = json.loads((report / "claims.json").read_text())
    assert {claim["experiment"] for claim in claims} == {
        *("main", "ensemble", "shift"),
        *("similarity", "maps", "cost"),
    }
    for claim in claims:
        assert {
            *("id", "experiment", "claim", "published", "effect"),
            *("interval", "n_seeds", "rule", "rule_commit", "verdict", "sentence", "effect_text"),
        } <= set(claim)
        assert claim["sentence"].startswith("“")
        assert claim["sentence"].count(claim["effect_text"]) == 1
        assert claim["verdict"] in ("supported", "contradicted", "not resolved")


@pytest.mark.slow
def test_the_text_of_a_figure_says_its_numbers(report: Path) -> None:
    tags = parse((report / "report.html").read_text())
    texts = [value for tag, key, value in tags.attributes if (tag, key) == ("img", "alt")]
    for start, number in {
        "Test accuracy by run.": r"finetune: 8\d\.\d \[",
        "Gain of each ensemble": r"finetune_distill: 1\.\d \[",
        "Test accuracy of the ensembles": r"finetune \+ distill: 8\d\.\d \[",
        "Accuracy under shift against": r"scratch: \d\d\.\d without, \d\d\.\d under shift",
    }.items():
        (text,) = [text for text in texts if text.startswith(start)]
        assert re.search(number, text), text


@pytest.mark.slow
def test_figures_are_there_and_not_blank(report: Path) -> None:
    assert {path.name for path in (report / "figures").iterdir()} == {
        f"{name}.{form}" for name in FIGURES for form in ("png", "svg")
    }
    for name in FIGURES:
        with Image.open(report / "figures" / f"{name}.png") as image:
            pixels = np.asarray(image.convert("L"))
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert min(pixels.shape) > 100
        assert 0.003 < (pixels < 200).mean() < 0.97, name
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edge == 255).all(), f"{name}: something is cut off at the edge"
        assert "<dc:date>" not in (report / "figures" / f"{name}.svg").read_text()


@pytest.mark.slow
def test_every_table_is_written_twice(report: Path) -> None:
    names = {path.stem for path in (report / "tables").glob("*.csv")}
    assert names == {path.stem for path in (report / "tables").glob("*.md")}
    assert names == {
        *(
            "main",
            "metrics",
            "calibration",
            "teachers",
            "similarity",
            "ensembles",
            "shifts",
            "robustness",
            "ood",
        ),
        *("comparisons", "training", "cost", "recipes", "time"),
    }


@pytest.mark.slow
def test_equal_records_give_equal_bytes_and_a_study_of_few_parts_has_a_page(tmp_path: Path) -> None:
    study = synthetic.study(
        seeds=(0, 1),
        ensembles={},
        evaluation__sets=("test",),
        evaluation__shifts=(),
        evaluation__severities=(),
    )
    numbers = Numbers(accuracy={"finetune": (0.80, 0.88), "scratch": 0.84})
    metrics, artifacts = synthetic.write(tmp_path, study, numbers)
    for name in ("first", "second"):
        page.build(study, metrics, artifacts, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    html = " ".join((tmp_path / "first" / "report.html").read_text().split())
    parse(html)
    assert "Not tested in this study: 5 claims" in html
    assert "<li>3, because the study has no ensemble of finetune and distill: <q>" in html
    assert "<li>2, because evaluation.sets does not name shifts: <q>" in html
    assert "no bounded interval" in html
    assert "Distribution shift</h2>" not in html


def test_a_method_has_one_colour_and_runs_differ_in_grey() -> None:
    runs = ("scratch", "finetune", "copy", "distill", "copy_half", "distill_mean", "linear_probe")
    looks = figures.looks(synthetic.study(runs=runs))
    alone = figures.looks(synthetic.study())
    for run in ("scratch", "finetune", "copy", "distill"):
        assert looks[run].color == alone[run].color
    assert len({look.color for look in looks.values()}) == len(runs)
    assert len({look.marker for look in looks.values()}) == len(runs)
    assert len({look.linestyle for look in looks.values()}) == len(runs)


def test_every_method_has_a_colour() -> None:
    assert set(figures.METHOD_COLOURS) == set(get_args(Method))
    assert len(set(figures.METHOD_COLOURS.values())) == len(figures.METHOD_COLOURS)


def test_heat_map_peaks_at_the_patch_attended_to() -> None:
    maps = np.full((1, 3, 2, 17, 17), 0.01, np.float32)
    maps[0, 1, :, 0, 1 + 4 * 2 + 3] = 0.9  # row 2, column 3 of a 4 x 4 grid
    maps[0, 1, :, 5, 1] = 0.99  # a patch's query: not the class token's
    heat = figures._class_attention(maps, (28, 28))
    row, column = np.unravel_index(heat[0, 1].argmax(), (28, 28))
    assert (row // 7, column // 7) == (2, 3)
    assert heat.min() >= 0
    assert heat.max() == pytest.approx(1)


def _without_maps(artifacts: Path) -> str:
    (artifacts / "maps" / "maps.npz").unlink()
    return r"maps\.npz: does not exist\n.*dvc repro maps"


def _damaged_sheet(artifacts: Path) -> str:
    (artifacts / "shifts" / "contact_sheet.npz").write_bytes(b"PK\x03\x04 cut short")
    return r"contact_sheet\.npz: is damaged.*\n.*python -m attention_transfer remake shifts"


@pytest.mark.parametrize("injure", [_without_maps, _damaged_sheet])
def test_missing_and_damaged_images(tmp_path: Path, injure: Callable[[Path], str]) -> None:
    study = synthetic.study()
    metrics, artifacts = synthetic.write(tmp_path, study)
    message = injure(artifacts)
    records = load(study, metrics)
    assert study.report is not None
    with pytest.raises(StudyError, match=message):
        figures.build(records, study.report, artifacts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"report": None}, "has no report section"),
        ({"evaluation__sets": ("validation",)}, "does not name test"),
    ],
)
def test_a_study_that_cannot_be_reported(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        page.build(synthetic.study(**change), tmp_path, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_reporting_imports_neither_torch_nor_mlflow() -> None:
    code = "import sys, attention_transfer.reporting.page; sys.exit(bool({'torch', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"), [("full", "No space left"), ("read-only", "Read-only file system")]
)
def test_where_no_report_can_be_written_one_error_names_the_file(
    fault: str, reason: str, tmpfs: Path, tmp_path: Path
) -> None:
    """A figure does not fit; what is there is whole, and with more room the report is made."""
    study = synthetic.study(evaluation__severities=(1, 5), evaluation__shifts=("fog", "jpeg"))
    metrics, artifacts = synthetic.write(tmp_path / "records", study, Numbers())
    subprocess.run(
        ["mount", "-o", "remount,ro" if fault == "read-only" else "remount,size=100k", tmpfs], check=True
    )
    with pytest.raises(StudyError, match=f"cannot be written: {reason}") as caught:
        page.build(study, metrics, artifacts, tmpfs / "report")
    assert Path(caught.value.where).is_relative_to(tmpfs / "report")
    assert not list(tmpfs.rglob(".tmp-*"))
    assert not (tmpfs / "report" / "report.html").exists()
    subprocess.run(["mount", "-o", "remount,rw,size=50m", tmpfs], check=True)
    page.build(study, metrics, artifacts, tmpfs / "report")
    assert (tmpfs / "report" / "report.html").read_text(encoding="utf-8").endswith("</html>\n")
