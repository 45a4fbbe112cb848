"""Numbers of bytes as people write them: `57MB`, `1.5GB`, `64KiB`."""

from __future__ import annotations

import math
import re

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def parse_size(text: str) -> int:
    """Read a number of bytes; ValueError for what is none."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size such as 57MB")
    return math.ceil(float(match[1]) * _UNITS[match[2]])


def size_at_least(nbytes: int) -> str:
    """Name a number of bytes by two digits, rounded up, so that it is enough."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if nbytes > size * 0.99:
            tenths = math.ceil(nbytes / (size / 10))
            return f"{math.ceil(tenths / 10)}{unit}" if tenths > 99 else f"{tenths / 10:g}{unit}"
    return f"{nbytes}B"
