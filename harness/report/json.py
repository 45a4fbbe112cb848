"""Reports, fingerprints and errors as JSON, by type.

In: results, fingerprints, errors. Out: plain data for `json.dumps`. `schema()` is the JSON Schema
of `Report` (verify, diff, roundtrip) and `Listing` (show --json), to which later versions only add,
and of the two texts in a golden. How numbers are written is in `harness.comparison.plain`.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from harness.comparison.findings import describe
from harness.comparison.plain import Side, StageData, StatsData, plain, stage_data, stats_data
from harness.errors import HarnessError
from harness.fingerprints.fingerprint import Fingerprint
from harness.golden.golden import Golden, Update
from harness.golden.header import Contents, Header
from harness.report.outcome import Outcome, Result
from harness.text.disclosure import disclosed


class ErrorData(msgspec.Struct, frozen=True, kw_only=True):
    """What could not be done, and the next step."""

    kind: str
    message: str
    hint: str | None


class OutcomeData(msgspec.Struct, frozen=True, kw_only=True):
    """What one golden, or one pair of checkpoints, came to."""

    golden: str | None
    checkpoint: str | None
    root: dict[Side, str] | UnsetType = UNSET
    stages: tuple[StageData, ...]
    error: ErrorData | UnsetType = UNSET
    updated: bool | UnsetType = UNSET
    next_steps: tuple[str, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What verify, diff and roundtrip print: `error` where nothing could be compared."""

    exit_code: int
    goldens: tuple[OutcomeData, ...] | UnsetType = UNSET
    error: ErrorData | UnsetType = UNSET


class TensorData(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    alias_of: str | None
    value: str | UnsetType = UNSET
    stats: StatsData | None


class SectionData(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a file that was not looked at."""

    section: str
    num_tensors: int | None


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What show prints; `history` of a golden alone."""

    root: str
    container: str
    section: str
    other_sections: tuple[SectionData, ...]
    not_read: tuple[str, ...]
    config: Any
    members: dict[str, str]
    tensors: tuple[TensorData, ...]
    history: tuple[Update, ...] | UnsetType = UNSET


def render(result: Result) -> str:
    """The whole report as a file."""
    return json.dumps(result_as_json(result), indent=2) + "\n"


def schema() -> Any:
    """The JSON Schema of a report, of what `show --json` prints, and of a golden's two texts."""
    documents, components = msgspec.json.schema_components(
        (Report, Listing, Header, Contents), ref_template="#/$defs/{name}"
    )
    found = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "harness: a report, a listing of tensors, or the header or contents of a golden",
        "anyOf": list(documents),
        "$defs": components,
    }
    return msgspec.json.decode(msgspec.json.encode(found))  # whose defaults are Structs


def result_as_json(result: Result) -> Any:
    """What `--format json` prints."""
    errors = [outcome.error for outcome in result.outcomes if outcome.error is not None]
    stages = [stage for outcome in result.outcomes for stage in outcome.stages]
    return plain(
        Report(
            exit_code=result.exit_code,
            goldens=tuple(map(_outcome, result.outcomes)),
            error=_error(errors[0]) if errors and not stages else UNSET,
        )
    )


def _outcome(outcome: Outcome) -> OutcomeData:
    return OutcomeData(
        golden=outcome.expected,
        checkpoint=outcome.actual,
        root=_roots(outcome),
        stages=tuple(map(stage_data, outcome.stages)),
        error=UNSET if outcome.error is None else _error(outcome.error),
        updated=UNSET if outcome.updated is None else outcome.updated,
        next_steps=outcome.next_steps,
    )


def _roots(outcome: Outcome) -> dict[Side, str] | UnsetType:
    """Those of the file, where all of it was read."""
    for stage in outcome.stages[:1]:
        sides = (stage.expected, stage.actual)
        if stage.stage == "file" and all(
            tensor.digest is not None for side in sides for tensor in side.tensors.values()
        ):
            return {"expected": stage.expected.root.hex(), "actual": stage.actual.root.hex()}
    return UNSET


def _error(error: HarnessError) -> ErrorData:
    return ErrorData(kind=error.kind, message=str(error), hint=error.hint)


def fingerprint_as_json(fingerprint: Fingerprint, golden: Golden | None = None) -> Any:
    """What `show --json` prints."""
    return plain(
        Listing(
            root=fingerprint.root.hex(),
            container=fingerprint.container,
            section=fingerprint.section,
            other_sections=tuple(
                SectionData(section=name, num_tensors=count) for name, count in fingerprint.others
            ),
            not_read=fingerprint.unread,
            config=disclosed(fingerprint.config),
            members=dict(sorted(fingerprint.members.items())),
            tensors=tuple(
                TensorData(
                    key=tensor.key,
                    dtype=tensor.dtype.name,
                    shape=tensor.shape,
                    digest=(tensor.digest or b"").hex(),
                    alias_of=tensor.alias_of,
                    value=describe(tensor) if tensor.dtype.is_value else UNSET,
                    stats=stats_data(tensor.stats),
                )
                for tensor in fingerprint.tensors.values()
            ),
            history=UNSET if golden is None else golden.history,
        )
    )


def error_as_json(error: HarnessError) -> Any:
    """A document of an error alone."""
    return plain(Report(exit_code=2, error=_error(error)))
