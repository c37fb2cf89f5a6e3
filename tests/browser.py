"""A page in headless Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright

WAIT = 60_000  # milliseconds: tests share two cores with others
expect.set_options(timeout=WAIT)
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def opened(
    address: str, *, network: bool = False, only_errors: bool = False, **options: Any
) -> Iterator[Page]:
    """The page at an address; an error that it does not catch, or prints to its console, fails the test.

    Args:
        network: whether it may ask for anything beyond itself.
        only_errors: not what the page prints, which is not ours to mend.
        options: of the browser context, such as viewport or color_scheme.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: install one of {', '.join(NAMES)}")
    complaints: list[str] = []

    def note(kind: str, text: str) -> None:
        if kind in ("warning", "error"):
            complaints.append(f"{kind}: {text}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        page = browser.new_page(**options)
        page.set_default_timeout(WAIT)
        if not only_errors:
            page.on("console", lambda message: note(message.type, message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if not network:
            page.on(
                "request",
                lambda request: (
                    complaints.append(f"asks for {request.url[:200]}")
                    if not request.url.startswith(("data:", "file:"))
                    else None
                ),
            )
        page.goto(address)
        yield page
        browser.close()
    assert not complaints, "\n".join(complaints)


def keep(page: Page, name: str, **options: Any) -> None:
    """A screenshot for looking at, where SCREENSHOTS names a folder."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", **options)
