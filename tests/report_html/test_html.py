"""The text of the HTML report: what is in it, what is not, and how much it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness import api
from harness.comparison.findings import FINDING_KINDS
from harness.report.html import render
from harness.report.outcome import Result
from harness.text.folding import printable
from tests.conftest import Run
from tests.report_html.results import HOSTILE, all_differing, result_of


class Elements(HTMLParser):
    """All elements of a page, and the content of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def test_the_same_result_makes_the_same_bytes(small: Result) -> None:
    assert render(small) == render(small)
    assert str(Path.home()) not in render(small)


def test_every_kind_of_finding_is_said_in_words(small: Result) -> None:
    data = json.loads(Elements(render(small)).scripts[0])
    assert [kind for kind in FINDING_KINDS if not data["about"].get(kind)] == []


def test_a_new_nan_is_as_far_off_as_can_be(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file, value in zip(files, (1.0, math.nan), strict=True):
        save_file({"w": np.array([value, 2.0], "f4")}, file)
    data = json.loads(Elements(render(result_of(api.diff(*files)))).scripts[0])
    ratio = data["columns"]["difference"].index("ratio")
    assert float(data["rows"][0][-1][0][-1][ratio]) == math.inf


@pytest.mark.parametrize("names", ["small", "passing", "outputs", "hostile"])
def test_nothing_on_the_page_comes_from_elsewhere(
    names: str, request: pytest.FixtureRequest
) -> None:
    page = Elements(render(request.getfixturevalue(names)))
    for tag, attributes in page.tags:
        assert tag not in {"img", "iframe", "object", "embed", "base", "b onmouseover=alert(3)"}
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes
        for name in ("href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    [policy] = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_hostile_keys_are_data_and_neither_markup_nor_script(hostile: Result) -> None:
    text = render(hostile)
    text.encode("utf-8")
    page = Elements(text)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert text.count("</script") == 2
    data = json.loads(page.scripts[0])
    assert [row[0] for row in data["rows"]] == [printable(key) or '""' for key in HOSTILE]


def test_2000_tensors_that_all_differ_make_less_than_2_mb() -> None:
    file = all_differing(2000)
    page = render(result_of(file))
    assert len(page.encode()) < 2_000_000
    data = json.loads(Elements(page).scripts[0])
    assert len(data["rows"]) == 2000
    assert all(data["extras"]), "there is room for every detail"


def test_a_page_of_all_stages_leaves_out_details_of_the_least_first() -> None:
    file = all_differing(2000)
    stages = [file, *(replace(file, stage=stage) for stage in ("load", "reload"))]
    outputs = all_differing(2000, "outputs", ("linear:in.0", "linear:out"))
    page = render(result_of(*stages, outputs))
    assert len(page.encode()) < 2_000_000
    data = json.loads(Elements(page).scripts[0])
    assert [len(stage["rows"]) for stage in data["stages"]] == [2000, 2000, 2000, 4000]
    ratio = data["columns"]["difference"].index("ratio")
    ratios = [row[-1][0][-1][ratio] for row in data["rows"]]
    kept = [r for r, extra in zip(ratios, data["extras"], strict=True) if extra]
    left = [r for r, extra in zip(ratios, data["extras"], strict=True) if not extra]
    assert len(kept) > 200
    assert min(kept) >= max(left)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e-7, 3.3e-4, 1e300], ids=lambda size: f"{size:g}")
def test_a_strip_is_kept_to_a_tenth_of_a_decade(size: float) -> None:
    from harness.report.rows import STRIP_SIGNS, _strip

    values = (size, size / 2, 0.0, size / 1000, float("inf"))
    strip = _strip(values)
    assert strip is not None
    top, signs = strip
    assert top == pytest.approx(size, rel=0.01)
    assert (signs[2], signs[4]) == (STRIP_SIGNS["zero"], STRIP_SIGNS["endless"])
    tenths = [STRIP_SIGNS["tenths"].find(sign) for sign in signs]
    assert [tenths[0], tenths[1], tenths[3]] == ([0, 3, 30] if size else [-1, -1, -1])


def test_the_command_line_writes_the_page(
    harness: Callable[..., Run], data: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    sides = (data / "nest_tiny.nemo", data / "nest_tiny_perturbed_1e-3.nemo")
    assert harness("diff", *sides, "--report", page).code == 1
    found = json.loads(Elements(page.read_text()).scripts[0])
    row = next(
        e for r, e in zip(found["rows"], found["extras"], strict=True) if r[1] != "identical"
    )
    extra = dict(zip(found["columns"]["extra"], row, strict=True))
    assert extra["elements"] == [["3, 7", "0.0388614535", "0.0398614518", "0.001"]]
    # A report shows the statistics of both sides, which a comparison alone does not need.
    before, after = extra["expected_stats"], extra["actual_stats"]
    assert (before[0], after[2] - before[2]) == (after[0], pytest.approx(1e-3 / 16384, rel=0.01))
