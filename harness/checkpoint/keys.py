"""Keys of tensors: how the path to an entry is spelled as one text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

# json.dumps makes an encoder a call, which takes longer than the text of a step.
_quoted = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Component:
    """A step of a key's path that the file does not spell: one part of a composite tensor."""

    name: str


def format_key(path: Sequence[object]) -> str:
    """Render the place of a tensor in nested containers as one unambiguous string.

    A plain string key stays unchanged (`encoder.weight`); further steps follow in brackets as
    Python would write them (`state[0]["exp.avg"]`), parts of composite tensors without quotes
    (`weight[int_repr]`). A first key that holds a bracket is quoted, so no two paths collide.
    The result is always valid text: what UTF-8 cannot encode is escaped.
    """
    first, *rest = path
    plain = isinstance(first, str) and "[" not in first and first != "" and encodes(first)
    head = str(first) if plain else _bracketed(first)
    return head + format_steps(rest)


def format_steps(steps: Sequence[object]) -> str:
    """Render steps that follow others in a key."""
    return "".join(map(_bracketed, steps))


def _bracketed(step: object) -> str:
    if isinstance(step, Component):
        return f"[{step.name}]"
    if isinstance(step, str):
        return f"[{_quoted(step) if encodes(step) else ascii(step)}]"
    return f"[{step!r}]"


def encodes(text: str) -> bool:
    """Whether UTF-8 can say it: it has no half of a surrogate pair."""
    return text.isascii() or text.encode("utf-8", "ignore").decode() == text
