"""What a checkpoint carries beside its weights: configuration, hyperparameters, files.

In: two fingerprints. Out: a finding for each setting that is another one, and one line for all that
only say where or when a model was trained. Nothing where one side carries nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from harness.checkpoint.formats.nemo import CONFIG
from harness.comparison.findings import Finding
from harness.fingerprints.fingerprint import Fingerprint
from harness.text.disclosure import disclosed
from harness.text.folding import printable

_MAX_NAMED = 4
# A part of a path that says where the data is, what wrote the file, or when.
_CIRCUMSTANCE = re.compile(
    r"(train|val|valid|validation|test|predict)_(ds|data|dataset|dataloader)|data|dataset|datasets"
    r"|datamodule|exp_manager|loggers?|wandb|hostname|.*version|.*(path|dir|directory|folder)s?"
    r"|.*manifests?|.*file(name|path)?s?|(.*_)?(date|time|timestamp|created_at)|(run|exp)_(name|id)"
)
_OF_NEMO = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}_")  # before each name, another in each archive
_NOTHING = "nothing"


def config_findings(
    expected: Fingerprint, actual: Fingerprint, *, is_note: bool
) -> tuple[list[Finding], str]:
    """What is set otherwise, with both values; and a note of what does not matter, or ""."""
    changes: list[Finding] = []
    elsewhere: Counter[str] = Counter()
    for key, before, after in _changes(expected.config, actual.config):
        circumstance = next(filter(_CIRCUMSTANCE.fullmatch, key.split(".")), None)
        if circumstance is not None or _are_places(before, after):
            elsewhere[circumstance or key] += 1
        else:
            changes.append(_finding(key, before, after, is_note=is_note))
    ours, theirs = _named(expected.members), _named(actual.members)
    if expected.members and actual.members:
        changes += [
            _finding(name, ours.get(name), theirs.get(name), is_note=is_note)
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]
    return changes, _note(elsewhere)


def _finding(key: str, before: str | None, after: str | None, *, is_note: bool) -> Finding:
    return Finding(
        kind="config",
        key=key,
        expected=_NOTHING if before is None else before,
        actual=_NOTHING if after is None else after,
        is_note=is_note,
    )


def _changes(
    expected: Mapping[str, Any] | None, actual: Mapping[str, Any] | None
) -> Iterator[tuple[str, str | None, str | None]]:
    """The settings that differ, by dotted path, in the order of the expected side."""
    if not expected or not actual or expected is actual:
        return
    ours, theirs = (dict(_leaves(disclosed(_unwrapped(side)))) for side in (expected, actual))
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            yield key, ours.get(key), theirs.get(key)


def _unwrapped(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """NeMo's .ckpt has under `cfg`, its one hyperparameter, what its .nemo has at the top."""
    inside = config.get("cfg")
    return inside if len(config) == 1 and isinstance(inside, Mapping) else config


def _leaves(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted path, as text: a list of plain values is one, NaN is equal to itself."""
    if isinstance(config, Mapping) and config:
        for key, child in config.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(config, (list, tuple)) and any(isinstance(c, (Mapping, list)) for c in config):
        for index, child in enumerate(config):
            yield from _leaves(child, f"{path}.{index}")
    else:
        yield path, _text(config)


def _text(value: Any) -> str:
    """A value as YAML has it."""
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return _OF_NEMO.sub("", text)


def _are_places(*values: str | None) -> bool:
    """Whether all of some values are paths, of which the golden keeps the last part."""
    return all(value is None or value.startswith("…/") for value in values)


def _named(members: Mapping[str, str]) -> dict[str, str]:
    """Files by the name that the configuration has for them, unless two would have the same."""
    files = {name: what for name, what in members.items() if name != CONFIG}
    short = {_OF_NEMO.sub("", name): what for name, what in files.items()}
    return short if len(short) == len(files) else files


def _note(elsewhere: Counter[str]) -> str:
    if not elsewhere:
        return ""
    named = [
        printable(name) + (f" ({count:,})" if count > 1 else "")
        for name, count in elsewhere.most_common(_MAX_NAMED)
    ]
    more = f", and {len(elsewhere) - _MAX_NAMED:,} more" if len(elsewhere) > _MAX_NAMED else ""
    said = (
        "1 setting that only says where or when also differs"
        if elsewhere.total() == 1
        else f"{elsewhere.total():,} settings that only say where or when also differ"
    )
    return f"{said}: {', '.join(named)}{more}"
