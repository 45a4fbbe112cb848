"""A state dict that does not fit its module: torch's complaint in a line, and as a comparison.

In: the text of the RuntimeError of `load_state_dict`, which lists every key; or the module and the
state dict. Out: how many keys are missing, unexpected and of another shape, and the first patterns
of each; or a `Comparison` of the state dict with the module, by keys and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from harness.checkpoint.tensors import Checkpoint
from harness.comparison.compare import compare
from harness.comparison.comparison import Comparison
from harness.comparison.measuring import BySketches
from harness.comparison.policy import Policy
from harness.fingerprints.fingerprint import Fingerprint, structure
from harness.model.state import as_checkpoint
from harness.text.folding import fold

if TYPE_CHECKING:
    from harness.model.loading import NotLoaded

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
        _by_shape(as_checkpoint({k: v for k, v in state.items() if torch.is_tensor(v)}, of))
        for state, of in (
            (error.state, name),
            (error.module.state_dict(), f"what {type(error.module).__name__} loads"),
        )
    )
    plain = Policy(check_dtype=False)
    compared = compare(expected, actual, plain, BySketches(expected.block_nbytes), stage=stage)
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


def _by_shape(checkpoint: Checkpoint) -> Fingerprint:
    """The structure of a state, with digests that are equal where shapes are."""
    found = structure(checkpoint)
    tensors = {
        key: replace(tensor, digest=repr(tensor.shape).encode(), alias_of=None)
        for key, tensor in found.tensors.items()
    }
    return replace(found, tensors=tensors, keeps_aliases=False)


def _patterns(keys: Sequence[str], max_patterns: int) -> str:
    folded = [pattern for pattern, _ in fold(keys, ellipsis="..")]
    more = ", …" if len(folded) > max_patterns else ""
    return ", ".join(folded[:max_patterns]) + more
