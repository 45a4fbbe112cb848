"""The inert unpickler: reads the structure of a pickle and executes nothing.

In: the bytes of a pickle (protocols 0 to 5), and what to make of persistent ids; what functions of
torch mean is in the closed table of `rebuild`. Out: dicts, lists, tuples, strings, numbers, and for
everything else `Global` (a name, never imported) and `Record` (what would have been called with
what, as data). Refused: malformed opcodes, extension registry codes, out-of-band buffers, and more
objects or text than a checkpoint's structure needs.

This is a machine of its own, not a subclass of `pickle.Unpickler`, because the standard ones give
the file more than a checkpoint needs: `PUT` with a large index allocates gigabytes, `BUILD` sets
attributes on whatever is on the stack, nested tuples as dictionary keys overflow the C stack.
Opcodes as documented in the standard library's `pickletools`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from harness.checkpoint.sources.scratch import copied
from harness.checkpoint.sources.source import Source, damaged
from harness.checkpoint.unpickling.inert import Items
from harness.checkpoint.unpickling.machine import Machine
from harness.errors import CheckpointError

# What the objects of a pickle may cost in memory: a tensor's structure costs about 2.5 KB, so this
# is enough for 50,000 tensors whatever the file says. A pickle of more bytes may have more: what
# torch writes of a tensor, or of a chunk, is at least 100 bytes, counted as 2.5 to 5 KB of objects.
MAX_STRUCTURE_NBYTES = 128 << 20
_COST_PER_BYTE = 48
_MAX_COST_NBYTES = 2 << 30
_MAX_INTEGER_NBYTES = 1024
# What operations raise for what is not as they take it.
_MALFORMED = (LookupError, TypeError, ValueError, OverflowError, AttributeError, struct.error)


def structure_limit(pickle_nbytes: int, least: int = MAX_STRUCTURE_NBYTES) -> int:
    """What the objects of a pickle of so many bytes may cost."""
    return max(least, min(_COST_PER_BYTE * pickle_nbytes, _MAX_COST_NBYTES))


@dataclass(slots=True)
class Budget:
    """What the objects of several pickles have cost so far: one limit holds for them together."""

    nbytes: int = 0
    max_nbytes: int = MAX_STRUCTURE_NBYTES


def unpickle(
    data: memoryview,
    *,
    name: str,
    persistent: Callable[[Any], Any] | None = None,
    max_nbytes: int | None = None,
    budget: Budget | None = None,
) -> tuple[Any, int]:
    """Read one pickle from the start of `data`; returns the object and where the pickle ends.

    What is read costs at most `max_nbytes`, by default those of `budget`, together with what it
    counts already, and those as large as the pickle warrants. Raises CheckpointError, with the
    offset, for everything malformed.
    """
    budget = budget or Budget(max_nbytes=structure_limit(len(data)))
    machine = Machine(data, name, persistent, max_nbytes or budget.max_nbytes)
    machine.left -= budget.nbytes
    value = _run(machine)
    budget.nbytes = machine.max_nbytes - machine.left
    return value, machine.position


def unpickle_all(
    source: Source, *, persistent: Callable[[Any], Any] | None = None, budget: Budget | None = None
) -> Any:
    """Read a source that is one pickle, from its first byte to its last; as `unpickle`."""
    data = copied(source, 0, source.nbytes)
    value, end = unpickle(data, name=source.name, persistent=persistent, budget=budget)
    if end != source.nbytes:
        raise damaged(source.name, f"has {source.nbytes - end} bytes after its pickle")
    return value


class _Stop(Exception):  # noqa: N818 - ends the loop, not an error
    pass


def _run(m: Machine) -> Any:
    data, size, opcodes = m.data, len(m.data), _OPCODES
    try:
        while True:
            position = m.position
            if position >= size:
                m.fail("ends before its STOP")
            operation, operand, width, cost = opcodes[data[position]]
            m.position = position + width
            m.left -= cost
            if m.left < 0:
                m.spend(0)  # says so
            if operand is None:
                operation(m)
            else:
                operation(m, operand.unpack_from(data, position + 1)[0])
    except _Stop as stop:
        return stop.args[0]
    except CheckpointError:
        raise
    except _MALFORMED as error:
        if m.position > size:
            m.fail("ends inside of its last opcode")
        m.fail(f"is malformed ({type(error).__name__}: {str(error)[:200]})")


def _stop(m: Machine) -> None:
    raise _Stop(m.stack.pop())


def _drop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_to_mark()


def _persist(m: Machine, persistent_id: Any) -> None:
    if m.persistent is None:
        m.fail("refers to a storage outside of it")
    m.push(m.persistent(persistent_id))


def _protocol(m: Machine, version: int) -> None:
    if version > 5:
        m.fail(f"is of protocol {version}, newer than 5")


def _long(m: Machine, nbytes: int) -> None:
    raw = m.take(nbytes)
    if len(raw) > _MAX_INTEGER_NBYTES:
        m.fail(
            f"holds an integer of {len(raw):,} bytes; of more than {_MAX_INTEGER_NBYTES:,} none is "
            "read",
            "save a number of that size as text",
        )
    m.spend(2 * len(raw))
    m.push(int.from_bytes(raw, "little", signed=True))


def _text_integer(m: Machine) -> None:
    line = m.line()
    m.push({"00": False, "01": True}[line] if line in ("00", "01") else int(line))


def _quoted(m: Machine) -> None:
    line = m.line()
    if len(line) < 2 or line[0] != line[-1] or line[0] not in "\"'":
        m.fail("holds a string without its quotes")
    m.push(line[1:-1].encode("latin-1").decode("unicode_escape"))


def _bytes_as(made: Callable[[Machine, memoryview], Any]) -> Callable[[Machine, int], None]:
    return lambda m, nbytes: m.push(made(m, m.take(nbytes)))


def _dict(m: Machine) -> None:
    items = m.pop_to_mark()
    m.push({})
    m.store(items)


def _instance(m: Machine) -> None:
    callee = m.find_global(m.line(), m.line())
    m.push(m.call(callee, tuple(m.pop_to_mark())))


def _object(m: Machine) -> None:
    callee, *args = m.pop_to_mark()
    m.push(m.call(callee, tuple(args)))


# What it costs in memory; never less than what is really taken.
_SLOT, _ENTRY, _NUMBER, _OBJECT, _CALL = 16, 32, 48, 80, 112

# The code, its operand where that has a fixed size, what it costs, and what it does. Sets are
# lists here, that say so.
_ROWS: list[tuple[bytes, str, int, Callable[..., Any]]] = [
    (b"\x80", "B", _SLOT, _protocol),
    (b"\x95", "<Q", _SLOT, lambda m, nbytes: None),  # FRAME
    (b".", "", _SLOT, _stop),
    # the stack
    (b"(", "", _CALL, Machine.mark),
    (b"0", "", _SLOT, _drop),
    (b"1", "", _SLOT, Machine.pop_to_mark),
    (b"2", "", _SLOT, lambda m: m.push(m.stack[-1])),
    # constants and numbers
    (b"N", "", _SLOT, lambda m: m.push(None)),
    (b"\x88", "", _SLOT, lambda m: m.push(True)),
    (b"\x89", "", _SLOT, lambda m: m.push(False)),
    (b"K", "B", _SLOT, Machine.push),
    (b"M", "<H", _NUMBER, Machine.push),
    (b"J", "<i", _NUMBER, Machine.push),
    (b"G", ">d", _NUMBER, Machine.push),
    (b"I", "", _NUMBER, _text_integer),
    (b"L", "", _NUMBER, lambda m: m.push(int(m.line().rstrip("L")))),
    (b"F", "", _NUMBER, lambda m: m.push(float(m.line()))),
    (b"\x8a", "B", _NUMBER, _long),
    (b"\x8b", "<I", _NUMBER, _long),
    # text and bytes
    (b"S", "", _OBJECT, _quoted),
    (b"V", "", _OBJECT, lambda m: m.push(m.line().encode("latin-1").decode("raw_unicode_escape"))),
    (b"U", "B", _SLOT, _bytes_as(Machine.python2_text)),
    (b"T", "<I", _SLOT, _bytes_as(Machine.python2_text)),
    (b"\x8c", "B", _SLOT, _bytes_as(Machine.text)),
    (b"X", "<I", _SLOT, _bytes_as(Machine.text)),
    (b"\x8d", "<Q", _SLOT, _bytes_as(Machine.text)),
    (b"C", "B", _OBJECT, _bytes_as(Machine.binary)),
    (b"B", "<I", _OBJECT, _bytes_as(Machine.binary)),
    (b"\x8e", "<Q", _OBJECT, _bytes_as(Machine.binary)),
    (b"\x96", "<Q", _OBJECT, _bytes_as(Machine.binary)),
    # containers
    (b")", "", _SLOT, lambda m: m.push(())),
    (b"\x85", "", _OBJECT, lambda m: m.push(m.pop(1))),
    (b"\x86", "", _OBJECT, lambda m: m.push(m.pop(2))),
    (b"\x87", "", _OBJECT, lambda m: m.push(m.pop(3))),
    (b"t", "", _OBJECT, lambda m: m.push(tuple(m.pop_to_mark()))),
    (b"]", "", _OBJECT, lambda m: m.push([])),
    (b"l", "", _OBJECT, lambda m: m.push(m.pop_to_mark())),
    (b"a", "", _SLOT, lambda m: m.append(m.pop(1))),
    (b"e", "", _SLOT, lambda m: m.append(m.pop_to_mark())),
    (b"}", "", _OBJECT, lambda m: m.push({})),
    (b"d", "", _OBJECT, _dict),
    (b"s", "", _SLOT, lambda m: m.store(m.pop(2))),
    (b"u", "", _SLOT, lambda m: m.store(m.pop_to_mark())),
    (b"\x8f", "", _OBJECT, lambda m: m.push(Items())),  # EMPTY_SET
    (b"\x90", "", _SLOT, lambda m: m.append(m.pop_to_mark())),  # ADDITEMS
    (b"\x91", "", _OBJECT, lambda m: m.push(Items(m.pop_to_mark()))),  # FROZENSET
    # the memo
    (b"q", "B", _ENTRY, Machine.put),
    (b"r", "<I", _ENTRY, Machine.put),
    (b"p", "", _ENTRY, lambda m: m.put(int(m.line()))),
    (b"\x94", "", _ENTRY, lambda m: m.put(len(m.memo))),
    (b"h", "B", _SLOT, Machine.get),
    (b"j", "<I", _SLOT, Machine.get),
    (b"g", "", _SLOT, lambda m: m.get(int(m.line()))),
    # what would be imported and called
    (b"c", "", _SLOT, lambda m: m.push(m.find_global(m.line(), m.line()))),
    (b"\x93", "", _SLOT, lambda m: m.push(m.find_global(*m.pop(2)))),
    (b"R", "", _CALL, lambda m: m.push(m.call(*m.pop(2)))),
    (
        b"\x81",
        "",
        _CALL,
        lambda m: m.push(m.call(*m.pop(2))),
    ),  # NEWOBJ: cls.__new__(cls, *args), the same to us
    (b"\x92", "", _CALL, lambda m: m.push(m.call(*m.pop(3)))),
    (b"i", "", _CALL, _instance),
    (b"o", "", _CALL, _object),
    (b"b", "", _SLOT, lambda m: m.build(*m.pop(1))),
    (b"P", "", _CALL, lambda m: _persist(m, m.line())),
    (b"Q", "", _CALL, lambda m: _persist(m, m.stack.pop())),
]


def _unknown(m: Machine) -> None:
    m.fail(f"holds the byte 0x{m.data[m.position - 1]:02x}, which is no opcode")


def _opcodes() -> Iterator[tuple[Callable[..., Any], struct.Struct | None, int, int]]:
    """For each byte: the operation, its operand, how many bytes the two take, and the cost."""
    known = {row[0][0]: row for row in _ROWS}
    for code in range(256):
        _, operand, cost, operation = known.get(code, (b"", "", _SLOT, _unknown))
        form = struct.Struct(operand) if operand else None
        yield operation, form, 1 + struct.calcsize(operand), cost


_OPCODES = list(_opcodes())
