"""The report page, driven in a browser as a reader would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import browser
import numpy as np
import pytest
import synthetic_records as synthetic
from playwright.sync_api import Page, expect

from attention_transfer.reporting import page as report_page

PHONE = {"viewport": {"width": 390, "height": 844}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    study = synthetic.study(evaluation__shifts=("fog", "jpeg", "rotate"))
    metrics, artifacts = synthetic.write(root, study)
    accuracy = {"copy_query": {0: 0.84, 1: 0.85}, "copy_value": {0: 0.80, 1: 0.79}}
    experiments = {
        name: synthetic.write_experiment(study, accuracy, metrics, name) for name in ("qkv", "layers")
    }
    report_page.build(study, metrics, artifacts, root / "out", experiments=experiments)
    return root / "out" / "report.html"


def artifacts_of(report: Path) -> Path:
    return report.parent.parent / "artifacts"


@pytest.fixture
def page(report: Path) -> Iterator[Page]:
    with browser.opened(report.as_uri(), viewport={"width": 1280, "height": 800}) as page:
        drawn(page)
        yield page


def drawn(page: Page) -> None:
    page.wait_for_selector("html[data-drawn=yes]", state="attached")
    page.wait_for_selector("table.dataTable")


def test_the_first_screen_answers(page: Page) -> None:
    browser.keep(page, "report")
    for part in ("#answer p.short", "#answer [data-chart=main] svg", "#answer p:nth-of-type(2)"):
        box = page.locator(part).first.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < 800, part
    assert "recovers" in page.locator("#answer p.short").inner_text()


def test_every_chart_is_drawn_and_says_what_it_is(page: Page) -> None:
    hosts = page.locator("[data-chart]")
    assert hosts.count() == 9, "main, ensembles, two of shifts, three of attention, two experiments"
    for host in hosts.all():
        svg = host.locator("svg")
        expect(svg).to_have_count(1)
        assert host.get_attribute("role") == "graphics-document"
        assert host.get_attribute("aria-label")
        assert host.locator("[role=graphics-symbol]").count(), "marks"
        box = svg.bounding_box()
        assert box is not None
        assert box["width"] > 150
        assert box["height"] > 60


def test_an_experiment_has_its_own_figure_beside_the_chart(page: Page) -> None:
    """What the figure of layers draws, accuracy by their number, is no row of intervals."""
    expect(page.locator("#layers img")).to_be_visible()
    expect(page.locator("#layers [data-chart=experiment_layers] svg")).to_be_visible()
    expect(page.locator("#qkv [data-chart=experiment_qkv] svg")).to_be_visible()
    assert not page.locator("#qkv img").count()
    labels = page.locator("#qkv path[aria-roledescription=point]").evaluate_all(
        "marks => marks.map((mark) => mark.getAttribute('aria-label'))"
    )
    assert [label.split()[:2] for label in labels] == [["copy_query:", "84.50"], ["copy_value:", "79.50"]]
    page.locator("#qkv details summary").click()
    expect(page.locator("#qkv details pre")).to_contain_text("copy_query: {")


def test_a_value_is_shown_where_the_mouse_is(page: Page) -> None:
    page.locator("[data-chart=main] path[aria-roledescription=point]").first.hover()
    tip = page.locator("#vg-tooltip-element")
    expect(tip).to_be_visible()
    expect(tip).to_contain_text("scratch")
    assert "80.06" in tip.inner_text()


def test_a_table_is_sorted_by_its_numbers(page: Page) -> None:
    table = page.locator("#table-main table")
    runs = table.locator("tbody th")
    expect(runs).to_have_text(["scratch", "finetune", "copy", "distill"])
    header = table.locator("thead th").nth(2)
    header.click()
    expect(runs).to_have_text(["scratch", "copy", "finetune", "distill"])
    expect(header).to_have_attribute("aria-sort", "ascending")
    header.get_by_role("button").focus()
    page.keyboard.press("Enter")
    expect(runs).to_have_text(["distill", "finetune", "copy", "scratch"])


def test_a_long_table_can_be_searched(page: Page) -> None:
    table = page.locator("#table-shifts")
    assert table.locator("tbody tr").count() == 16, "four runs, three shifts and their mean"
    table.locator("input[type=search]").fill("rotate")
    expect(table.locator("tbody tr")).to_have_count(4)
    assert not page.locator("#table-main input[type=search]").count()


def test_the_shift_viewer_shows_the_choice(page: Page) -> None:
    runs = page.locator("[data-chart=shift_runs] path[aria-roledescription=point]")
    before = [mark.get_attribute("aria-label") for mark in runs.all()]
    assert len(before) == 4
    page.locator("[data-signal=severity]").select_option("1")
    page.locator("[data-signal=shift]").select_option(label="fog")
    expect(runs.nth(1)).not_to_have_attribute("aria-label", before[1] or "")
    after = [mark.get_attribute("aria-label") for mark in runs.all()]
    assert len(after) == 4
    # drops are in proportion to severity and average to a tenth, see synthetic_records
    assert accuracy(before[1], "finetune") == pytest.approx(86 - 10 * 5 / 3, abs=1)
    assert accuracy(after[1], "finetune") == pytest.approx(86 - 10 / 3, abs=1)
    browser.keep(page, "report-shifts")


def accuracy(label: str | None, run: str) -> float:
    """Of a mark's label, such as `finetune: 85.95 [85.75, 86.15]`."""
    assert label is not None
    name, value, *_ = label.split()
    assert name == f"{run}:"
    return float(value)


