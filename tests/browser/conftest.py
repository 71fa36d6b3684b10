"""A headless Chromium that looks at real Flower processes. Screenshots: build/screenshots."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
ARGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
]  # fmt: skip
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
#: Milliseconds that an expectation is waited for, on a machine with much else to do.
PATIENCE_MS = 30_000.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for a module: while Playwright runs, its thread has an event loop, others' tests none."""
    found = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if found is None:
        pytest.skip(f"no Chromium on PATH: {', '.join(CHROMIUMS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGS)
        yield browser
        browser.close()


class Visitor:
    """Opens pages, and notes what they ask for and complain of."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self._pages: list[Page] = []

    def open(
        self, url: str, *, width: int = 1280, credentials: str | None = None, wait: bool = True
    ) -> Page:
        """A page of its own browser context; `credentials` is user:password."""
        user, _, password = (credentials or "").partition(":")
        context = self._browser.new_context(
            viewport=ViewportSize(width=width, height=900),
            http_credentials={"username": user, "password": password} if credentials else None,
        )
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda problem: self.complaints.append(str(problem)))
        self._pages.append(page)
        if wait:
            page.goto(url)
        return page

    def close(self) -> None:
        for page in self._pages:
            page.context.close()


@pytest.fixture
def visitor(browser: Browser) -> Iterator[Visitor]:
    visitor = Visitor(browser)
    yield visitor
    visitor.close()


@pytest.fixture
def keep() -> Callable[[Page, str], None]:
    """``keep(page, "broker")`` keeps a screenshot."""

    def shoot(page: Page, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(SCREENSHOTS / f"{name}.png"), full_page=True)

    return shoot
