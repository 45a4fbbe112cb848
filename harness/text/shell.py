"""Commands as a shell takes them: what a hint or a next step says works when it is pasted.

In: words, with names of files and tensors in them. Out: text that is safe on a terminal, too.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable


def quoted(word: str) -> str:
    r"""A word of a command; with escapes, as bash, zsh and POSIX.1-2024 read them, if not plain.

    >>> quoted("layers\x1bc.0")
    "$'layers\\033c.0'"
    """
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(map(_escaped, word))}'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    # A lone surrogate is a byte of a file's name that is not UTF-8.
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    # Octal digits are three at most; of hexadecimal ones some shells take all that follow.
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", errors))


def command_line(words: Iterable[str]) -> str:
    """A whole command."""
    return " ".join(map(quoted, words))
