"""The report page, driven in a browser as a reader would."""

from __future__ import annotations

import itertools
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
    accuracy = {"copy_query": {0: 0.84, 1: 0.85}, "copy_value": {0: 0.90, 1: 0.901}}
    experiments = {
        name: synthetic.write_experiment(study, accuracy, metrics, name) for name in ("qkv", "layers")
    }
    report_page.build(
        study,
        metrics,
        artifacts,
        root / "out",
        params=Path("presets/synthetic.yaml"),
        experiments=experiments,
    )
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
    page.wait_for_selector("#table-main table.dataTable")


def test_the_first_screen_answers(page: Page) -> None:
    browser.keep(page, "report")
    for part in (
        "#answer p.short",
        "#answer [data-chart=main] svg",
        "#answer .verdicts",
        "#answer > p:last-child",
    ):
        box = page.locator(part).first.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < 800, part
    assert "is worth" in page.locator("#answer p.short").inner_text()
    verdicts = page.locator("#answer .verdicts li")
    assert verdicts.count() == 6, "the main claims"
    verdicts.first.get_by_role("link").click()
    expect(page.locator("#main-copy")).to_be_in_viewport()


def test_every_chart_is_drawn_and_says_what_it_is(page: Page) -> None:
    hosts = page.locator("[data-chart]")
    assert hosts.count() == 9, "main, ensembles, two of shifts, three of attention, two experiments"
    for host in hosts.all():
        svg = host.locator("svg")
        expect(svg).to_have_count(1)
        assert host.get_attribute("role") == "graphics-document"
        assert host.get_attribute("aria-label")
        assert host.locator("[role=graphics-symbol]").count(), "marks"
        box = svg.bounding_box() or {"width": 0, "height": 0}
        if host.is_visible():
            assert box["width"] > 150
            assert box["height"] > 60


def test_an_experiment_has_its_own_figure_beside_the_chart(page: Page) -> None:
    """What the figure of layers draws, accuracy by their number, is no row of intervals."""
    expect(page.locator("#layers img")).to_be_visible()
    chart = page.locator("#layers [data-chart=experiment_layers] svg")
    expect(chart).to_be_hidden()
    page.get_by_text("Every run of it, with its values").click()
    expect(chart).to_be_visible()
    page.wait_for_function(  # it was drawn without a width
        "document.querySelector('[data-chart=experiment_layers] svg').getBoundingClientRect().width > 600"
    )
    expect(page.locator("#qkv [data-chart=experiment_qkv] svg")).to_be_visible()
    assert not page.locator("#qkv img").count()
    labels = page.locator("#qkv path[aria-roledescription=point]").evaluate_all(
        "marks => marks.map((mark) => mark.getAttribute('aria-label'))"
    )
    assert [label.split()[:2] for label in labels] == [["copy_query:", "84.50"], ["copy_value:", "90.05"]]
    page.get_by_text("Params, in presets/synthetic/qkv.yaml").click()
    expect(page.locator("#qkv .again pre")).to_contain_text("copy_query: {")
    claim = page.locator("#qkv-query")
    expect(claim.get_by_text("is supported here: copy_query minus copy is")).to_be_hidden()
    claim.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(claim.get_by_text("copy_query minus copy is")).to_be_visible()


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
    said = page.locator("#shift-summary").inner_text()
    assert said.startswith("Accuracy, %, under fog at severity 1: ")
    assert after[1] in said
    browser.keep(page, "report-shifts")


def accuracy(label: str | None, run: str) -> float:
    """Of a mark's label, such as `finetune: 85.95 [85.75, 86.15]`."""
    assert label is not None
    name, value, *_ = label.split()
    assert name == f"{run}:"
    return float(value)


def test_the_attention_viewer_shows_what_is_stored(page: Page, report: Path) -> None:
    stored = np.load(artifacts_of(report) / "maps" / "maps.npz")
    images = page.locator("#attention-viewer select[name=image] option").all_inner_texts()
    assert images == [f"{number}: {name}" for number, name in enumerate(stored["classes"], 1)]
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
        texts = (
            "main p",
            "#table-main td",
            "#table-main thead th",
            ".claim p",
            ".claim .soft",
            "figcaption",
            "a",
        )
        for text in (
            *texts,
            *(f".{kind} .verdict" for kind in ("supported", "not-resolved")),
            "select",
            "summary",
        ):
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


def test_the_page_can_be_walked_without_seeing_it(page: Page) -> None:
    """Landmarks, headings in order, names of all that can be operated; what is focused is marked."""
    for landmark in ("banner", "main", "navigation"):
        assert page.get_by_role(landmark).count() == 1, landmark
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map((each) => Number(each.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    nameless = page.locator(
        "select, input, button, a, [tabindex='0'][role=region], form:not(.vega-bindings)"
    ).evaluate_all(
        """all => all.filter((each) => !(each.ariaLabel || each.labels?.length || each.textContent.trim()))
            .map((each) => each.outerHTML)"""
    )
    assert nameless == []
    assert not page.locator("img:not([alt]), th:not([scope])").count()
    for _ in range(3):
        page.keyboard.press("Tab")
    width = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert page.evaluate("document.activeElement.tagName") == "A"
    assert float(width.removesuffix("px")) >= 2


def test_the_viewers_are_worked_by_keyboard(page: Page) -> None:
    output = page.locator("#attention-viewer output")
    before = output.inner_text()
    page.locator("#attention-viewer select[name=image]").focus()
    page.keyboard.press("ArrowDown")
    expect(output).not_to_have_text(before)
    assert output.get_attribute("aria-live") == "polite"
    page.locator("[data-signal=severity]").focus()
    page.keyboard.press("Home")
    expect(page.locator("#shift-summary")).to_contain_text("at severity 1: ")


def test_all_claims_stand_in_one_table_that_is_sorted(page: Page) -> None:
    page.get_by_text(re.compile(r"All \d+ claims in one table")).click()
    table = page.locator("#table-claims")
    claims = table.locator("tbody tr")
    assert claims.count() == page.locator("article.claim").count()
    table.locator("input[type=search]").fill("beats")
    expect(claims).to_have_count(4)
    verdicts = claims.locator("td.verdict")
    before = verdicts.all_inner_texts()
    assert before != sorted(before)
    table.locator("thead th").nth(2).click()
    expect(verdicts).to_have_text(sorted(before))  # in this order, once the table has drawn itself anew


def test_what_falls_otherwise_leads_to_its_claim(page: Page) -> None:
    row = page.locator("#otherwise tbody tr").first
    expect(row).to_contain_text("contradicted")
    link = row.get_by_role("link").first
    target = page.locator(link.get_attribute("href") or "nothing")
    link.click()
    expect(target).to_be_in_viewport()


def test_who_wants_no_motion_gets_none(report: Path) -> None:
    with browser.opened(report.as_uri(), reduced_motion="reduce") as page:
        drawn(page)
        moving = page.locator("*").evaluate_all(
            "all => all.filter((each) => parseFloat(getComputedStyle(each).transitionDuration) > 0).length"
        )
        assert moving == 0


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
        for folded in page.locator("details:not([open])").all():
            expect(folded).to_be_hidden()
        page.set_viewport_size({"width": 680, "height": 960})  # of A4 within its margins
        tables = page.locator("table").evaluate_all(
            "all => all.filter((each) => each.getBoundingClientRect().right > innerWidth + 1).map((each) => "
            "each.closest('figure')?.id ?? each.parentElement.ariaLabel)"
        )
        assert tables == [], "wider than the paper"
