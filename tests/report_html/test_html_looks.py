"""The HTML report in a headless Chromium: on a phone, in the dark, on paper, read aloud."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from playwright.sync_api import Page

from harness.report.outcome import Result
from tests.report_html.results import PHONE

Open = Callable[..., Page]


@pytest.mark.parametrize("name", ["small", "outputs", "hostile"])
def test_nothing_is_wider_than_a_phone(
    opened: Open, name: str, request: pytest.FixtureRequest
) -> None:
    page = opened(request.getfixturevalue(name), size=PHONE)
    widths = "[document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert max(page.evaluate(widths)) <= 375
    page.locator("#table tbody .item").first.click()
    assert max(page.evaluate(widths)) <= 375
    box = page.locator("#detail").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 375
    inside = "(detail) => detail.scrollWidth - detail.clientWidth"
    assert page.locator("#detail").evaluate(inside) <= 0


CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    // Colours painted over each other as the browser would: in any notation, with their alpha.
    const luminance = (colors) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const color of colors) {
            canvas.fillStyle = color;
            canvas.fillRect(0, 0, 1, 1);
        }
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (element) => {
        const under = [];
        for (let one = element; one; one = one.parentElement) {
            under.unshift(getComputedStyle(one).backgroundColor);
        }
        const back = luminance(["white", ...under]);
        const fore = luminance(["white", ...under, getComputedStyle(element).color]);
        return (Math.max(fore, back) + 0.05) / (Math.min(fore, back) + 0.05);
    };
    const elements = new Set(document.querySelectorAll(".mark"));
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        if (walker.currentNode.data.trim()) elements.add(walker.currentNode.parentElement);
    }
    return [...elements]
        .filter((element) => !element.matches("script, noscript, option"))
        .filter((element) => element.checkVisibility())
        .map((element) => [contrast(element), element.outerHTML.slice(0, 120)]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["trained", "outputs"])
def test_text_stands_out_from_what_is_behind_it(
    opened: Open, name: str, scheme: str, request: pytest.FixtureRequest
) -> None:
    page = opened(request.getfixturevalue(name), scheme=scheme)
    page.locator("#table tbody .item").first.click()
    measured = page.evaluate(CONTRAST)
    assert len(measured) > 100
    assert [found for found in measured if found[0] < 4.5] == []
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (dark == "rgb(18, 21, 25)") == (scheme == "dark")


def test_verdicts_differ_in_more_than_colour(opened: Open, trained: Result) -> None:
    page = opened(trained)
    families = ("identical", "close", "undecided", "different")
    signs, patterns = (
        {family: page.locator(f"{where}.{family}").first.evaluate(look) for family in families}
        for where, look in (
            ("#table .mark", "(mark) => getComputedStyle(mark, '::before').content"),
            ("#map .tile", "(tile) => getComputedStyle(tile).backgroundImage"),
        )
    )
    assert len(set(signs.values())) == 4
    assert "none" != patterns["undecided"] != patterns["different"] != "none"


def test_the_page_tells_its_parts_to_a_screen_reader(opened: Open, outputs: Result) -> None:
    page = opened(outputs)
    page.locator("#table tbody .item").first.click()
    for landmark in ("banner", "main", "contentinfo", "complementary", "search"):
        assert page.get_by_role(landmark).count() == 1, landmark
    levels = page.locator("h1, h2, h3").evaluate_all(
        "all => all.filter((e) => e.checkVisibility()).map((e) => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    nameless = page.locator(
        "button, input, select, [role=option], [role=listbox], table"
    ).evaluate_all(
        """all => all.filter((e) => !(e.textContent.trim() || e.getAttribute("aria-label")
            || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    assert page.get_by_role("table").first.locator("caption").count() == 1
    assert page.locator("#table th[scope=col]").count() == page.locator("#table thead th").count()
    assert page.locator("#table tbody tr").count() == page.locator("#table th[scope=row]").count()
    assert page.get_by_role("option", name="b.inner:out, different").count() == 1


def test_without_scripts_the_page_still_says_what_came_out(opened: Open, outputs: Result) -> None:
    page = opened(outputs, java_script_enabled=False)
    assert page.get_by_role("heading", level=1).inner_text().endswith("Different")
    assert page.locator(".divergence").is_visible()
    assert page.locator(".view:visible").count() == 2
    assert "need JavaScript" in page.get_by_role("main").inner_text()
    assert not page.locator("#explorer").is_visible()


def test_the_page_prints_without_its_controls(opened: Open, small: Result) -> None:
    page = opened(small, size=(700, 900))
    page.emulate_media(media="print")
    assert not page.locator("#filter").is_visible()
    assert not page.get_by_role("button", name="Copy").is_visible()
    assert page.locator("#table").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
