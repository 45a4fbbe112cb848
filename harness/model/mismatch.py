"""A state dict that does not fit its module: torch's complaint in a line, and as a comparison.

In: the text of the RuntimeError of `load_state_dict`, which lists every key; or the module and the
state dict. Out: how many keys are missing, unexpected and of another shape, and the first patterns
of each; or a `Comparison` of the state dict with the module, by keys and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from harness.checkpoint.tensors import Checkpoint
from harness.comparison.cause import Cause
from harness.comparison.causes import regrouped, weight_norm
from harness.comparison.causes.elsewhere import moved_from
from harness.comparison.causes.ledger import Ledger
from harness.comparison.compare import compare
from harness.comparison.comparison import Comparison
from harness.comparison.findings import Finding, describe
from harness.comparison.measuring import BySketches
from harness.comparison.policy import Policy
from harness.fingerprints.fingerprint import Fingerprint, structure
from harness.model.state import as_checkpoint, plain_tensors
from harness.model.values import with_values
from harness.text.folding import fold

if TYPE_CHECKING:
    from harness.model.loading import NotLoaded

_KEYS_ALONE = ("missing", "unexpected", "renamed")
_MAX_PATTERNS = 3
_MAX_OTHER = 300
_KEYS = re.compile(r'"([^"]*)"')
_SHAPE = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[.*?\])\) from checkpoint,"
    r" the shape in current model is torch\.Size\((\[.*?\])\)"
)


def brief_mismatch(text: str) -> str:
    """Condense torch's message; another message is cut to a line."""
    missing = _listed(text, "Missing key(s) in state_dict:")
    unexpected = _listed(text, "Unexpected key(s) in state_dict:")
    shapes = {key: f"file {ours}, model {theirs}" for key, ours, theirs in _SHAPE.findall(text)}
    said = [
        f"{what} keys: {brief_keys(keys)}"
        for keys, what in ((missing, "missing"), (unexpected, "unexpected"))
        if keys
    ]
    if shapes:
        key, both = next(iter(shapes.items()))
        said.append(f"other shapes: {len(shapes):,} ({key}: {both})")
    line = " ".join(text.split())
    return ", ".join(said) or (line if len(line) <= _MAX_OTHER else line[:_MAX_OTHER] + " …")


def _listed(text: str, heading: str) -> list[str]:
    for line in text.splitlines():
        if heading in line:
            return _KEYS.findall(line.partition(heading)[2])
    return []


def brief_keys(keys: Sequence[str], max_patterns: int = _MAX_PATTERNS) -> str:
    """How many keys, and the first patterns of them."""
    return f"{len(keys):,} ({_patterns(keys, max_patterns)})"


def of_failed_load(
    error: NotLoaded, name: str, policy: Policy, stage: Literal["load", "reload"]
) -> Comparison:
    """What a state dict holds against what its module wants, by keys and shapes.

    Keys of one shape and of like names are taken for renamed; what is tied to a key that is there
    is not missing. Nothing was loaded, so that values say nothing.
    """
    expected, actual = (
        _by_shape(with_values(as_checkpoint(plain_tensors(state), of), state))
        for state, of in (
            (error.state, name),
            (error.module.state_dict(), f"what {type(error.module).__name__} loads"),
        )
    )
    plain = Policy(check_dtype=False)
    compared = compare(expected, actual, plain, BySketches(expected.block_nbytes), stage=stage)
    compared = replace(compared, findings=tuple(_explained(compared)))
    return replace(
        compared,
        policy=policy,
        num_identical=0,
        notes=(
            "it does not load, so only keys and shapes were compared, and no later stage ran: "
            f"{compared.num_identical:,} of {len(expected.tensors):,} agree",
            f"torch says: {error}",
        ),
        no_common_key=False,
        is_unloaded=True,
    )


def _explained(compared: Comparison) -> Iterator[Finding]:
    """The findings, with what was stacked, joined or split, as keys and shapes tell it."""
    ledger = Ledger(_unnormed(compared))
    alone = [finding for finding in ledger if not finding.causes]
    missing, unexpected = (
        {f.key: side.tensors[f.key] for f in alone if f.kind == kind}
        for kind, side in (("missing", compared.expected), ("unexpected", compared.actual))
    )
    for group in regrouped.by_names(missing, unexpected):
        ledger.rename(group.expected, group.actual, group.causes)
    for finding in alone:
        form = weight_norm.other_form(finding.key, finding.actual_key or "")
        if form is not None:
            moved = moved_from(finding.key)
            ledger.explain(finding, *(replace(one, proof="names") for one in (moved, form)))
    return iter(ledger)


def _unnormed(compared: Comparison) -> Iterator[Finding]:
    """The findings, with what weight norm has been to keys that are alike in shape by chance."""
    found = {kind: [f for f in compared.findings if f.kind == kind] for kind in _KEYS_ALONE}
    missing = [f.key for kind in ("missing", "renamed") for f in found[kind]]
    unexpected = [f.actual_key or f.key for kind in ("unexpected", "renamed") for f in found[kind]]
    expected = {key: compared.expected.tensors[key] for key in missing}
    actual = {key: compared.actual.tensors[key] for key in unexpected}
    causes: dict[str, Cause] = {}
    for keys, cause in weight_norm.by_names(expected, actual):
        causes |= dict.fromkeys(keys, cause)
    for finding in compared.findings:
        there = finding.actual_key or finding.key
        if finding.kind not in _KEYS_ALONE or not {finding.key, there} & causes.keys():
            yield finding
        elif finding.kind != "renamed":
            yield replace(finding, causes=(causes[finding.key],))
        else:
            key, held, wanted = finding.key, expected[finding.key], actual[there]
            lone, own = (() if k not in causes else (causes[k],) for k in (key, there))
            yield Finding(kind="missing", key=key, expected=describe(held), causes=lone)
            yield Finding(kind="unexpected", key=there, actual=describe(wanted), causes=own)


def _by_shape(checkpoint: Checkpoint) -> Fingerprint:
    """The structure of a state, with digests that are equal where shapes are."""
    found = structure(checkpoint)
    tensors = {
        key: replace(tensor, digest=repr(tensor.shape).encode(), alias_of=None)
        for key, tensor in found.tensors.items()
        if not tensor.dtype.is_value
    }
    return replace(found, tensors=tensors, keeps_aliases=False)


def _patterns(keys: Sequence[str], max_patterns: int) -> str:
    folded = [pattern for pattern, _ in fold(keys, ellipsis="..")]
    more = ", …" if len(folded) > max_patterns else ""
    return ", ".join(folded[:max_patterns]) + more
