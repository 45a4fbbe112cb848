"""Which tensors of a file are its state dict, and under which keys.

In: the object tree of a torch file. Out: the path of the state dict and its tensors in order, as
`state_dict()` would list them. Refused: files without tensors, sections that do not exist, and
trees deeper than any model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from harness.checkpoint.formats.torchfile import TorchFile, is_module
from harness.checkpoint.keys import Component, format_key
from harness.checkpoint.tensors import Tensor
from harness.checkpoint.unpickling.inert import Global, OpaqueKey, Record
from harness.checkpoint.unpickling.rebuild import Composite, is_unknown_tensor
from harness.errors import CheckpointError, NoSection
from harness.text.shell import quoted

# Where training code puts the weights, the most specific first.
KNOWN_SECTIONS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "ema",
)
_MAX_DEPTH = 128
# An object may stand in many places, and what it holds with it: a small file can describe a tree
# without end. These bound the time and the memory (about 1 KB per tensor) that one may take.
_MAX_STEPS = 2_000_000
_MAX_TENSORS = 64_000
_MAX_KEY_LENGTH = 4096
_MAX_TEXT_LENGTH = 8 << 20

Path = tuple[object, ...]


def find_tensors(file: TorchFile, name: str, section: str | None) -> tuple[str, list[Tensor]]:
    """Return the section's path ("" for the root) and its tensors, keys filled in.

    `section` None looks for the state dict; "." takes every tensor in the file; anything else is
    a dotted path into the file (`optimizer_states.0`).
    """
    tree = _Tree(file, name)
    if section == ".":
        return ".", tree.named(file.root)
    if section is not None:
        target = tree.resolve(section)
        tensors = tree.named(target)
        if not tensors:
            raise NoSection(f"{name}: its section {section!r} holds no tensors", hint=tree.hint())
        return section, tensors
    found = tree.state_dict()
    if found is None:
        raise NoSection(f"{name}: no state dict found in it", hint=tree.hint())
    path, target = found
    return ".".join(path), tree.named(target)


class _Tree:
    def __init__(self, file: TorchFile, name: str) -> None:
        self.file = file
        self.name = name
        self._steps = 0
        self._weights: dict[int, bool] = {}

    def state_dict(self) -> tuple[tuple[str, ...], Any] | None:
        """Find the state dict: the root if it maps names to tensors, else a known section."""
        pending: list[tuple[tuple[str, ...], Any]] = [((), self.file.root)]
        for path, value in pending:  # breadth first, two levels of known names
            if not isinstance(value, dict):
                if self._is_weights(value):
                    return path, value
                continue
            known = [(key, value[key]) for key in KNOWN_SECTIONS if key in value]
            nested = [(key, child) for key, child in known if isinstance(child, (dict, Record))]
            if self._is_weights(value) and not any(self._is_weights(c) for _, c in nested):
                return path, value
            if len(path) < 3:
                pending.extend(((*path, key), child) for key, child in nested)
        return None

    def _is_weights(self, value: Any) -> bool:
        known = self._weights.get(id(value))
        if known is None:
            known = self._weights[id(value)] = self._holds_weights(value)
        return known

    def _holds_weights(self, value: Any) -> bool:
        if isinstance(value, (Tensor, Composite)) or is_module(value) or self._is_script(value):
            return True
        if isinstance(value, Record):  # a dict of a class of its own
            value = value.pairs
        children = value.values() if isinstance(value, dict) else value
        if isinstance(children, (list, tuple)) or isinstance(value, dict):
            return any(isinstance(child, (Tensor, Composite)) for child in children)
        return False

    def _is_script(self, value: Any) -> bool:
        return (
            isinstance(value, Record)
            and isinstance(value.callee, Global)
            and value.callee in self.file.script_classes
        )

    def named(self, target: Any) -> list[Tensor]:
        """List the tensors below `target` in order, each under its key."""
        if isinstance(target, Tensor):
            return [target.named("tensor")]
        return [tensor.named(format_key(path)) for path, tensor in self._walk(target)]

    def _walk(self, target: Any) -> Iterator[tuple[Path, Tensor]]:
        """Depth first, without recursion; an object inside of itself is not entered again."""
        levels = [_Level((), 0, target, self._children(target))]
        above = {id(target)}
        tensors = text = 0
        while levels:
            path, path_length, value, children = levels[-1]
            for step, child in children:
                self._steps += 1
                if self._steps > _MAX_STEPS:
                    raise self._unbounded("hold more than any model's", path)
                if not isinstance(child, _CONTAINERS) or id(child) in above:
                    continue
                length = path_length + _length(step)
                if length > _MAX_KEY_LENGTH:
                    raise self._unbounded(f"have keys of {length} characters", path)
                if isinstance(child, Tensor):
                    tensors, text = tensors + 1, text + length
                    if tensors > _MAX_TENSORS or text > _MAX_TEXT_LENGTH:
                        raise self._unbounded("hold more tensors than any model's", path)
                    yield _joined(path, step), child
                    continue
                if isinstance(child, Record) and is_unknown_tensor(child.callee):
                    raise self._unknown_tensor(child.callee, _joined(path, step))
                if len(levels) > _MAX_DEPTH:
                    raise self._unbounded(f"are nested deeper than {_MAX_DEPTH} levels", path)
                self._steps += 4  # to enter costs more than to look at
                above.add(id(child))
                levels.append(_Level(_joined(path, step), length, child, self._children(child)))
                break
            else:
                levels.pop()
                above.discard(id(value))

    def _unbounded(self, what: str, path: Path) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: its objects {what}, at {format_key(path or ('the root',))[:200]}",
            hint="the file is malformed, or made to exhaust its reader: do not trust it",
        )

    def _unknown_tensor(self, function: Global, path: Path) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: tensor {format_key(path)[:200]} is made by {function}, which is unknown",
            hint="load the file by torch, move its tensors to the CPU, and save it again",
        )

    def _children(self, value: Any) -> Iterator[tuple[Any, Any]]:
        # What is looked at and not passed on is counted here: thousands may share it.
        if isinstance(value, Composite):
            self._steps += len(value.parts)
            for name, part in value.parts.items():
                if isinstance(name, str) and isinstance(part, (Tensor, Composite)):
                    yield Component(name), part
        elif is_module(value):
            yield from self._module_children(value.state)
        elif self._is_script(value):
            yield from self._script_children(value)
        elif isinstance(value, Record):
            yield from _steps(value.pairs)
            yield from enumerate(value.items)
            if isinstance(value.state, (dict, list, tuple, Record)):
                yield Component("state"), value.state
            if value.args:
                yield Component("args"), value.args
        elif isinstance(value, dict):
            yield from _steps(value)
        elif isinstance(value, (list, tuple)):
            yield from enumerate(value)

    def _module_children(self, state: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
        """A module's state dict: its parameters, its persistent buffers, its children."""
        self._steps += sum(len(state[name]) for name in ("_parameters", "_buffers", "_modules"))
        skipped = state.get("_non_persistent_buffers_set")
        self._steps += len(skipped) if isinstance(skipped, list) else 0
        transient = (
            {item for item in skipped if isinstance(item, str)}
            if isinstance(skipped, list)
            else set()
        )
        for key, parameter in state["_parameters"].items():
            if isinstance(key, str):
                yield _Dotted(key), parameter
        for key, buffer in state["_buffers"].items():
            if isinstance(key, str) and key not in transient:
                yield _Dotted(key), buffer
        for key, module in state["_modules"].items():
            if isinstance(key, str):  # one that pickles itself in its own way counts, too
                yield _Dotted(key), module

    def _script_children(self, value: Record) -> Iterator[tuple[Any, Any]]:
        parameters, buffers = self.file.script_classes[value.callee]
        state = value.state if isinstance(value.state, dict) else {}
        self._steps += len(parameters) + len(buffers) + len(state)
        for key in (*parameters, *buffers):
            if isinstance(state.get(key), Tensor):
                yield _Dotted(key), state[key]
        for key, child in state.items():
            if isinstance(key, str) and self._is_script(child):
                yield _Dotted(key), child

    def resolve(self, section: str) -> Any:
        """Follow a dotted path; keys that hold dots themselves are matched whole."""
        value, rest = self.file.root, section
        while rest:
            children = {_spelled(step): child for step, child in self._children(value)}
            fitting = [key for key in children if rest == key or rest.startswith(key + ".")]
            if not fitting:
                raise NoSection(
                    f"{self.name}: has no section {section!r}: {rest!r} is not among "
                    f"{', '.join(name[:80] for name in sorted(children)[:8]) or 'nothing'}",
                    hint=self.hint(),
                )
            key = max(fitting, key=len)
            value, rest = children[key], rest[len(key) + 1 :]
        return value

    def hint(self) -> str:
        """Name the sections that hold tensors, for an error's next step."""
        found, names, at_top = [], [], False
        for step, child in self._children(self.file.root):
            at_top |= isinstance(child, Tensor)
            if isinstance(child, (dict, list, tuple, Record, Composite)):
                count = sum(1 for _ in self._walk(child))
                if count:
                    names.append(_spelled(step))
                    found.append(f"{names[-1][:80]} ({count} tensors)")
        if at_top and not found:
            return "its tensors are in no section: leave out --section"
        if not found:
            return "the file holds no tensors: is it the right one?"
        short = next((name for name in names if len(name) <= 80), ".")
        return (
            f"of its sections {', '.join(found[:8])}, or . for every tensor, take one: "
            f"harness record {quoted(self.name)} --section {quoted(short)}"
        )


