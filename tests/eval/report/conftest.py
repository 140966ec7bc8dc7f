"""Headless Chromium, where one is installed, and what it has to say about a page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=path, args=list(QUIET))


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """``show(text)`` opens a page and waits for its plots; it must neither complain nor ask for anything."""
    said: list[str] = []
    with ExitStack() as stack:

        def open_page(text: str, *, width: int = 1280, height: int = 900, hash: str = "", **options: Any) -> Page:
            file = tmp_path / "page.html"
            file.write_text(text, encoding="utf-8")
            context = browser.new_context(viewport={"width": width, "height": height}, **options)
            stack.callback(context.close)
            page = context.new_page()
            page.on("console", lambda message: said.append(f"console {message.type}: {message.text}"))
            page.on("pageerror", lambda error: said.append(f"error: {error}"))
            page.on("request", lambda request: _note(said, request.url, file))
            page.goto(f"{file.as_uri()}{hash}")
            if options.get("java_script_enabled", True):
                page.wait_for_selector("html.ready", timeout=60_000)
            return page

        yield open_page
    assert said == []


def _note(said: list[str], url: str, file: Path) -> None:
    if not url.startswith(("data:", "blob:", file.as_uri())):
        said.append(f"request: {url}")
