"""New names for keys: pairs OLD=NEW of keys, of prefixes that end in a dot, and of globs of both.

In: what a user writes, on the command line or in a file of two columns. Out: the new name of a key.
A `*` stands for the same text, at least a character of it, on both sides. Refused (UsageError):
pairs with more of them on one side, files that are not two columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from harness.errors import UsageError

Pair = tuple[str, str]


def check_pair(old: str, new: str) -> None:
    """Raise UsageError where a `*` of one side has none on the other."""
    if old.count("*") != new.count("*"):
        raise UsageError(
            f"--map {old}={new}: a * stands for the same text on both sides, and one has "
            f"{old.count('*')}, the other {new.count('*')}",
            hint="give as many on both: --map 'blocks.*.mlp.=blocks.*.ff.'",
        )


def mapped(pair: Pair, key: str) -> str | None:
    """The new name of a key; None where the pair is not of it."""
    old, new = pair
    if "*" not in old:
        is_of_it = key == old or (old.endswith(".") and key.startswith(old))
        return new + key[len(old) :] if is_of_it else None
    found = _compiled(old, old.endswith(".")).match(key)
    if found is None:
        return None
    first, *rest = new.split("*")
    named = "".join(text + part for text, part in zip(found.groups(), rest, strict=True))
    return first + named + key[found.end() :]


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
    text = "(.+?)".join(map(re.escape, glob.split("*")))
    return re.compile(text if is_prefix else rf"{text}\Z", re.DOTALL)


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