_CONTAINERS = (Tensor, Composite, Record, dict, list, tuple)


class _Level(NamedTuple):
    path: Path
    length: int
    value: Any
    children: Iterator[tuple[Any, Any]]


def _length(step: Any) -> int:
    text = step.name if isinstance(step, Component) else step
    return 4 + len(text if isinstance(text, str) else repr(text))


class _Dotted(str):
    """A step of a module's path: joined with dots, as `state_dict()` does."""

    __slots__ = ()


def _joined(path: Path, step: Any) -> Path:
    if path and isinstance(step, _Dotted) and isinstance(path[-1], _Dotted):
        return (*path[:-1], _Dotted(f"{path[-1]}.{step}"))
    return (*path, step)


def _steps(values: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Keys as steps; of those that are no plain values, the second of a kind is `[key kind 2]`."""
    counts: Counter[str] = Counter()
    for key, child in values.items():
        if isinstance(key, OpaqueKey) and not isinstance(key.value, int):
            kind = f"key {type(key.value).__name__}"
            counts[kind] += 1
            yield Component(kind if counts[kind] == 1 else f"{kind} {counts[kind]}"), child
        elif isinstance(key, OpaqueKey):
            yield key.value, child
        else:
            yield Component(str(key)) if isinstance(key, Global) else key, child


def _spelled(step: Any) -> str:
    return step.name if isinstance(step, Component) else str(step)
