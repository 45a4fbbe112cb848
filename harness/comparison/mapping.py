"""New names for keys: pairs OLD=NEW of keys, of prefixes that end in a dot, and of globs of both.

In: what a user writes, on the command line or in a file of two columns. Out: the new name of a key.
A `*` stands for the same text, at least a character of it, on both sides; of numbers in braces,
each on the left for the one in its place on the right: `blocks.{1..3}.=blocks.{0..2}.`. Refused
(UsageError): pairs with more of them on one side, files that are not two columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from harness.errors import UsageError

Pair = tuple[str, str]
_MAX_NUMBERS = 10_000  # in braces
# A star, or numbers in braces: `{0..3,7}`.
_WILD = re.compile(r"\*|\{\d{1,9}(?:\.\.\d{1,9})?(?:,\d{1,9}(?:\.\.\d{1,9})?)*\}")


def check_pair(old: str, new: str) -> None:
    """Raise UsageError where a `*`, or a number in braces, has none on the other side."""
    if old.count("*") != new.count("*"):
        raise UsageError(
            f"--map {old}={new}: a * stands for the same text on both sides, and one has "
            f"{old.count('*')}, the other {new.count('*')}",
            hint="give as many on both: --map 'blocks.*.mlp.=blocks.*.ff.'",
        )
    ours, theirs = ([_numbers(wild) for wild in _WILD.findall(side)] for side in (old, new))
    if [len(numbers) for numbers in ours] != [len(numbers) for numbers in theirs]:
        raise UsageError(
            f"--map {old}={new}: numbers in braces stand for those in the same place on the other "
            f"side, in the same order as the *",
            hint="give as many on both: --map 'blocks.{1..3}.=blocks.{0..2}.'",
        )


def mapped(pair: Pair, key: str) -> str | None:
    """The new name of a key; None where the pair is not of it."""
    old, new = pair
    if not _WILD.search(old):
        is_of_it = key == old or (old.endswith(".") and key.startswith(old))
        return new + key[len(old) :] if is_of_it else None
    found = _compiled(old, old.endswith(".")).match(key)
    if found is None:
        return None
    texts, tables = _tables(pair)
    named = texts[0]
    for wild, table, text in zip(found.groups(), tables, texts[1:], strict=True):
        named += table.get(wild, wild) + text
    return named + key[found.end() :]


def names_any(name: str, keys: Iterable[str]) -> bool:
    """Whether a name, a prefix that ends in a dot, or a glob of them is of any of the keys."""
    return any(mapped((name, name), key) is not None for key in keys)


def makes_any(pair: Pair, keys: Iterable[str]) -> bool:
    """Whether any of the keys has a name that the pair can make."""
    old, new = pair
    pattern = _compiled(new, old.endswith("."))
    return any(pattern.match(key) is not None for key in keys)


@lru_cache(maxsize=1024)
def _compiled(glob: str, is_prefix: bool) -> re.Pattern[str]:
    text, end = "", 0
    for wild in _WILD.finditer(glob):
        numbers = _numbers(wild[0])
        text += re.escape(glob[end : wild.start()]) + f"({'|'.join(numbers) or '.+?'})"
        if numbers:
            text += r"(?!\d)"  # 1 is not the beginning of 12
        end = wild.end()
    text += re.escape(glob[end:])
    return re.compile(text if is_prefix else rf"{text}\Z", re.DOTALL)


@lru_cache(maxsize=1024)
def _tables(pair: Pair) -> tuple[Sequence[str], Sequence[dict[str, str]]]:
    """The texts of the new name, and for each place between them the new numbers of the old."""
    old, new = pair
    places = zip(_WILD.findall(old), _WILD.findall(new), strict=True)
    tables = [dict(zip(*map(_numbers, place), strict=True)) for place in places]
    return _WILD.split(new), tables


def _numbers(wild: str) -> list[str]:
    """The numbers in braces; [] for a star. Raises UsageError for too many."""
    found: list[str] = []
    for part in wild.strip("{}").split(",") if wild != "*" else ():
        first, _, last = part.partition("..")
        a, b = int(first), int(last or first)
        if abs(a - b) + len(found) >= _MAX_NUMBERS:
            raise UsageError(f"--map: {wild}: more than {_MAX_NUMBERS:,} numbers")
        found += map(str, range(a, b + 1) if a <= b else range(a, b - 1, -1))
    return found


def in_braces(numbers: Sequence[int]) -> str:
    """Numbers in their order, as a map takes them: `{0..3,7}`; a single one without braces."""
    runs: list[list[int]] = []
    for number in numbers:
        step = number - runs[-1][-1] if runs else 0
        if abs(step) == 1 and (len(runs[-1]) == 1 or step == runs[-1][1] - runs[-1][0]):
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs]
    return "{" + ",".join(parts) + "}" if len(numbers) > 1 else str(numbers[0])


def read_map(file: Path) -> tuple[Pair, ...]:
    """Read pairs from a file of two columns, old and new; `#` begins a comment.

    Raises UsageError, with the line, for what is none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(
            f"--map-file {file}: cannot be read: {error.strerror}", hint="check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--map-file {file}: not UTF-8 text", hint="a line for each pair: OLD NEW"
        ) from error
    pairs = []
    for number, line in enumerate(lines, 1):
        columns = line.split("#")[0].split()
        if len(columns) not in (0, 2):
            raise UsageError(
                f"--map-file {file}:{number}: has {len(columns)} columns, not two: {line[:80]}",
                hint="a line for each pair, old and new: blocks.*.mlp. blocks.*.ff.",
            )
        pairs += [(columns[0], columns[1])] if columns else []
    return tuple(pairs)


def changed_prefix(old: str, new: str) -> tuple[str, str]:
    """The starts of two keys up to where they go on alike, each with its last dot."""
    ours, theirs = old.split("."), new.split(".")
    alike = 0
    while alike < min(len(ours), len(theirs)) - 1 and ours[-1 - alike] == theirs[-1 - alike]:
        alike += 1
    if alike == 0:
        return old, new
    return ".".join(ours[:-alike]) + ".", ".".join(theirs[:-alike]) + "."
