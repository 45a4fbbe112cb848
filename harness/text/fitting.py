"""Fit lines of a report into the columns of a terminal.

In: lines whose parts are set apart by two spaces or more, and a width. Out: lines no wider than
that, wrapped between parts first, then between words; a word wider than a line (a key, a path) is
shortened in its middle. Colour codes take no columns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from unicodedata import category, east_asian_width


@dataclass(frozen=True, kw_only=True)
class Style:
    """How text may look: ANSI colours, signs beyond ASCII, columns (None: as many as it takes)."""

    color: bool = False
    unicode: bool = False
    width: int | None = None

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color else text

    @property
    def ellipsis(self) -> str:
        return "…" if self.unicode else ".."


PLAIN = Style()

_HANGING = 4
# Narrower terminals wrap by themselves: nothing could be said in what is left of their lines.
_MIN_WIDTH = 32
# A key of more parts is made up, and not worth the time.
_MAX_STEPS = 64
_COLOR = re.compile(r"\x1b\[\d+m")
_PART = re.compile(r"( *)([^ ]+(?: [^ ]+)*)")
_STEP = re.compile(r"(?<=[./])")


def cells(text: str) -> int:
    """The columns that a printable text takes."""
    text = _COLOR.sub("", text)
    if text.isascii():
        return len(text)
    return sum(map(_cells, text))


def _cells(character: str) -> int:
    if category(character) in ("Mn", "Me"):
        return 0
    return 2 if east_asian_width(character) in "WF" else 1


def fit(line: str, width: int | None, ellipsis: str = "…") -> list[str]:
    """The line, as as many lines as it takes; what is continued stands further to the right."""
    if width is None or cells(line) <= max(width, _MIN_WIDTH):
        return [line]
    width = max(width, _MIN_WIDTH)
    text = line.lstrip(" ")
    indent = len(line) - len(text)
    hanging = " " * min(indent + _HANGING, width // 2)
    lines = [" " * indent]
    for gap, part in _PART.findall(text):
        # A part that no line of its own can take is broken between its words.
        is_whole = cells(part) <= width - len(hanging)
        for word in [part] if is_whole else part.split(" "):
            is_empty = not lines[-1].strip(" ")
            if not is_empty and cells(lines[-1] + gap + word) <= width:
                lines[-1] += gap + word
            else:
                start = lines.pop() if is_empty else hanging
                lines.append(start + shorten(word, width - len(start), ellipsis))
            gap = " "
    return lines


def shorten(text: str, width: int, ellipsis: str = "…") -> str:
    """Cut the middle of a key or path out, so that it fits; its last parts and its numbers stay.

    >>> shorten("model.encoder.layers.11.self_attn.linear_q.weight", 40)
    'model.….11.self_attn.linear_q.weight'
    """
    if cells(text) <= width:
        return text
    steps = _STEP.split(text)
    dropped: set[int] = set()
    for place, step in enumerate(steps[1:-2] if len(steps) < _MAX_STEPS else (), 1):
        if any(character.isdigit() for character in step):
            continue
        dropped.add(place)
        short = _without(steps, dropped, ellipsis)
        if cells(short) <= width:
            return short
    room = width - cells(ellipsis)
    tail = _first(text[::-1], room - room // 3)[::-1]
    return _first(text, room - cells(tail)) + ellipsis + tail


def _without(steps: list[str], dropped: set[int], ellipsis: str) -> str:
    spelled = ""
    for gone, places in groupby(range(len(steps)), dropped.__contains__):
        run = [steps[place] for place in places]
        spelled += ellipsis + run[-1][-1] if gone else "".join(run)
    return spelled


def _first(text: str, width: int) -> str:
    """As much of the start of a text as fits."""
    used = 0
    for place, character in enumerate(text):
        used += _cells(character)
        if used > width:
            return text[:place]
    return text
