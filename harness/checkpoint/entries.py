"""What an object tree holds, entry by entry, and under which keys.

In: the object tree of a torch file, or a part of it. Out: its entries in order, as `state_dict()`
would list them: tensors, a rank's parts of DTensors, and values: the text of what is no tensor, as
a tensor of the dtype `value`. What is none of these is listed. Refused: subclasses without a tensor
inside, trees deeper than any model's, and more entries than the limits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from harness.checkpoint.dtypes import decode
from harness.checkpoint.formats.torchfile import TorchFile, is_module
from harness.checkpoint.keys import Component, format_key
from harness.checkpoint.limits import MAX_TENSORS
from harness.checkpoint.sources.source import too_many
from harness.checkpoint.tensors import Tensor
from harness.checkpoint.unpickling.dtensors import LocalPart, local_part
from harness.checkpoint.unpickling.inert import Global, OpaqueKey, Record, Table
from harness.checkpoint.unpickling.numpy_arrays import array_of
from harness.checkpoint.unpickling.rebuild import (
    Composite,
    StorageRef,
    is_unknown_tensor,
    value_tensor,
)
from harness.checkpoint.unpickling.values import ValueText
from harness.errors import CheckpointError

_MAX_DEPTH = 128
# An object may stand in many places, and what it holds with it: a small file can describe a tree
# without end. These bound the time and the memory (about 1 KB per tensor) that one may take; a file
# of a larger structure may have more: torch writes at least 64 bytes of a tensor.
_MAX_STEPS = 2_000_000
_MAX_NAMED = 64_000
_MAX_KEY_LENGTH = 4096
_MAX_KEY_TEXT = 200  # of one that is an object
_MAX_TEXT_LENGTH = 8 << 20
_NBYTES_PER_TENSOR = 64

KeyPath = tuple[object, ...]


class Tree:
    """The object tree of a torch file, and what was found out about it so far.

    `unread` are the entries that are neither tensors nor data, with why.
    """

    def __init__(self, file: TorchFile, name: str) -> None:
        self.file = file
        self.name = name
        self.unread: list[str] = []
        self._steps = 0
        nbytes = file.structure_nbytes
        self._max_steps = max(_MAX_STEPS, nbytes)
        self._max_tensors = max(_MAX_NAMED, min(nbytes // _NBYTES_PER_TENSOR, MAX_TENSORS))
        self._max_text = max(_MAX_TEXT_LENGTH, 4 * nbytes)
        self._counts: dict[int, int] = {}
        self._hollow: set[int] = set()
        self._made: dict[int, Tensor | LocalPart | None] = {}
        self._texts = ValueText()
        self._key_texts: dict[Global | OpaqueKey, str] = {}

    def entries(self, target: Any) -> Iterator[tuple[KeyPath, Tensor | LocalPart]]:
        """List what is below `target` in order, values as tensors of their text."""
        made = target if isinstance(target, Tensor) else self._read(target)
        if isinstance(made, LocalPart) and isinstance(made.local, Composite):
            yield from self._walk(made.local)
        elif made is not None:
            yield ("tensor",), made
        else:
            yield from self._walk(target)

    def _walk(self, target: Any) -> Iterator[tuple[KeyPath, Tensor | LocalPart]]:
        """Depth first, without recursion; an object inside of itself is not entered again."""
        levels = [_Level((), 0, target, self.children(target))]
        above = {id(target)}
        tensors = text = 0
        while levels:
            path, path_length, value, children = levels[-1]
            for step, child in children:
                self.step(1, path)
                if id(child) in above and isinstance(child, _CONTAINERS):
                    continue
                length = path_length + _length(step)
                if length > _MAX_KEY_LENGTH:
                    raise self._unbounded(f"have keys of {length} characters", path)
                if isinstance(child, Record) and is_unknown_tensor(child.callee):
                    raise self._unreadable(
                        _joined(path, step),
                        f"is made by {child.callee}, which is unknown",
                        "move its tensors to the CPU, and save it again",
                    )
                entry = child if isinstance(child, Tensor) else self._read(child)
                if isinstance(entry, LocalPart) and isinstance(entry.local, Composite):
                    # A subclass inside: its tensors are named by what they are parts of.
                    step, child = _Under(step, entry.steps), entry.local
                    entry = None
                elif entry is None and not self.count(child):
                    entry = self._value(child, path, step, value)
                    if entry is None:
                        continue
                elif id(child) in self._hollow:
                    raise self._unreadable(
                        _joined(path, step),
                        f"({child.kind or 'a subclass'}) has no tensors inside that the harness "
                        "could read",
                        "and save plain tensors",
                    )
                if entry is not None:
                    tensors, text = tensors + 1, text + length
                    if tensors > self._max_tensors:
                        raise too_many(self.name, self._max_tensors, "entries")
                    if text > self._max_text:
                        raise too_many(self.name, self._max_text, "characters of keys")
                    yield _joined(path, step), entry
                    continue
                if len(levels) > _MAX_DEPTH:
                    raise self._unbounded(f"are nested deeper than {_MAX_DEPTH} levels", path)
                self._steps += 4  # to enter costs more than to look at
                above.add(id(child))
                levels.append(_Level(_joined(path, step), length, child, self.children(child)))
                break
            else:
                levels.pop()
                above.discard(id(value))

    def _value(self, child: Any, path: KeyPath, step: Any, parent: Any) -> Tensor | None:
        """An entry without tensors, as its text; None for what is no entry of a state dict."""
        key = _joined(path, step)
        # A module's bias=None, its submodules without parameters; an attribute that is not set.
        if child is None and isinstance(parent, Composite):
            return None
        if isinstance(step, _Dotted) and (child is None or isinstance(child, Record)):
            return None
        try:
            return value_tensor("", self._texts.of(child))
        except ValueError as error:
            self.unread.append(f"{format_key(key)} ({error})")
            return None

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, (Tensor, Composite)) or isinstance(self._read(value), Tensor)

    def count(self, value: Any, depth: int = 0) -> int:
        """How many tensors there are below a value; 1 for what only a newer reader would know."""
        if isinstance(value, Tensor) or isinstance(self._read(value), Tensor):
            return 1
        if not isinstance(value, _CONTAINERS):
            return 0
        known = self._counts.get(id(value))
        if known is not None:
            return known
        if isinstance(value, Record) and is_unknown_tensor(value.callee):
            return 1
        if depth > _MAX_DEPTH:
            return 0  # the walk says so
        self._counts[id(value)] = count = 0  # an object inside of itself counts once
        for _, child in self.children(value):
            self.step()
            count += self.count(child, depth + 1)
        if isinstance(value, Composite) and not count:
            self._hollow.add(id(value))
            count = 1  # which is an error where it stands
        self._counts[id(value)] = count
        return count

    def _read(self, value: Any) -> Tensor | LocalPart | None:
        """What a record or composite is one of by itself: an array, or a part of a DTensor."""
        if not isinstance(value, (Record, Composite, StorageRef)):
            return None
        if id(value) not in self._made:
            self._made[id(value)] = self._make(value)
        return self._made[id(value)]

    def _make(self, value: Record | Composite | StorageRef) -> Tensor | LocalPart | None:
        if isinstance(value, Record):
            return array_of(value)
        if isinstance(value, StorageRef):
            return value.tensor()
        try:
            return local_part(value)
        except ValueError as error:
            raise CheckpointError(
                f"{self.name}: holds {error}",
                hint="save the whole tensors (full_tensor(), or get_model_state_dict with "
                "full_state_dict=True)",
            ) from error

    def _steps_of(self, values: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
        """Keys as steps; those that are no plain values by their text, or as `[key 2]`."""
        counts: Counter[str] = Counter()
        for key, child in values.items():
            if not isinstance(key, (Global, OpaqueKey)):
                yield key, child
            elif isinstance(key, OpaqueKey) and isinstance(key.value, int):
                yield key.value, child
            else:
                name = self._key_text(key)
                counts[name] += 1
                yield Component(name if counts[name] == 1 else f"{name} {counts[name]}"), child

    def _key_text(self, key: Global | OpaqueKey) -> str:
        known = self._key_texts.get(key)
        if known is None:
            try:
                known = self._number(key) or self._texts.of(key)
                data = known.encode()
            except ValueError:
                known = "key"
            else:
                if len(known) > _MAX_KEY_TEXT:
                    known = f"{known[:_MAX_KEY_TEXT]}… {blake3(data).hexdigest()[:16]}"
            self._key_texts[key] = known
        return known

    def _number(self, key: Global | OpaqueKey) -> str | None:
        """The number that a scalar of numpy is, however its version pickles it."""
        record = key.value if isinstance(key, OpaqueKey) else None
        made = array_of(record) if isinstance(record, Record) else None
        if made is None or made.shape:
            return None
        data = bytearray(made.nbytes)
        made.read_into(0, memoryview(data))
        return str(decode(np.frombuffer(data, np.uint8), made.dtype)[0])

    def is_script(self, value: Any) -> bool:
        return (
            isinstance(value, Record)
            and isinstance(value.callee, Global)
            and value.callee in self.file.script_classes
        )

    def children(self, value: Any) -> Iterator[tuple[Any, Any]]:
        # What is looked at and not passed on is counted here: thousands may share it.
        if isinstance(value, Composite):
            self._steps += len(value.parts)
            if value.base is not None:
                yield _SELF, value.base
            for name, part in value.parts.items():
                if isinstance(name, str):
                    yield Component(name), part
        elif is_module(value):
            yield from self._module_children(value.state)
        elif self.is_script(value):
            yield from self._script_children(value)
        elif isinstance(value, (Record, dict)):
            yield from self._object_children(value)
        elif isinstance(value, (list, tuple)):
            yield from enumerate(value)

    def _object_children(self, value: Record | dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
        """The items of an object, and whatever else it was made of."""
        rest: dict[str, Any] = {}
        if isinstance(value, Record):
            yield from self._steps_of(value.pairs)
            yield from enumerate(value.items)
            rest = {"state": value.state, "args": value.args, "kwargs": value.kwargs}
            if not isinstance(value.callee, Global):
                rest["callee"] = value.callee
        else:
            yield from self._steps_of(value)
            if isinstance(value, Table):
                rest = {"state": value.state}
        for name, part in rest.items():
            if part is not None and part != () and part != {}:
                yield Component(name), part

    def _module_children(self, state: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
        """A module's state dict: its parameters, its persistent buffers, its children."""
        self._steps += sum(len(state[name]) for name in ("_parameters", "_buffers", "_modules"))
        skipped = state.get("_non_persistent_buffers_set")
        skipped = skipped if isinstance(skipped, list) else []
        self._steps += len(skipped)
        transient = {item for item in skipped if isinstance(item, str)}
        for held in ("_parameters", "_buffers", "_modules"):
            for key, child in state[held].items():
                # A module that pickles itself in its own way counts, too.
                if isinstance(key, str) and not (held == "_buffers" and key in transient):
                    yield _Dotted(key), child

    def _script_children(self, value: Record) -> Iterator[tuple[Any, Any]]:
        parameters, buffers = self.file.script_classes[value.callee]
        state = value.state if isinstance(value.state, dict) else {}
        self._steps += len(parameters) + len(buffers) + len(state)
        for key in (*parameters, *buffers):
            if isinstance(state.get(key), Tensor):
                yield _Dotted(key), state[key]
        for key, child in state.items():
            if isinstance(key, str) and self.is_script(child):
                yield _Dotted(key), child

    def step(self, count: int = 1, path: KeyPath = ()) -> None:
        """Count what is looked at; raises CheckpointError for more than any model needs."""
        self._steps += count
        if self._steps > self._max_steps:
            raise self._unbounded(f"take more than {self._max_steps:,} steps to list", path)

    def _unbounded(self, what: str, path: KeyPath) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: its objects {what}, at {format_key(path or ('the root',))[:200]}",
            hint="the file is malformed, or made to exhaust its reader: do not trust it",
        )

    def _unreadable(self, path: KeyPath, why: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: tensor {format_key(path)[:200]} {why}",
            hint=f"load the file with torch, {what}",
        )


_CONTAINERS = (Tensor, Composite, Record, dict, list, tuple)


_SELF = Component("")  # a composite's own place


class _Under(NamedTuple):
    """Several steps at once."""

    step: Any
    below: tuple[Component, ...]


class _Level(NamedTuple):
    path: KeyPath
    length: int
    value: Any
    children: Iterator[tuple[Any, Any]]


def _length(step: Any) -> int:
    if isinstance(step, _Under):
        return _length(step.step) + sum(map(_length, step.below))
    text = step.name if isinstance(step, Component) else step
    return 4 + len(text if isinstance(text, str) else repr(text))


class _Dotted(str):
    """A step of a module's path: joined with dots, as `state_dict()` does."""

    __slots__ = ()


def _joined(path: KeyPath, step: Any) -> KeyPath:
    if step is _SELF:
        return path
    if isinstance(step, _Under):
        return (*_joined(path, step.step), *step.below)
    if path and isinstance(step, _Dotted) and isinstance(path[-1], _Dotted):
        return (*path[:-1], _Dotted(f"{path[-1]}.{step}"))
    return (*path, step)


def spelled(step: Any) -> str:
    return step.name if isinstance(step, Component) else str(step)