def test_the_attention_viewer_shows_what_is_stored(page: Page, report: Path) -> None:
    stored = np.load(artifacts_of(report) / "maps" / "maps.npz")
    for name, choice in {"image": "2", "student": "distill", "layer": "1", "head": "2"}.items():
        page.locator(f"#attention-viewer select[name={name}]").select_option(choice)
    teacher, student = (stored[f"maps_{name}"][2, 1, 2, 0, 1:] * 100 for name in ("teacher", "distill"))
    expected = {"teacher": teacher, "student": student, "difference": student - teacher}
    for panel, values in expected.items():
        marks = page.locator(f"[data-chart=attention_{panel}] path[aria-roledescription='rect mark']")
        expect(marks.first).to_have_attribute("aria-label", f"row 1, column 1: {values[0]:.2f} %")
        shown = [read_patch(mark.get_attribute("aria-label") or "") for mark in marks.all()]
        grid = np.full((7, 7), np.nan)
        for row, column, weight in shown:
            grid[row - 1, column - 1] = weight
        np.testing.assert_allclose(grid, values.reshape(7, 7), atol=0.01)
    apart = np.abs(student - teacher).sum() / 2
    assert f"{apart:.1f} %" in page.locator("#attention-viewer output").inner_text()
    page.locator("#attention-viewer").scroll_into_view_if_needed()
    browser.keep(page, "report-attention")


def read_patch(label: str) -> tuple[int, int, float]:
    found = re.fullmatch(r"row (\d+), column (\d+): (-?[\d.]+) %", label)
    assert found, label
    return int(found[1]), int(found[2]), float(found[3])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(report: Path, scheme: str) -> None:
    with browser.opened(report.as_uri(), color_scheme=scheme) as page:
        drawn(page)
        browser.keep(page, f"report-{scheme}", full_page=True)
        for text in ("main p", "table.dataTable td", "table.dataTable thead th", ".claim p", "figcaption"):
            assert contrast(page, text) >= 4.5, text


def contrast(page: Page, selector: str) -> float:
    """WCAG's contrast ratio of an element's text and what it stands on."""
    colours = page.locator(selector).first.evaluate(
        """element => {
            const text = getComputedStyle(element).color;
            let back = "rgba(0, 0, 0, 0)";
            for (let at = element; at && back.endsWith(", 0)"); at = at.parentElement)
                back = getComputedStyle(at).backgroundColor;
            return [text, back].map((colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number));
        }"""
    )
    light = sorted(luminance(colour) for colour in colours)
    return (light[1] + 0.05) / (light[0] + 0.05)


def luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour) / 255]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_a_phone_needs_no_sideways_scrolling(report: Path) -> None:
    with browser.opened(report.as_uri(), **PHONE) as page:
        drawn(page)
        browser.keep(page, "report-phone", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_without_scripts_the_figures_stand_there(report: Path) -> None:
    with browser.opened(report.as_uri(), java_script_enabled=False) as page:
        browser.keep(page, "report-without-scripts", full_page=True)
        for name in ("main", "ensembles", "shift_severity", "attention_maps"):
            expect(page.locator(f"#figure-{name} img")).to_be_visible()
        expect(page.locator("#attention-viewer")).to_be_hidden()


def test_it_prints_as_a_light_page(report: Path) -> None:
    with browser.opened(report.as_uri(), color_scheme="dark") as page:
        drawn(page)
        page.emulate_media(media="print")
        expect(page.locator("nav")).to_be_hidden()
        assert contrast(page, "main p") >= 4.5
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
