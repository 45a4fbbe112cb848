"""Comparisons as plain data: what people do with them in a notebook, a script, a test."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from harness import Cause, Comparison, Finding, GoldenMismatch, Policy, UsageError
from harness.comparison.findings import FindingKind
from harness.comparison.plain import CauseData

KINDS: tuple[FindingKind, FindingKind] = ("close", "undecided")


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints, between which everything happened."""
    folder = tmp_path_factory.mktemp("sides")
    same, close, nan = torch.randn(6, 7), torch.randn(50), torch.tensor([math.nan, 1.0])
    one = {
        "same": same,
        "tied": same,
        "close": close,
        "different": torch.randn(5000),
        "complex": torch.ones(3, dtype=torch.complex64),
        "nan": nan,
        "gone": torch.ones(2),
        "left.out": torch.ones(2),
        "old.name": torch.arange(4.0),
        "shape": torch.ones(3),
    }
    other = {
        **one,
        "close": close + 1e-7,
        "different": one["different"] + 1,
        "complex": one["complex"] * 2j,
        "nan": torch.tensor([math.nan, 2.0]),
        "left.out": torch.zeros(2),
        "new.name": one["old.name"],
        "shape": torch.ones(4),
    }
    del other["gone"], other["old.name"]
    torch.save(one, folder / "one.pt")
    torch.save(other, folder / "other.pt")
    return folder / "one.pt", folder / "other.pt"


@pytest.fixture(scope="module")
def compared(sides: tuple[Path, Path]) -> Comparison:
    return harness.diff(*sides, policy=Policy(ignore=("left.*",)))


def test_a_comparison_is_true_where_it_passes(
    sides: tuple[Path, Path], compared: Comparison
) -> None:
    assert harness.diff(sides[0], sides[0])
    assert not compared
    close, undecided = (
        replace(compared, findings=(Finding(kind=kind, key="w"),)) for kind in KINDS
    )
    assert (close.verdict, undecided.verdict) == KINDS
    assert close
    assert not undecided


def test_rows_have_one_flat_dict_per_tensor(compared: Comparison) -> None:
    rows = {row["key"]: row for row in compared.rows()}
    assert {key: row["kind"] for key, row in rows.items()} == {
        "same": "identical",
        "tied": "identical",
        "close": "close",
        "different": "different",
        "complex": "different",
        "nan": "different",
        "gone": "missing",
        "left.out": "ignored",
        "old.name": "renamed",
        "shape": "shape",
    }
    assert len({tuple(row) for row in rows.values()}) == 1  # the same names in all
    assert not any(isinstance(v, dict) for row in rows.values() for v in row.values())
    assert rows["same"]["causes"] == []
    assert rows["different"]["cause"] == rows["different"]["causes"][0]["text"]
    assert rows["different"]["causes"][0]["kind"] == "shifted"
    assert rows["same"]["expected_shape"] == (6, 7)
    assert rows["same"]["actual_dtype"] == "float32"
    assert rows["old.name"]["actual_key"] == "new.name"
    assert rows["gone"]["actual_dtype"] is None
    assert rows["different"]["max_abs_lower"] == pytest.approx(1.0, abs=1e-5)
    assert rows["different"]["num_beyond"] == 5000
    assert math.isnan(rows["same"]["rms"])


def test_to_dict_is_what_the_json_report_says_of_the_stage(
    compared: Comparison, tmp_path: Path
) -> None:
    compared.write(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    [golden] = report["goldens"]
    assert golden["stages"] == [compared.to_dict()]
    assert compared.to_dict()["verdict"] == "different"
    findings = {finding["key"]: finding for finding in compared.to_dict()["findings"]}
    assert findings["complex"]["elements"][0]["actual"] == [0.0, 2.0]
    assert findings["nan"]["elements"][0] == {"index": [0], "expected": "NaN", "actual": "NaN"}
    assert findings["old.name"]["causes"][0]["kind"] == "moved"
    assert findings["gone"]["expected"] == "float32 [2]"
    assert "why" not in findings["gone"]


@pytest.mark.parametrize("suffix", ["html", "md", "xml", "json"])
def test_write_makes_the_report_of_the_suffix(
    compared: Comparison, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"report.{suffix}"
    compared.write(str(path))
    compared.write(path)  # a report may be replaced
    assert "old.name" in path.read_text()


def test_write_refuses_other_suffixes_and_other_files(compared: Comparison, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"report\.pdf: unknown format; a report is") as caught:
        compared.write(tmp_path / "report.pdf")
    assert "--report" not in f"{caught.value}{caught.value.hint}"
    other = tmp_path / "index.json"
    other.write_text('{"weight_map": {}}')
    with pytest.raises(UsageError, match="exists, and is not a report"):
        compared.write(other)
    assert other.read_text() == '{"weight_map": {}}'


def test_a_mismatch_carries_its_comparison(compared: Comparison) -> None:
    with pytest.raises(GoldenMismatch) as caught:
        compared.raise_for_mismatch()
    assert caught.value.comparison is compared
    assert str(caught.value) == str(compared)
    assert str(compared).startswith("FAIL different  ")


def test_a_notebook_shows_a_compact_table(sides: tuple[Path, Path], compared: Comparison) -> None:
    page = compared._repr_html_()
    assert page.count("<tr>") == 1 + len(compared.findings)
    assert "new.name" in page
    assert "<table>" not in harness.diff(sides[0], sides[0])._repr_html_()


def test_a_notebook_takes_no_markup_from_a_key_and_no_table_without_end() -> None:
    keys = [f"<script>{number}</script>" for number in range(100)]
    one = harness.fingerprint({key: torch.ones(1) for key in keys})
    from harness.comparison.compare import compare
    from harness.comparison.measuring import BySketches

    compared = compare(
        one, harness.fingerprint({"x": torch.ones(1)}), Policy(), BySketches(one.block_nbytes)
    )
    page = compared._repr_html_()
    assert "<script>" not in page
    assert page.count("<tr>") <= 21
    assert "more: str(comparison)" in page


def test_each_fact_of_a_cause_has_a_type_in_the_report() -> None:
    assert set(CauseData.__struct_fields__) == {one.name for one in fields(Cause)}


def _values(data: Path, shipped: Path) -> dict[str, Any]:
    compared = harness.verify(data / "nest_tiny_perturbed_1e-3.nemo", shipped)
    golden = harness.read_golden(shipped)
    [finding] = compared.findings
    return {
        "comparison": compared,
        "golden": golden,
        "live": golden.live,
        "fingerprint": golden.fingerprint,
        "tensor": next(iter(golden.fingerprint.tensors.values())),
        "finding": finding,
        "difference": finding.difference,
        "checkpoint": harness.open_checkpoint(data / "nest_tiny.nemo"),
    }


def test_every_value_is_one_short_line(data: Path, shipped_golden: Path) -> None:
    for value in _values(data, shipped_golden).values():
        shown = repr(value)
        assert len(shown) < 200, shown
        assert shown.isprintable()
        assert shown.startswith(f"<{type(value).__name__} ")


def test_a_long_or_hostile_name_stays_one_short_line() -> None:
    key = "\x1b[31m\n" * 5000
    found = harness.fingerprint({key: torch.ones((1,) * 60)})
    for value in (found, *found.tensors.values()):
        assert len(repr(value)) < 200
        assert repr(value).isprintable()
