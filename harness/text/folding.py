"""Names and errors as lines for people.

In: keys, which are folded where they differ only in their numbers (`layers.{0…16}.norm.bias`
instead of 17 lines), any other text, and errors. Out: text that is safe on a terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from math import prod

from harness.errors import HarnessError

# As `str` spells one: a pattern of others (01, ٣) would stand for other keys.
_NUMBER = re.compile(r"(?<![^.\[])(0|[1-9][0-9]{0,17})(?![^.\]])")


def in_section(section: str) -> str:
    """Which part of a file something is of, as it follows the file's format."""
    if section == ".":
        return ", all sections"
    return f", section {printable(section)}" if section else ""


def printable(key: str) -> str:
    """A key as it may stand on a terminal: quoted with escapes if it is not plain."""
    if key.isprintable() and "\\" not in key and not key.startswith('"') and key.strip() == key:
        return key
    return json.dumps(key, ensure_ascii=not key.isprintable())


def escaped(text: str) -> str:
    """Any text as it may stand on one line of a terminal: names in it may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def error_lines(error: HarnessError) -> Iterator[str]:
    """An error and its next step."""
    yield f"error: {escaped(str(error))}"
    if error.hint:
        yield f"  next: {escaped(error.hint)}"


def fold(keys: Sequence[str], *, ellipsis: str = "…") -> list[tuple[str, list[str]]]:
    """Group keys into patterns; each with the keys it stands for, in order of first appearance.

    A pattern is used only if it stands for exactly its keys: every combination is there.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in keys:
        groups.setdefault(tuple(_NUMBER.split(key)[::2]), []).append(key)
    folded = []
    for parts, members in groups.items():
        pattern = _pattern(parts, members, ellipsis) if len(members) > 1 else None
        if pattern is None:
            folded += [(printable(key), [key]) for key in members]
        else:
            folded.append((printable(pattern), members))
    return folded


def in_order(keys: Sequence[str], others: Sequence[str]) -> bool:
    """Whether `others` fold into one pattern, in which each stands where its key does in theirs."""
    if len(fold(others)) != 1:
        return False
    numbers, theirs = ([_numbers(key) for key in side] for side in (keys, others))
    pairs = sorted(zip(numbers, theirs, strict=True))
    return [theirs for _, theirs in pairs] == sorted(theirs)


def _numbers(key: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(key)]


def _pattern(parts: Sequence[str], keys: Sequence[str], ellipsis: str) -> str | None:
    columns = list(zip(*map(_numbers, keys), strict=True))
    sets = [sorted(set(column)) for column in columns]
    if prod(len(numbers) for numbers in sets) != len(set(keys)):
        return None
    spelled = [
        str(numbers[0]) if len(numbers) == 1 else "{" + _ranges(numbers, ellipsis) + "}"
        for numbers in sets
    ]
    return "".join(a + b for a, b in zip(parts, [*spelled, ""], strict=True))


def _ranges(numbers: Iterable[int], ellipsis: str) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(
        str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}{ellipsis}{b}" for a, b in runs
    )
