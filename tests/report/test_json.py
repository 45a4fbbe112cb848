"""Reports as JSON: what is printed is what the schema says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import safetensors
import torch

from harness import api
from harness.errors import CheckpointError
from harness.golden.header import Contents, Header
from harness.report.json import Listing, Report, error_as_json, render, result_as_json, schema
from tests.conftest import Harness
from tests.report.samples import HOSTILE, comparison, diverged, missing, outcome, result


def fits(found: Any, kind: Any) -> Any:
    """What was printed, read by its type: nothing missing, nothing of another type, no more."""
    printed = json.loads(json.dumps(found))
    assert json.loads(json.dumps(msgspec.to_builtins(msgspec.convert(printed, kind)))) == printed
    jsonschema.validate(printed, {**schema(), "anyOf": [{"$ref": f"#/$defs/{kind.__name__}"}]})
    return printed


@pytest.mark.parametrize(
    "outcomes",
    [
        [outcome(comparison(), comparison(missing("a"), notes=("x",)))],
        [outcome(diverged("encoder"), next_steps=("harness verify",), updated=True)],
        [outcome(error=CheckpointError("m.pt: gone", hint="look")), outcome(comparison())],
        [outcome(error=CheckpointError("m.pt: gone"))],
        [outcome(comparison(*map(missing, HOSTILE)), actual=None)],
        [],
    ],
)
def test_a_report_fits_its_schema(outcomes: list[Any]) -> None:
    found = fits(result_as_json(result(*outcomes)), Report)
    assert json.loads(render(result(*outcomes))) == found
    assert len(found["goldens"]) == len(outcomes)


def test_the_error_of_all_stands_at_the_top_where_nothing_was_compared() -> None:
    error = CheckpointError("m.pt: gone", hint="look")
    found = result_as_json(result(outcome(error=error)))
    assert found["error"] == {"kind": "checkpoint", "message": "m.pt: gone", "hint": "look"}
    assert found["error"] == error_as_json(error)["error"]
    assert "error" not in result_as_json(result(outcome(comparison(), error=error)))


def test_measured_findings_fit_the_schema(tmp_path: Path) -> None:
    """Numbers that JSON lacks, too, from both sides or by sketches."""
    one = {
        "w": torch.randn(9000),
        "c": torch.ones(3, dtype=torch.complex64),
        "n": torch.tensor([float("nan"), float("inf"), 1.0]),
        "b": torch.tensor([True]),
        "i": torch.tensor([1]),
    }
    other = {key: ~value if key == "b" else -value for key, value in one.items()}
    torch.save(one, tmp_path / "one.pt")
    torch.save(other, tmp_path / "other.pt")
    golden = api.record(tmp_path / "one.pt", tmp_path / "g.safetensors")
    for found in (
        api.verify(tmp_path / "other.pt", golden),
        api.diff(tmp_path / "one.pt", tmp_path / "other.pt", stats=True),
    ):
        found = replace(found, expected=golden.fingerprint)
        printed = fits(result_as_json(result(outcome(found))), Report)
        assert len(printed["goldens"][0]["stages"][0]["findings"]) == 5


def test_commands_print_what_the_schema_says(harness: Harness, data: Path, tmp_path: Path) -> None:
    original, changed = data / "nest_tiny.nemo", data / "nest_tiny_perturbed_1e-3.nemo"
    golden = tmp_path / "g.safetensors"
    harness("record", original, "-g", golden)
    fits(harness("diff", original, changed, "--format", "json").json, Report)
    fits(harness("verify", "missing.pt", "--format", "json").json, Report)
    assert "history" not in fits(harness("show", original, "--json").json, Listing)
    assert fits(harness("show", golden, "--json").json, Listing)["history"] == []
    assert harness("schema").json == schema()


def test_the_schema_is_closed_in_itself_and_names_every_kind_of_finding() -> None:
    text = json.dumps(schema())
    names = {part.partition('"')[0] for part in text.split("#/$defs/")[1:]}
    assert names <= {*schema()["$defs"]}
    assert {"Report", "Listing", "Header", "Contents"} <= names
    assert "hyperparameter" in schema()["$defs"]["FindingData"]["properties"]["kind"]["enum"]


def test_the_header_and_contents_of_a_golden_fit_the_schema(shipped_golden: Path) -> None:
    with safetensors.safe_open(shipped_golden, "np") as opened:
        fits(json.loads(opened.metadata()["harness"]), Header)
        fits(json.loads(opened.get_tensor("contents").tobytes()), Contents)


@pytest.mark.parametrize("change", [{"exit_code": "1"}, {"goldens": [{}]}, {"error": 5}])
def test_the_schema_refuses_what_no_report_is(change: Any) -> None:
    printed = result_as_json(result(outcome(comparison())))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**printed, **change}, schema())
