"""The next steps: what a person can do about what a comparison found.

In: a `Comparison`. Out: policies that look past what it found, as values (`ways_past`), and what
else to do (`advice`, `converted`); `harness.cli.steps` makes lines of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.comparison.causes.accepting import words_to_accept
from harness.comparison.comparison import Comparison
from harness.comparison.findings import Finding
from harness.comparison.mapping import changed_prefix
from harness.comparison.matching import match
from harness.comparison.renaming import renaming
from harness.errors import UsageError

_FIX_THE_CODE = (
    "the golden holds the file, not what the code makes of it: fix the code, "
    "or save the model as a new checkpoint and record that"
)
_CHANGE_THEM = "what --must-change names did not change: change it, or leave out --must-change"
_GET_IT_AGAIN = "bytes of the checkpoint changed since they were saved: get the file again"
_MAX_TRIED = 1000  # new names that the first missing one might have


def advice(comparison: Comparison) -> str | None:
    """What to do where no update accepts what was found; None where one does."""
    kinds = {finding.kind for finding in comparison.findings if finding.fails}
    if "damaged" in kinds:
        return _GET_IT_AGAIN
    held = {"requires_grad"} if comparison.stage == "load" else set()
    if not comparison.can_be_recorded and kinds - held:
        return _FIX_THE_CODE
    return _CHANGE_THEM if kinds == {"unchanged"} else None


def converted(comparison: Comparison) -> Mapping[str, Any] | None:
    """The policy under which a converted checkpoint verifies, where the old one does not load."""
    if not comparison.is_unloaded:
        return None
    new_names = renaming(comparison)
    fields = dict(new_names[1]) if new_names is not None else {}
    words = _words_beside(new_names, comparison)
    return fields | {"accept": (*comparison.policy.accept, *words)} if words else fields or None


def _words_beside(new_names: object, comparison: Comparison) -> tuple[str, ...]:
    """The words that accept what was found; of names, maps say which."""
    words = words_to_accept(comparison)
    return tuple(w for w in words if new_names is None or w not in ("renamed", "moved"))


def ways_past(comparison: Comparison) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield fields of a `Policy` that look past what was found, with what it is in a few words.

    They stand in place of those fields of the policy that there was, and go with its others. None
    makes a state dict load that does not.
    """
    if comparison.is_unloaded:
        return
    for what, fields in _ways_past(comparison):
        try:
            match(comparison.expected, comparison.actual, replace(comparison.policy, **fields))
        except UsageError:  # without its prefix a key may be another one, or not that of a --map
            continue
        yield what, fields


def _ways_past(comparison: Comparison) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if comparison.stage == "outputs":  # whose names follow those of the weights
        return
    failing = [finding for finding in comparison.findings if finding.fails]
    kinds = {finding.kind for finding in failing}
    policy = comparison.policy
    new_names = renaming(comparison)
    if new_names is not None:
        yield new_names
    for finding in failing if new_names is None else ():
        if finding.kind == "prefix" and finding.expected == "no prefix":
            yield "ignore the prefix", {"strip_prefix": policy.strip_prefix + finding.key}
        is_lost = finding.kind == "prefix" and finding.actual == "no prefix"
        if is_lost and not policy.key_map and "=" not in finding.key:
            yield "ignore the prefix", {"key_map": ((finding.key, ""),)}
    if comparison.stage == "file" and kinds == {"dtype"}:
        yield "ignore the dtype", {"check_dtype": False}
    if new_names is not None and kinds == {"renamed"}:
        return
    # The new names are there already, in a form that says which.
    words = _words_beside(new_names, comparison)
    if words and all(f.kind != "prefix" for f in failing):
        yield f"accept {', '.join(words)}", {"accept": (*policy.accept, *words)}
    if kinds == {"missing", "unexpected"}:
        moved = None if policy.key_map else _moved(failing, comparison)
        if moved is not None:
            yield "accept the new names, if they are renamed", {"key_map": (moved,)}


def _moved(findings: Sequence[Finding], comparison: Comparison) -> tuple[str, str] | None:
    """The one prefix that makes all the missing keys the unexpected ones, of the same shapes."""
    strip = comparison.policy.strip_prefix
    missing = {f.key: f.expected for f in findings if f.kind == "missing"}
    there = {f.key.removeprefix(strip): f.actual for f in findings if f.kind == "unexpected"}
    if len(missing) != len(there) or "=" in "".join(missing):
        return None
    first = next(iter(missing))
    for candidate in list(there)[:_MAX_TRIED]:
        old, new = changed_prefix(first, candidate)
        # Two names for one tensor may be anything; of several, the rest of each must agree.
        if not old.endswith(".") or not all(key.startswith(old) for key in missing):
            continue
        if all(there.get(new + key[len(old) :]) == said for key, said in missing.items()):
            stay = comparison.expected.tensors.keys() - missing
            return None if any(key.startswith(old) for key in stay) else (old, new)
    return None
