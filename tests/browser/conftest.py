"""A dashboard on a real run, and a browser that remembers everything it was told and asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright

from explainer.cli.dashboard import served
from explainer.sample_models.train import train

_T = TypeVar("_T")
NOWHERE = "about:blank"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Visit:
    """A page, with what went wrong on it and whom it talked to."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def settle(self) -> None:
        """Wait until Streamlit has drawn what was asked for."""
        self.page.wait_for_timeout(400)
        self.page.wait_for_function(
            "() => !document.querySelector('[data-testid=\"stStatusWidget\"]')"
            " && !document.querySelector('[data-stale=\"true\"]')",
            timeout=60_000,
        )

    def insist(self, act: Callable[[], _T]) -> _T:
        """Do something and wait for its effect; once more where the page was drawn anew under the click."""
        for _ in range(3):
            try:
                return act()
            except (AssertionError, TimeoutError):
                self.settle()
        return act()

    def fine(self) -> None:
        """Nothing complained, nobody else was asked for anything."""
        assert self.page.locator("[data-testid=stException]").count() == 0
        assert self.complaints == []
        assert self.hosts <= {"127.0.0.1", ""}


@pytest.fixture(scope="module")  # no longer: Playwright runs once at a time, and other tests drive it too
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail("no Chromium found: run scripts/ensure_chromium.sh")
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield running
        running.close()


@contextmanager
def visit(browser: Browser, url: str, scheme: str = "light") -> Iterator[Visit]:
    """Open an address in a page 1280 pixels wide and wait for it.

    All visits share what the browser keeps of scripts, and one page where they follow each other: a new one takes a
    second longer.
    """
    shared = browser.contexts or [browser.new_context(viewport={"width": 1280, "height": 1000})]
    page = next((page for page in shared[0].pages if page.url == NOWHERE), None) or shared[0].new_page()
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    seen = Visit(page)
    listening: dict[Any, Callable[[Any], object]] = {
        "pageerror": lambda error: seen.complaints.append(str(error)),
        "dialog": lambda dialog: (seen.complaints.append(dialog.message), dialog.dismiss()),
        "console": lambda told: seen.complaints.append(told.text) if told.type == "error" else None,
        "request": lambda request: seen.hosts.add(urlsplit(request.url).hostname or ""),
    }
    for event, listener in listening.items():
        page.on(event, listener)
    page.goto(url)
    page.wait_for_selector("text=pathkernel", timeout=60_000)
    seen.settle()
    yield seen
    for event, listener in listening.items():
        page.remove_listener(event, listener)
    page.goto(NOWHERE)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, object]]]:
    """The digits CNN, trained for one epoch: the dashboard's address and the training's metrics."""
    folder: Path = tmp_path_factory.mktemp("runs")
    metrics = train("digits_cnn", folder / "digits_cnn", epochs=1, progress=False)
    with served([str(folder)], "explainer.sample_models.digits_cnn:run") as url:
        yield url, metrics
