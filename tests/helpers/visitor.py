"""Pages in a browser, and what they ask for and complain of."""

from __future__ import annotations

from playwright.sync_api import Browser, Page, ViewportSize

#: Milliseconds that an expectation is waited for, on a machine with much else to do.
PATIENCE_MS = 30_000.0


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
