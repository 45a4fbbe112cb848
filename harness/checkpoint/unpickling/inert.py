"""What a pickle's objects become: names and records that do nothing, and keys that hash safely.

In: what the unpickler reads. Out: plain values. Nothing here is ever called or imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle refers to: a class or function that is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Record:
    """An object that the pickle would have made: what was to be called, and what followed."""

    callee: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[Any, Any] = field(default_factory=dict)
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: dict[Any, Any] = field(default_factory=dict)


class Items(list[Any]):
    """A set or frozenset: its items, in the order of the file, which means nothing."""

    __slots__ = ()


class Table(dict[Any, Any]):
    """An OrderedDict, and what else is made by a call: its items, and the state it was given."""

    __slots__ = ("state",)

    def __init__(self, items: Any = ()) -> None:
        super().__init__(items)
        self.state: Any = None

    def build(self, state: Any) -> None:
        """Take a state, but torch's versions of modules, which say who wrote it."""
        if isinstance(state, dict) and "_metadata" in state:
            state = {name: value for name, value in state.items() if name != "_metadata"}
        self.state = state or None


@dataclass(frozen=True, eq=False, slots=True)
class OpaqueKey:
    """A dictionary key that is neither text nor a number: kept, but equal to itself only."""

    value: Any


class TupleKey(tuple[Any, ...]):
    """A tuple as a dictionary key, hashed by what it looks like.

    CPython hashes tuples of numbers without a secret: they can be made to collide at will.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(repr(self))


def plain_key(key: Any) -> Any:
    """Keys that hash in constant time and stack; anything else is kept apart by identity."""
    if key is None or isinstance(key, (str, bytes, bool, float, Global)):
        return key
    if isinstance(key, int):
        # CPython hashes integers modulo 2**61-1: larger ones can be made to collide at will.
        return key if -(1 << 63) <= key < 1 << 64 else OpaqueKey(key)
    if isinstance(key, tuple) and len(key) <= 16:
        plain = all(item is None or isinstance(item, (str, bool, float, int)) for item in key)
        # Every look-up hashes all of it.
        short = sum(len(item) for item in key if isinstance(item, str)) <= 1024
        if plain and short and all(plain_key(item) is item for item in key):
            return TupleKey(key)
    return OpaqueKey(key)
