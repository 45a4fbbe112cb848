"""The browser, and the results that the pages show."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from harness import api
from harness.comparison.findings import Divergence
from harness.errors import GoldenError
from harness.report.html import render
from harness.report.outcome import Result
from tests.report_html.results import DESKTOP, HOSTILE, PLACES, compared, result_of

# Without these, Chromium asks for updates: a test must see the page's own requests only.
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = next((found for found in map(shutil.which, BROWSERS) if found), None)
    if executable is None:
        if os.environ.get("CI"):
            pytest.fail("CI is set, but no Chromium is installed: .ci/run installs one")
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=QUIET)
        yield launched
        launched.close()


Open = Callable[..., Page]


@pytest.fixture(scope="session")
def desk(browser: Browser) -> Page:
    """The page that most tests open their report in: another one is another process."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    return context.new_page()


@pytest.fixture
def opened(browser: Browser, desk: Page, tmp_path: Path) -> Iterator[Open]:
    """Open a report; requests for anything but its file, and complaints, fail the test."""
    complaints: list[str] = []
    contexts: list[BrowserContext] = []
    watched: list[tuple[Page, str, Callable[[Any], object]]] = []

    def watch(page: Page, event: str, told: Callable[[Any], object]) -> None:
        page.on(event, told)  # type: ignore[call-overload]
        watched.append((page, event, told))

    def open_(
        report: Result | Path,
        *,
        size: tuple[int, int] = DESKTOP,
        scheme: Any = "light",
        **options: Any,
    ) -> Page:
        path = report if isinstance(report, Path) else tmp_path / "report.html"
        if isinstance(report, Result):
            path.write_text(render(report), encoding="utf-8")
        page = desk
        if options:
            contexts.append(browser.new_context(**options))
            page = contexts[-1].new_page()
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.emulate_media(media="screen", color_scheme=scheme)
        page.set_default_timeout(5000)
        watch(page, "console", lambda message: complaints.append(message.text))
        watch(page, "pageerror", lambda error: complaints.append(str(error)))
        watch(
            page,
            "request",
            lambda request: request.url == path.as_uri() or complaints.append(request.url),
        )
        page.goto(path.as_uri())
        return page

    yield open_
    for page, event, told in watched:
        page.remove_listener(event, told)
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="session")
def small(data: Path, shipped_golden: Path) -> Result:
    """One element of one tensor of 99 changed."""
    comparison = api.verify(data / "nest_tiny_perturbed_1e-3.nemo", shipped_golden)
    step = 'if this change is intended:  harness verify x.nemo --update-golden --reason "why"'
    return result_of(comparison, next_steps=(step,))


@pytest.fixture(scope="session")
def trained(data: Path, shipped_golden: Path) -> Result:
    """Verdicts of every kind: without residues, some of the small changes are undecided."""
    golden = api.read_golden(shipped_golden)
    tensors = golden.fingerprint.tensors
    blunt = {key: replace(tensor, residues=None) for key, tensor in tensors.items()}
    golden = replace(golden, fingerprint=replace(golden.fingerprint, tensors=blunt))
    return result_of(api.verify(data / "nest_tiny.ckpt", golden))


@pytest.fixture(scope="session")
def passing(data: Path, shipped_golden: Path) -> Result:
    return result_of(api.verify(data / "nest_tiny.nemo", shipped_golden))


@pytest.fixture(scope="session")
def hostile() -> Result:
    """Keys, names and errors that nobody should write into a page as they are."""
    comparison = compared(dict.fromkeys(HOSTILE, 1.0), dict.fromkeys(HOSTILE, 2.0))
    return result_of(
        comparison,
        expected=HOSTILE[0],
        actual=HOSTILE[1] + "\udc80",
        next_steps=(HOSTILE[2],),
        error=GoldenError(HOSTILE[0], hint=HOSTILE[1]),
    )


@pytest.fixture(scope="session")
def outputs() -> Result:
    """Module b diverges: the place inside of it, and all that follow."""
    before = dict.fromkeys(PLACES, 1.0)
    after = before | dict.fromkeys(PLACES[6:], 1.5)
    comparison = compared(before, after, stage="outputs")
    first = next(f for f in comparison.findings if f.key == "b.inner:out")
    divergence = Divergence(
        finding=first, diverging_module="b", agreeing=("0", "1"), diverging=(), num_before=6
    )
    file = compared({"b.weight": 1.0}, {"b.weight": 1.0})
    return result_of(file, replace(comparison, divergence=divergence))
