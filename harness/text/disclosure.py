"""What of a configuration, or of a value, may stand in a file that people commit.

In: plain data, as a checkpoint has it. Out: the same without what tells of the machine (of a path
only its last part) and without secrets, each of which becomes its digest: a change of one is seen,
and no more. What has been through here does not change a second time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from blake3 import blake3

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+")
# What holds nothing but secrets, whatever its type; and what may also name a number or a layer.
_SECRET = re.compile(r".*(secret|passw(or)?d|passphrase|pwd|credential|signature)s?")
_MAYBE_SECRET = re.compile(r".*(key|token|auth|authorization)s?")
_WITH_USER = re.compile(r"\w[\w+.-]*://[^\s/?#@]+@")
_ASSIGNED = re.compile(r"([\w.-]+)=[^\s=]")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_PAIR = re.compile(r'"((?:[^"\\]|\\.)*)": (.)', re.DOTALL)
_HIDDEN = re.compile(r"<secret, BLAKE3 [0-9a-f]{16}>")


def disclosed(value: Any) -> Any:
    """A configuration as a golden may keep it.

    Secret are all values under a key with a word that ends in secret, password, passphrase,
    credential or signature; texts under one with key, token or auth; texts that say NAME=… for such
    a NAME, as command lines and URLs do; and URLs that say who asks.
    """
    if isinstance(value, Mapping):
        return {
            _text(key) if isinstance(key, str) else key: _under(str(key), child)
            for key, child in value.items()
        }
    if isinstance(value, (list, tuple)):
        flags = [None, *value]  # of a command line, each before its value
        return [
            _under(flag, child) if isinstance(flag, str) and flag[:1] == "-" else disclosed(child)
            for flag, child in zip(flags, value, strict=False)
        ]
    return _text(value) if isinstance(value, str) else value


def may_keep(key: str, text: str) -> bool:
    """Whether a golden may keep the text of a value: it holds none of the above."""
    pairs = [(key, text[:1]), *_PAIR.findall(text)]
    if any(
        _names(_SECRET, name) or (_names(_MAYBE_SECRET, name) and start in "\"'b[({")
        for name, start in pairs
    ):
        return False
    return all(_text(one) == one for one in _QUOTED.findall(text))


def _under(key: str, value: Any) -> Any:
    """A value that stands under a key."""
    if _names(_SECRET, key):
        return None if value is None else _hidden(value)
    if _names(_MAYBE_SECRET, key):
        if isinstance(value, str):
            return _hidden(value)
        if isinstance(value, (list, tuple)):
            return [_under(key, child) for child in value]
        if isinstance(value, Mapping):
            return {name: _under(key, child) for name, child in value.items()}
    return disclosed(value)


def _names(words: re.Pattern[str], key: str) -> bool:
    return any(words.fullmatch(word.lower()) for word in _WORD.findall(key))


def _hidden(value: Any) -> str:
    if isinstance(value, str):
        if not value or _HIDDEN.fullmatch(value):
            return value
        data = value.encode("utf-8", "surrogatepass")
    else:
        data = json.dumps(value, sort_keys=True, default=str).encode()
    return f"<secret, BLAKE3 {blake3(data).hexdigest()[:16]}>"


def _text(value: str) -> str:
    if _WITH_USER.search(value) or any(
        _names(_SECRET, name) or _names(_MAYBE_SECRET, name) for name in _ASSIGNED.findall(value)
    ):
        return _hidden(value)
    kinds = (PurePosixPath, PureWindowsPath)
    if value.startswith("~") or any(kind(value).is_absolute() for kind in kinds):
        return f"…/{PureWindowsPath(value).name}"
    return value
