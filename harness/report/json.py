"""Comparisons, checkpoints and errors as plain data for JSON.

The schema, to which later versions only add:

    verify, diff  {"exit_code", "goldens": [{"golden", "checkpoint", "root": {"expected", "actual"},
                   "stages": [{"stage", "verdict", "num_identical", "num_ignored", "findings",
                   "notes", "not_compared": {"sections", "entries"},
                   "first_departure": {"diverging_module", "key", "inputs_agreeing",
                   "inputs_undecided", "inputs_diverging", "inputs_on_one_side", "num_before",
                   "num_close", "num_undecided"} | null}],
                   "error"?, "updated"?, "next_steps"}],
                   "error"?: the first, where it left nothing to compare}
    finding       {"kind", "key", "expected", "actual", "actual_key"?, "count"?, "causes"}, and for
                  close, different and undecided also
                  {"why", "is_exact", "atol", "rtol", "numel", "max_abs", "min_atol", "rms",
                   "num_differing", "num_beyond", "where", "strip", "elements", "chance",
                   "num_nonfinite": {"expected", "actual"}, "stats": {"expected", "actual"}}
    cause         {"kind": rounded, widened, moved, reshaped, transposed, joined, split, stacked,
                   rows, reordered, constant, scaled, shifted, sum, unrelated, weight_norm or
                   counter, "text", "proof", and its facts: "dtype", "of", "axes", "axis", …}; the
                   best first
    element       {"index", "expected", "actual"}
    stats         {"min", "max", "mean", "std", "l2", "num_zero", "num_nan", "num_posinf",
                   "num_neginf"} | null
    show          {"root", "container", "section", "other_sections": [{"section", "num_tensors"}],
                   "not_read", "config", "members": {name: size and digest}, "tensors": [{"key",
                   "dtype", "shape", "digest", "alias_of", "value"?, "stats"}], "history"?}
    error         {"kind", "message", "hint"}; alone, {"exit_code": 2, "error"}, where a command
                  was not understood or is none of the above

Intervals are [lower, upper]. Numbers that JSON lacks are the strings "NaN", "Infinity" and
"-Infinity"; complex ones are [real, imaginary].
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from harness.comparison.cause import Cause
from harness.comparison.comparison import Comparison
from harness.comparison.difference import Difference
from harness.comparison.findings import Divergence, Finding, describe
from harness.errors import HarnessError
from harness.fingerprints.fingerprint import Fingerprint
from harness.fingerprints.stats import Stats
from harness.report.outcome import Outcome, Result
from harness.text.disclosure import disclosed

Json = Any


def render(result: Result) -> str:
    """The whole report as a file."""
    return json.dumps(result_as_json(result), indent=2) + "\n"


def result_as_json(result: Result) -> Json:
    """What `--format json` prints."""
    found: dict[str, Json] = {
        "exit_code": result.exit_code,
        "goldens": [_outcome(outcome) for outcome in result.outcomes],
    }
    if not any(outcome.stages for outcome in result.outcomes):
        errors = [outcome.error for outcome in result.outcomes if outcome.error is not None]
        if errors:
            found["error"] = error_as_json(errors[0])
    return found


def _outcome(outcome: Outcome) -> Json:
    found: dict[str, Json] = {"golden": outcome.expected, "checkpoint": outcome.actual}
    for stage in outcome.stages[:1]:
        if stage.stage == "file" and all(
            t.digest is not None
            for side in (stage.expected, stage.actual)
            for t in side.tensors.values()
        ):
            found["root"] = {
                "expected": stage.expected.root.hex(),
                "actual": stage.actual.root.hex(),
            }
    found["stages"] = [comparison_as_json(stage) for stage in outcome.stages]
    if outcome.error is not None:
        found["error"] = error_as_json(outcome.error)
    if outcome.updated is not None:
        found["updated"] = outcome.updated
    found["next_steps"] = list(outcome.next_steps)
    return found


def comparison_as_json(comparison: Comparison) -> Json:
    """One stage of one golden."""
    return {
        "stage": comparison.stage,
        "verdict": comparison.verdict,
        "num_identical": comparison.num_identical,
        "num_ignored": comparison.num_ignored,
        "findings": [_finding(finding) for finding in comparison.findings],
        "notes": list(comparison.notes),
        "not_compared": {
            "sections": [name for name, _ in comparison.actual.others],
            "entries": sorted({*comparison.expected.unread, *comparison.actual.unread}),
        },
        "first_departure": None
        if comparison.divergence is None
        else divergence_lines(comparison.divergence),
    }


def divergence_lines(divergence: Divergence) -> Json:
    return {
        "diverging_module": divergence.diverging_module,
        "key": divergence.finding.key,
        "inputs_agreeing": list(divergence.agreeing),
        "inputs_undecided": list(divergence.undecided),
        "inputs_diverging": list(divergence.diverging),
        "inputs_on_one_side": list(divergence.alone),
        "num_before": divergence.num_before,
        "num_close": divergence.num_close,
        "num_undecided": divergence.num_undecided,
    }


def _finding(finding: Finding) -> Json:
    found: dict[str, Json] = {
        "kind": finding.kind,
        "key": finding.key,
        "expected": finding.expected,
        "actual": finding.actual,
    }
    if finding.actual_key is not None:
        found["actual_key"] = finding.actual_key
    if finding.kind == "prefix":
        found["count"] = finding.count
    found["causes"] = [cause_as_json(cause) for cause in finding.causes]
    if finding.difference is not None:
        found |= _difference(finding.difference)
    return found


def cause_as_json(cause: Cause) -> dict[str, Json]:
    """What happened: kind, words, proof and facts."""
    facts = {k: number(v) if isinstance(v, float) else v for k, v in cause.facts.items()}
    return {"kind": cause.kind, "text": cause.text, "proof": cause.proof, **facts}


def _difference(difference: Difference) -> dict[str, Json]:
    return {
        "why": difference.why,
        "is_exact": difference.is_exact,
        "atol": difference.tolerance.atol,
        "rtol": difference.tolerance.rtol,
        "numel": difference.numel,
        "max_abs": [number(end) for end in difference.max_abs],
        "min_atol": [number(end) for end in difference.min_atol],
        "rms": number(difference.rms),
        "num_differing": difference.num_differing,
        "num_beyond": difference.num_beyond,
        "where": difference.where,
        "strip": [number(value) for value in difference.strip],
        "elements": [
            {
                "index": list(element.index),
                "expected": number(element.expected),
                "actual": number(element.actual),
            }
            for element in difference.elements
        ],
        "num_nonfinite": dict(zip(("expected", "actual"), difference.num_nonfinite, strict=True)),
        "stats": dict(zip(("expected", "actual"), map(_stats, difference.stats), strict=True)),
        "chance": difference.chance,
    }


def _stats(stats: Stats | None) -> Json:
    return None if stats is None else {k: number(v) for k, v in asdict(stats).items()}


def number(value: float | complex | int | bool) -> Json:
    """A number as JSON can hold it."""
    if isinstance(value, complex):
        return [number(value.real), number(value.imag)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def fingerprint_as_json(fingerprint: Fingerprint) -> Json:
    """What `show --json` prints."""
    return {
        "root": fingerprint.root.hex(),
        "container": fingerprint.container,
        "section": fingerprint.section,
        "other_sections": [
            {"section": name, "num_tensors": count} for name, count in fingerprint.others
        ],
        "not_read": list(fingerprint.unread),
        "config": disclosed(fingerprint.config),
        "members": dict(sorted(fingerprint.members.items())),
        "tensors": [
            {
                "key": tensor.key,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape),
                "digest": (tensor.digest or b"").hex(),
                "alias_of": tensor.alias_of,
                **({"value": describe(tensor)} if tensor.dtype.is_value else {}),
                "stats": _stats(tensor.stats),
            }
            for tensor in fingerprint.tensors.values()
        ],
    }


def error_as_json(error: HarnessError) -> Json:
    """The error object alone."""
    return {"kind": error.kind, "message": str(error), "hint": error.hint}
