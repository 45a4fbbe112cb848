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

_NUMBERED = re.compile(r"(.*[^0-9])(0|[1-9][0-9]{0,17})")


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


def shortened(text: str, width: int) -> str:
    """The end of a key or a path, which says most of it, on at most `width` columns."""
    shown = printable(text[-2 * width :])
    return shown if len(shown) <= width else f"…{shown[1 - width :]}"


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
        for grid in _grids([(_numbers(key), key) for key in members]):
            pattern = _pattern(parts, grid, ellipsis) if len(grid) > 1 else grid[0]
            folded.append((printable(pattern), grid))
    return folded


def fold_names(keys: Sequence[str], *, ellipsis: str = "…") -> list[tuple[str, list[str]]]:
    """Fold as `fold`, then patterns that differ in one part, too: `{0…3}.{w1,w2}.weight`."""
    folded = fold(keys, ellipsis=ellipsis)
    place = 0
    while any(place < pattern.count(".") + 1 for pattern, _ in folded):
        groups: dict[tuple[str, str], list[tuple[str, list[str]]]] = {}
        for pattern, members in folded:
            parts = pattern.split(".")
            rest = ".".join(parts[:place]), ".".join(parts[place + 1 :])
            # What is no plain name, or what stands for several already, is not one of several.
            alone = place >= len(parts) or not parts[place].isidentifier()
            groups.setdefault((pattern, "") if alone else rest, []).append((pattern, members))
        folded = []
        for (start, end), found in groups.items():
            if len(found) > 1:
                names = _alternatives([pattern.split(".")[place] for pattern, _ in found], ellipsis)
                parts = [start] * bool(start) + [names] + [end] * bool(end)
                found = [(".".join(parts), [key for _, members in found for key in members])]
            folded += found
        place += 1
    return folded


def _alternatives(names: Sequence[str], ellipsis: str) -> str:
    """One of several names: `{w1,w2}`, and `layer{1…4}` where they are numbered."""
    numbered = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    if len(numbered) == len(names) > 2 and len({match[1] for match in numbered}) == 1:
        return f"{numbered[0][1]}{{{_ranges(sorted(int(m[2]) for m in numbered), ellipsis)}}}"
    return f"{{{','.join(names)}}}"


def _grids(keys: Sequence[tuple[list[int], str]]) -> Iterator[list[str]]:
    """Part keys of some numbers into grids, in which every combination is there."""
    columns = list(zip(*(numbers for numbers, _ in keys), strict=True))
    if len(keys) == 1 or prod(len(set(column)) for column in columns) == len(keys):
        yield [key for _, key in keys]
        return
    first = next((place for place, column in enumerate(columns) if len(set(column)) > 1), None)
    if first is None:  # the same key more than once
        yield from ([key] for _, key in keys)
        return
    # Numbers of the first column that go with the same others belong together.
    beside: dict[int, list[tuple[list[int], str]]] = {}
    for numbers, key in keys:
        rest = [*numbers[:first], *numbers[first + 1 :]]
        beside.setdefault(numbers[first], []).append((rest, key))
    alike: dict[tuple[tuple[int, ...], ...], list[tuple[list[int], str]]] = {}
    for rows in beside.values():
        alike.setdefault(tuple(sorted(tuple(rest) for rest, _ in rows)), []).extend(rows)
    for rows in alike.values():
        by_rest: dict[tuple[int, ...], list[str]] = {}
        for rest, key in rows:
            by_rest.setdefault(tuple(rest), []).append(key)
        for grid in _grids([(list(rest), keys[0]) for rest, keys in by_rest.items()]):
            kept = set(grid)
            yield [key for keys in by_rest.values() if keys[0] in kept for key in keys]


def in_order(keys: Sequence[str], others: Sequence[str]) -> bool:
    """Whether `others` fold into one pattern, in which each stands where its key does in theirs."""
    if len(fold(others)) != 1:
        return False
    numbers, theirs = ([_numbers(key) for key in side] for side in (keys, others))
    pairs = sorted(zip(numbers, theirs, strict=True))
    return [theirs for _, theirs in pairs] == sorted(theirs)


def _numbers(key: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(key)]


def _pattern(parts: Sequence[str], keys: Sequence[str], ellipsis: str) -> str:
    columns = list(zip(*map(_numbers, keys), strict=True))
    sets = [sorted(set(column)) for column in columns]
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
