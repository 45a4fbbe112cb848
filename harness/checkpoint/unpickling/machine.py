"""What a pickle is read into: a stack, a memo, and a count of what the objects cost in memory.

In: the bytes of a pickle, which `opcodes` takes one by one. Out: the
values on the stack. Refused: reading beyond the end or below a mark, and more objects or text than
the limit allows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NoReturn

from harness.checkpoint.unpickling.inert import Global, Record, Table, plain_key
from harness.checkpoint.unpickling.rebuild import CONSTRUCTORS
from harness.errors import CheckpointError

_MAX_LINE_NBYTES = 4 << 20
_SAVE_AGAIN = "the file is damaged, or no checkpoint: copy it again, or save it again with torch"
_SMALL_BYTES = 4096
# In memory, measured with CPython 3.11 to 3.13; never less than what is really taken.
_RECORD_NBYTES = 320
_TENSOR_NBYTES = 480
_GLOBAL_NBYTES = 320
_PAIR_NBYTES = 120
_ITEM_NBYTES = 16
_UNSET = object()


class Machine:
    """The state of one pickle that is being read."""

    def __init__(
        self, data: memoryview, name: str, persistent: Callable[[Any], Any] | None, max_nbytes: int
    ) -> None:
        self.data = data
        self.name = name
        self.position = 0
        self.persistent = persistent
        self.stack: list[Any] = []  # what stands above the last mark
        self.below: list[list[Any]] = []  # what stands below each mark
        self.memo: list[Any] = []
        self.globals: dict[tuple[str, str], Global] = {}
        self.max_nbytes = max_nbytes
        self.left = max_nbytes  # what the objects to come may cost

    def fail(self, why: str, hint: str = _SAVE_AGAIN) -> NoReturn:
        raise CheckpointError(f"{self.name}: its pickle {why}, at byte {self.position}", hint=hint)

    # What the opcodes share

    def spend(self, nbytes: int) -> None:
        """Count what the objects cost; nothing is refunded for those that are dropped."""
        self.left -= nbytes
        if self.left < 0:
            self.fail(
                f"describes a structure of more than {self.max_nbytes >> 20} MiB",
                "save the weights by themselves, or in fewer chunks; if it is not that large, the "
                "file is damaged",
            )

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if count < 0 or end > len(self.data):
            self.fail(f"announces {count} bytes, but {len(self.data) - self.position} are left")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def line(self) -> str:
        window = 4096
        while True:
            chunk = bytes(self.data[self.position : self.position + window])
            end = chunk.find(b"\n")
            if end >= 0:
                self.position += end + 1
                return self.text(memoryview(chunk)[:end], "latin-1")
            if len(chunk) < window or window >= _MAX_LINE_NBYTES:
                self.fail("has a line without an end")
            window *= 2

    def text(self, raw: memoryview, encoding: str = "utf-8") -> str:
        # CPython stores every character as wide as the widest, up to 4 bytes.
        if len(raw) > _SMALL_BYTES:
            self.spend(4 * len(raw))
        text = str(raw, encoding, "surrogatepass" if encoding == "utf-8" else "strict")
        if len(raw) <= _SMALL_BYTES:
            self.spend(sys.getsizeof(text))
        return text

    def python2_text(self, raw: memoryview) -> Any:
        """A string of Python 2 may be text or bytes; long ones are array data."""
        if len(raw) > _SMALL_BYTES:
            return self.binary(raw)
        try:
            return self.text(raw)
        except UnicodeDecodeError:
            return self.text(raw, "latin-1")

    def binary(self, raw: memoryview) -> Any:
        """Bytes: long ones stay in the file."""
        small = len(raw) <= _SMALL_BYTES
        self.spend(len(raw) if small else _RECORD_NBYTES)
        return bytes(raw) if small else raw

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> tuple[Any, ...]:
        """The last values above the mark, in their order; IndexError where there are fewer."""
        if len(self.stack) < count:
            raise IndexError("pop from an empty stack")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        if not self.below:
            self.fail("looks for a mark that was never set")
        items = self.stack
        self.stack = self.below.pop()
        return items

    def put(self, index: int) -> None:
        """Remember the top; picklers count from 0 or 1 without gaps, so a list is enough."""
        memo, value = self.memo, self.stack[-1]
        if index == len(memo):
            memo.append(value)
        elif 0 <= index < len(memo):
            memo[index] = value
        elif index == len(memo) + 1:
            memo += [_UNSET, value]
        else:
            self.fail(f"skips to the memo entry {index}")

    def get(self, index: int) -> None:
        memo = self.memo
        value = memo[index] if 0 <= index < len(memo) else _UNSET
        if value is _UNSET:
            self.fail(f"asks for the memo entry {index}, which it never made")
        self.stack.append(value)

    def find_global(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            self.fail("names a global by something that is not text")
        known = self.globals.get((module, name))
        if known is None:
            self.spend(_GLOBAL_NBYTES)
            known = self.globals[module, name] = Global(module, name)
        return known

    def call(self, callee: Any, args: Any, kwargs: Any = None) -> Any:
        if not isinstance(kwargs, (dict, NoneType)):
            self.fail("gives keyword arguments that are no dict")
        if not isinstance(args, tuple):
            self.fail(f"calls something with {type(args).__name__} instead of a tuple")
        if isinstance(callee, Global) and not kwargs:
            constructor = CONSTRUCTORS.get((callee.module, callee.name))
            if constructor is not None:
                return self.construct(callee, constructor, args)
        self.spend(_RECORD_NBYTES)
        return Record(callee, args, kwargs or {})

    def construct(
        self, callee: Global, constructor: Callable[..., Any], args: tuple[Any, ...]
    ) -> Any:
        # A constructor may look at, and copy, everything in its arguments: the same long list can
        # be given to many.
        cost = _ITEM_NBYTES * len(args)
        for arg in args:
            if isinstance(arg, (list, dict)):
                cost += _PAIR_NBYTES * len(arg)
            elif isinstance(arg, str):
                cost += len(arg)
        self.spend(cost)
        try:
            made = constructor(*args)
        except (TypeError, ValueError, OverflowError) as error:
            self.fail(f"gives {callee} arguments that do not fit ({str(error)[:200]})")
        if not isinstance(made, (dict, list, tuple, bytes)) and not (args and made is args[0]):
            self.spend(getattr(made, "structure_nbytes", _TENSOR_NBYTES))
        return made

    def append(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        self.spend(_ITEM_NBYTES * len(items))
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Record):
            target.items.extend(items)
        else:
            self.fail(f"appends to a {type(target).__name__}")

    def store(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            self.fail("sets a key without a value")
        self.spend(_PAIR_NBYTES * len(items) // 2)
        if isinstance(target, Record):
            target = target.pairs
        if not isinstance(target, dict):
            self.fail(f"sets items of a {type(target).__name__}")
        for index in range(0, len(items), 2):
            key = items[index]
            target[key if type(key) is str else plain_key(key)] = items[index + 1]

    def build(self, state: Any) -> None:
        target = self.stack[-1]
        # What else a constructor of ours made needs no state.
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, Table):
            target.build(state)
