"""Values in a pickle as text: equal for equal data, whatever the order, protocol or reader.

In: what the inert machine reads, without tensors. Out: one text that looks as Python would write
it; objects as what would be called with what. Refused (ValueError): data that holds itself, and
text beyond all proportion.

Sets and dicts are sorted. Of a file in memory (`BytesIO`) its bytes count, not where it is read
next. Bytes of more than a few are a length and a digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from blake3 import blake3

from harness.checkpoint.keys import encodes
from harness.checkpoint.unpickling.inert import Global, Items, OpaqueKey, Record, Table

_MAX_DEPTH = 64
_MAX_SHORT_NBYTES = 64
_MAX_TEXT = 16 << 20
_MAX_NUMBERS = 2_000_000


class ValueText:
    """Writes values as text, within one budget for all of a file."""

    def __init__(self) -> None:
        self._left = _MAX_TEXT
        self._steps = _MAX_NUMBERS

    def of(self, value: Any) -> str:
        """The text of one value. Raises ValueError for what is not finite data."""
        return self._write(value, 0)

    def _write(self, value: Any, depth: int) -> str:
        self._steps -= 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_DEPTH} levels, or inside of itself")
        if self._steps < 0:
            raise ValueError(f"more than {_MAX_NUMBERS:,} numbers and texts")
        text = self._text(value, depth)
        self._left -= len(text)
        if self._left < 0:
            raise ValueError(f"more than {_MAX_TEXT >> 20} MiB of text")
        return text

    def _text(self, value: Any, depth: int) -> str:
        if value is None or isinstance(value, (bool, int, float)):
            return repr(value)
        if isinstance(value, str):
            return json.dumps(value, ensure_ascii=not encodes(value))
        if isinstance(value, (bytes, memoryview)):
            return _bytes(value)
        if isinstance(value, Global):
            return _name(value)
        if isinstance(value, OpaqueKey):
            return self._write(value.value, depth + 1)
        if isinstance(value, Mapping):
            text = "{" + ", ".join(sorted(self._pairs(value, depth))) + "}"
            state = value.state if isinstance(value, Table) else None
            return f"{text} + {self._write(state, depth + 1)}" if state else text
        if isinstance(value, Items):
            return "{" + ", ".join(sorted({self._write(v, depth + 1) for v in value})) + "}"
        if isinstance(value, (list, tuple)):
            inside = ", ".join(self._write(item, depth + 1) for item in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if isinstance(value, Record):
            return self._record(value, depth)
        raise ValueError(f"a {type(value).__name__}")

    def _pairs(self, value: Mapping[Any, Any], depth: int) -> Iterator[str]:
        for key, child in value.items():
            yield f"{self._write(key, depth + 1)}: {self._write(child, depth + 1)}"

    def _record(self, record: Record, depth: int) -> str:
        """An object: what would be called with what, then what it would be given."""
        match record:
            case Record(
                callee=Global(name="BytesIO"), state=(bytes() | memoryview() as data, int(), *_)
            ):
                return f"BytesIO({_bytes(data)})"
        inside = [self._write(argument, depth + 1) for argument in record.args]
        inside += [
            f"{name}={self._write(argument, depth + 1)}" for name, argument in record.kwargs.items()
        ]
        text = f"{self._write(record.callee, depth + 1)}({', '.join(inside)})"
        for what in (record.items, record.pairs, record.state):
            if what:
                text += f" + {self._write(what, depth + 1)}"
        return text


def _bytes(data: bytes | memoryview) -> str:
    if len(data) <= _MAX_SHORT_NBYTES:
        return repr(bytes(data))
    return f"<{len(data):,} bytes, digest {blake3(data).hexdigest()}>"


def _name(name: Global) -> str:
    """Python 2's names for what Python 3 has, too: pickles of protocol 2 hold them."""
    module = "builtins" if name.module == "__builtin__" else name.module
    return f"{module}.{name.name}"
