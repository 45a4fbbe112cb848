"""torch's complaint about a state dict that does not fit, in one line that a person can read.

In: the text of the RuntimeError of `load_state_dict`, which lists every key. Out: how many keys are
missing, unexpected and of another shape, and the first patterns of each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.text.folding import fold

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
        f"{what} keys: {len(keys):,} ({_patterns(keys)})"
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


def _patterns(keys: Sequence[str]) -> str:
    folded = [pattern for pattern, _ in fold(keys, ellipsis="..")]
    more = ", …" if len(folded) > _MAX_PATTERNS else ""
    return ", ".join(folded[:_MAX_PATTERNS]) + more
