"""The inert unpickler: reads the structure of a pickle and executes nothing.

In: the bytes of a pickle (protocols 0 to 5), a closed table of constructors of our own, and what
to make of persistent ids. Out: dicts, lists, tuples, strings, numbers, and for everything else
`Global` (a name, never imported) and `Record` (what would have been called with what, as data).
Refused: malformed opcodes, extension registry codes, out-of-band buffers, and more objects or text
than a checkpoint's structure needs.

This is a machine of its own, not a subclass of `pickle.Unpickler`, because the standard ones give
the file more than a checkpoint needs: `PUT` with a large index allocates gigabytes, `BUILD` sets
attributes on whatever is on the stack, nested tuples as dictionary keys overflow the C stack.
Opcodes as documented in the standard library's `pickletools`.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from harness.checkpoint.inert import Global, Record, plain_key
from harness.errors import CheckpointError

# What the objects of a pickle may cost in memory: a tensor's structure costs about 2.5 KB, so this
# is enough for 50,000 tensors, and within the promise of 200 MB whatever the file says.
MAX_STRUCTURE_NBYTES = 128 << 20
_MAX_LINE_NBYTES = 4 << 20
_SAVE_AGAIN = "the file is damaged, or no checkpoint: copy it again, or save it again by torch"
_SMALL_BYTES = 4096
# In memory, measured with CPython 3.11 to 3.13; never less than what is really taken.
_RECORD_NBYTES = 320
_TENSOR_NBYTES = 480
_GLOBAL_NBYTES = 320
_PAIR_NBYTES = 120
_ITEM_NBYTES = 16


Constructors = Mapping[tuple[str, str], Callable[..., Any]]


@dataclass(slots=True)
class Tally:
    """What the objects of several pickles have cost so far: one limit holds for them together."""

    nbytes: int = 0
    max_nbytes: int = MAX_STRUCTURE_NBYTES


def unpickle(
    data: memoryview,
    *,
    name: str,
    constructors: Constructors,
    persistent: Callable[[Any], Any] | None = None,
    max_nbytes: int | None = None,
    tally: Tally | None = None,
) -> tuple[Any, int]:
    """Read one pickle from the start of `data`; returns the object and where the pickle ends.

    `constructors` maps (module, name) to functions that take the pickled arguments and return
    plain values; they must check their arguments and may raise CheckpointError, TypeError or
    ValueError. What is read costs at most `max_nbytes`, by default those of `tally`, together with
    what it counts already. Raises CheckpointError, with the offset, for everything malformed.
    """
    tally = tally or Tally()
    machine = _Machine(data, name, constructors, persistent, max_nbytes or tally.max_nbytes)
    machine.cost = tally.nbytes
    value = machine.run()
    tally.nbytes = machine.cost
    return value, machine.position


_MARK = object()


class _Stop(Exception):  # noqa: N818 - ends the loop, not an error
    pass


class _Machine:
    def __init__(
        self,
        data: memoryview,
        name: str,
        constructors: Constructors,
        persistent: Callable[[Any], Any] | None,
        max_nbytes: int,
    ) -> None:
        self.data = data
        self.name = name
        self.position = 0
        self.constructors = constructors
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: list[Any] = []
        self.globals: dict[tuple[str, str], Global] = {}
        self.max_nbytes = max_nbytes
        self.cost = 0

    def run(self) -> Any:
        data, size, table, costs = self.data, len(self.data), _OPCODES, _COSTS
        try:
            while True:
                position = self.position
                if position >= size:
                    self.fail("ends before its STOP")
                self.position = position + 1
                code = data[position]
                operation = table[code]
                if operation is None:
                    self.fail(f"holds the byte 0x{code:02x}, which is no opcode")
                self.cost += costs[code]
                if self.cost > self.max_nbytes:
                    self.spend(0)
                operation(self)
        except _Stop as stop:
            return stop.args[0]
        except CheckpointError:
            raise
        except (
            IndexError,
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
            AttributeError,
            struct.error,
        ) as error:
            self.fail(f"is malformed ({type(error).__name__}: {str(error)[:200]})")

    def fail(self, why: str, hint: str = _SAVE_AGAIN) -> NoReturn:
        raise CheckpointError(f"{self.name}: its pickle {why}, at byte {self.position}", hint=hint)

    # What the opcodes share

    def spend(self, nbytes: int) -> None:
        """Count what the objects cost; nothing is refunded for those that are dropped."""
        self.cost += nbytes
        if self.cost > self.max_nbytes:
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

    def byte(self) -> int:
        position = self.position
        if position >= len(self.data):
            self.take(1)  # says so
        self.position = position + 1
        return self.data[position]

    def number(self, form: struct.Struct) -> Any:
        position = self.position
        if position + form.size > len(self.data):
            self.take(form.size)  # says so
        self.position = position + form.size
        return form.unpack_from(self.data, position)[0]

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

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            self.fail("takes a value where a mark is")
        return value

    def pop_to_mark(self) -> list[Any]:
        stack = self.stack
        index = len(stack) - 1
        while stack[index] is not _MARK:
            index -= 1
            if index < 0:
                self.fail("looks for a mark that was never set")
        items = stack[index + 1 :]
        del stack[index:]
        return items

    def top(self) -> Any:
        value = self.stack[-1]
        if value is _MARK:
            self.fail("takes a value where a mark is")
        return value

    def put(self, index: int) -> None:
        """Remember the top; picklers count from 0 or 1 without gaps, so a list is enough."""
        gap = index - len(self.memo)
        if index < 0 or gap > 1:
            self.fail(f"skips to the memo entry {index}")
        if gap >= 0:
            self.memo.extend([_MARK] * (gap + 1))
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        value = self.memo[index] if 0 <= index < len(self.memo) else _MARK
        if value is _MARK:
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

    def call(self, callee: Any, args: Any, kwargs: Mapping[Any, Any] | None = None) -> Any:
        if not isinstance(args, tuple):
            self.fail(f"calls something with {type(args).__name__} instead of a tuple")
        if isinstance(callee, Global) and not kwargs:
            constructor = self.constructors.get((callee.module, callee.name))
            if constructor is not None:
                return self.construct(callee, constructor, args)
        self.spend(_RECORD_NBYTES)
        return Record(callee, args, kwargs or {})

    def construct(
        self, callee: Global, constructor: Callable[..., Any], args: tuple[Any, ...]
    ) -> Any:
        # A constructor may look at, and copy, everything in its arguments: the same long list can
        # be given to many.
        self.spend(_ITEM_NBYTES * len(args))
        for arg in args:
            if isinstance(arg, (list, dict)):
                self.spend(_PAIR_NBYTES * len(arg))
            elif isinstance(arg, str):
                self.spend(len(arg))
        try:
            made = constructor(*args)
        except (TypeError, ValueError, OverflowError) as error:
            self.fail(f"gives {callee} arguments that do not fit ({str(error)[:200]})")
        if not isinstance(made, (dict, list, tuple, bytes)) and not (args and made is args[0]):
            self.spend(getattr(made, "structure_nbytes", _TENSOR_NBYTES))
        return made

    def append(self, target: Any, items: list[Any]) -> None:
        self.spend(_ITEM_NBYTES * len(items))
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Record):
            target.items.extend(items)
        else:
            self.fail(f"appends to a {type(target).__name__}")

    def store(self, target: Any, items: list[Any]) -> None:
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

    def build(self, target: Any, state: Any) -> None:
        # What a constructor of ours made (an OrderedDict with its _metadata) needs no state.
        if isinstance(target, Record):
            target.state = state


Operation = Callable[[_Machine], None]
_UINT16, _INT32, _UINT32, _FLOAT64 = map(struct.Struct, ("<H", "<i", "<I", ">d"))
_OPCODES: list[Operation | None] = [None] * 256
_COSTS = [16] * 256
for _code in b"JMIGFL\x8a\x8b":
    _COSTS[_code] = 48  # a number
for _code in b"}]\x8ftl\x85\x86\x87\x91dCB\x8e\x96VS":
    _COSTS[_code] = 80  # an object
for _code in b"qrp\x94":
    _COSTS[_code] = 32  # an entry of the memo
for _code in b"PQR\x81\x92io":
    _COSTS[_code] = 112  # a storage, or the result of a call


def _opcode(code: bytes) -> Callable[[Operation], Operation]:
    def register(operation: Operation) -> Operation:
        _OPCODES[code[0]] = operation
        return operation

    return register


def _constant(code: bytes, value: Any) -> None:
    _OPCODES[code[0]] = lambda m: m.stack.append(value)


def _value(code: bytes, read: Callable[[_Machine], Any]) -> None:
    _OPCODES[code[0]] = lambda m: m.stack.append(read(m))


def _sized(code: bytes, size: str, make: Callable[[_Machine, memoryview], Any]) -> None:
    form = struct.Struct(size)

    def operation(m: _Machine) -> None:
        (count,) = form.unpack(m.take(form.size))
        m.stack.append(make(m, m.take(count)))

    _OPCODES[code[0]] = operation


def _long(m: _Machine, raw: memoryview) -> int:
    if len(raw) > 1024:
        m.fail(f"holds an integer of {len(raw)} bytes")
    m.spend(2 * len(raw))
    return int.from_bytes(raw, "little", signed=True)


def _text_integer(m: _Machine) -> int | bool:
    line = m.line()
    return {"00": False, "01": True}[line] if line in ("00", "01") else int(line)


def _quoted(m: _Machine) -> Any:
    line = m.line()
    if len(line) < 2 or line[0] != line[-1] or line[0] not in "\"'":
        m.fail("holds a string without its quotes")
    return line[1:-1].encode("latin-1").decode("unicode_escape")


_constant(b"N", None)
_constant(b"\x88", True)
_constant(b"\x89", False)
_constant(b")", ())
_constant(b"(", _MARK)
_OPCODES[b"}"[0]] = lambda m: m.stack.append({})
_OPCODES[b"]"[0]] = lambda m: m.stack.append([])
_value(b"\x8f", lambda m: [])  # EMPTY_SET: order and duplicates do not matter to us
_value(b"K", _Machine.byte)
_value(b"M", lambda m: m.number(_UINT16))
_value(b"J", lambda m: m.number(_INT32))
_value(b"G", lambda m: m.number(_FLOAT64))
_value(b"I", _text_integer)
_value(b"L", lambda m: int(m.line().rstrip("L")))
_value(b"F", lambda m: float(m.line()))
_value(b"S", _quoted)
_value(b"V", lambda m: m.line().encode("latin-1").decode("raw_unicode_escape"))
_sized(b"\x8a", "<B", _long)
_sized(b"\x8b", "<I", _long)
_sized(b"U", "<B", _Machine.python2_text)
_sized(b"T", "<I", _Machine.python2_text)
_sized(b"\x8c", "<B", _Machine.text)
_sized(b"X", "<I", _Machine.text)
_sized(b"\x8d", "<Q", _Machine.text)
_sized(b"C", "<B", _Machine.binary)
_sized(b"B", "<I", _Machine.binary)
_sized(b"\x8e", "<Q", _Machine.binary)
_sized(b"\x96", "<Q", _Machine.binary)
_value(b"l", lambda m: m.pop_to_mark())
_value(b"t", lambda m: tuple(m.pop_to_mark()))
_value(b"\x91", lambda m: m.pop_to_mark())  # FROZENSET
_value(b"\x85", lambda m: (m.pop(),))
_value(b"c", lambda m: m.find_global(m.line(), m.line()))
_value(b"P", lambda m: _persist(m, m.line()))
_value(b"Q", lambda m: _persist(m, m.pop()))


def _persist(m: _Machine, persistent_id: Any) -> Any:
    if m.persistent is None:
        m.fail("refers to a storage outside of it")
    return m.persistent(persistent_id)


@_opcode(b"\x80")
def _proto(m: _Machine) -> None:
    version = m.byte()
    if version > 5:
        m.fail(f"is of protocol {version}, newer than 5")


@_opcode(b"\x95")
def _frame(m: _Machine) -> None:
    m.take(8)


@_opcode(b".")
def _stop(m: _Machine) -> None:
    raise _Stop(m.pop())


@_opcode(b"0")
def _pop(m: _Machine) -> None:
    m.stack.pop()


@_opcode(b"1")
def _pop_mark(m: _Machine) -> None:
    m.pop_to_mark()


@_opcode(b"2")
def _dup(m: _Machine) -> None:
    m.push(m.top())


@_opcode(b"\x86")
def _tuple2(m: _Machine) -> None:
    second, first = m.pop(), m.pop()
    m.push((first, second))


@_opcode(b"\x87")
def _tuple3(m: _Machine) -> None:
    third, second, first = m.pop(), m.pop(), m.pop()
    m.push((first, second, third))


@_opcode(b"d")
def _dict(m: _Machine) -> None:
    items = m.pop_to_mark()
    m.push({})
    m.store(m.top(), items)


@_opcode(b"a")
def _append(m: _Machine) -> None:
    item = m.pop()
    m.append(m.top(), [item])


@_opcode(b"e")
def _appends(m: _Machine) -> None:
    items = m.pop_to_mark()
    m.append(m.top(), items)


_OPCODES[0x90] = _appends  # ADDITEMS: sets are lists here


@_opcode(b"s")
def _setitem(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.store(m.top(), [key, value])


@_opcode(b"u")
def _setitems(m: _Machine) -> None:
    items = m.pop_to_mark()
    m.store(m.top(), items)


@_opcode(b"h")
def _binget(m: _Machine) -> None:
    m.get(m.byte())


@_opcode(b"j")
def _long_binget(m: _Machine) -> None:
    m.get(m.number(_UINT32))


@_opcode(b"g")
def _get(m: _Machine) -> None:
    m.get(int(m.line()))


@_opcode(b"q")
def _binput(m: _Machine) -> None:
    m.put(m.byte())


@_opcode(b"r")
def _long_binput(m: _Machine) -> None:
    m.put(m.number(_UINT32))


@_opcode(b"p")
def _put(m: _Machine) -> None:
    m.put(int(m.line()))


@_opcode(b"\x94")
def _memoize(m: _Machine) -> None:
    value = m.stack[-1]
    if value is _MARK:
        m.top()  # says so
    m.memo.append(value)


@_opcode(b"\x93")
def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.push(m.find_global(module, name))


@_opcode(b"R")
def _reduce(m: _Machine) -> None:
    args, callee = m.pop(), m.pop()
    m.push(m.call(callee, args))


_OPCODES[0x81] = _reduce  # NEWOBJ: cls.__new__(cls, *args), the same to us


@_opcode(b"\x92")
def _newobj_ex(m: _Machine) -> None:
    kwargs, args, callee = m.pop(), m.pop(), m.pop()
    if not isinstance(kwargs, dict):
        m.fail("gives keyword arguments that are no dict")
    m.push(m.call(callee, args, kwargs))


@_opcode(b"i")
def _inst(m: _Machine) -> None:
    callee = m.find_global(m.line(), m.line())
    m.push(m.call(callee, tuple(m.pop_to_mark())))


@_opcode(b"o")
def _obj(m: _Machine) -> None:
    callee, *args = m.pop_to_mark()
    m.push(m.call(callee, tuple(args)))


@_opcode(b"b")
def _build(m: _Machine) -> None:
    state = m.pop()
    m.build(m.top(), state)
