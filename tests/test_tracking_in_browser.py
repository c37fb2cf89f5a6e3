"""The MLflow UI on a real server, with the records of the default study in it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from playwright.sync_api import expect

from attention_transfer import tracking
from attention_transfer.tracking import database, views

ROOT = Path(__file__).parent.parent
RUNS = ("scratch", "finetune", "linear_probe", "copy", "distill")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A database with the default study."""
    root = tmp_path_factory.mktemp("ui")
    for folder in ("metrics/core", "reports/core"):
        shutil.copytree(ROOT / folder, root / folder)
    (root / "runs" / "core").mkdir(parents=True)
    (root / "runs" / "core" / "forecast.txt").write_text("32 min")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
            patch.delenv(name, raising=False)
        patch.chdir(root)
        tracking.sync(Path("metrics"), Path())
        yield root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "attention_transfer", "ui", "--port", str(port)],
        cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def wait_for(page: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(page, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < end, f"no answer from {page}"
            time.sleep(0.5)


@pytest.mark.parametrize(
    ("view", "charts"),
    [
        ("comparison", ["test_accuracy", "validation_accuracy", "task_loss", "attention_loss"]),
        ("shift", ["shift_accuracy"]),
        ("cost", ["seconds_per_step", "peak_memory_mb"]),
    ],
)
def test_a_ready_view_draws_its_charts(address: str, view: str, charts: list[str]) -> None:
    link = views.links(address, "core")[f"core: {view}"]
    with browser.opened(
        link, network=True, only_errors=True, viewport={"width": 1600, "height": 1400}
    ) as page:
        for run in RUNS:
            expect(page.get_by_text(f"Group: {run}").first).to_be_visible()
        plots = page.locator(".js-plotly-plot .plotly .main-svg")
        expect(plots.first).to_be_visible()
        for chart in charts:
            expect(page.get_by_text(re.compile(f"^{chart[:6]}")).first).to_be_visible()
        expect(page.locator(".js-plotly-plot .bars path, .js-plotly-plot .bars .point").first).to_be_visible()
        browser.keep(page, f"mlflow-{view}")


def test_the_study_says_what_it_is_and_holds_its_report(address: str, root: Path) -> None:
    store = database.connect(root)
    study = store.search("tags.study = 'core' and tags.kind = 'study'")[0].info.run_id
    files = {file.path for file in store.client.list_artifacts(study)}
    assert files == {"report.html", "report.md", "claims.json", "forecast.txt"}
    with browser.opened(f"{address}/#/experiments/1/runs/{study}", network=True, only_errors=True) as page:
        expect(page.get_by_text("make study STUDY=core")).to_be_visible()
        browser.keep(page, "mlflow-study")
        link = page.get_by_role("link", name="core: comparison").get_attribute("href")
        page.goto(f"{address}{link}")
        expect(page.get_by_text("Group: distill").first).to_be_visible()


def test_a_training_shows_recipe_model_data_and_stage(address: str, root: Path) -> None:
    store = database.connect(root)
    run = store.search("tags.stage = 'train' and tags.run = 'distill' and tags.seed = '0'")[0]
    assert run.data.metrics["test_accuracy"] == pytest.approx(0.81, abs=0.02)
    assert run.data.metrics["shift_accuracy"] < run.data.metrics["test_accuracy"]
    assert run.data.metrics["seconds_per_step"] == pytest.approx(run.data.metrics["seconds"] / 800)
    with browser.opened(
        f"{address}/#/experiments/1/runs/{run.info.run_id}", network=True, only_errors=True
    ) as page:
        expect(page.get_by_role("link", name=re.compile("distill-0")).first).to_be_visible()
        expect(page.get_by_text("attention_loss.weight", exact=True).first).to_be_visible()
        expect(page.get_by_text("train@distill-0").first).to_be_visible()
        expect(page.get_by_text("images").first).to_be_visible()
        browser.keep(page, "mlflow-run", full_page=True)


def test_a_second_sync_changes_nothing(root: Path) -> None:
    before = database.connect(root).client.get_experiment("1").tags
    report = tracking.sync(Path("metrics"), Path())
    assert (report.imported, report.tagged) == ((), ())
    assert database.connect(root).client.get_experiment("1").tags == before
