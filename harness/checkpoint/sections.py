"""Which part of a file is its state dict, and what else the file holds.

In: the object tree of a torch file. Out: the path of the state dict and its entries in order.
Refused: files without tensors, and sections that do not exist.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, ValuesView
from dataclasses import dataclass, replace
from typing import Any

from harness.checkpoint.entries import Tree, spelled
from harness.checkpoint.formats.torchfile import TorchFile, is_module
from harness.checkpoint.keys import format_key, format_steps
from harness.checkpoint.tensors import Tensor
from harness.checkpoint.unpickling.dtensors import LocalPart
from harness.checkpoint.unpickling.inert import Record
from harness.errors import NoSection
from harness.text.shell import quoted

# Where training code puts the weights, the most specific first.
KNOWN_SECTIONS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module"),
    *("net", "network", "weights", "params", "ema"),
)
# Compared as the config, or of no account: who wrote the file.
_SAID = ("hyper_parameters", "hparams_name", "pytorch-lightning_version")
_MAX_NAME = 200  # of a section that is not known
# What training code puts right beside the weights, as torchtitan and Megatron do: as a container,
# or flattened into keys, those of a parameter's own state among them (`state.head.weight.exp_avg`).
_TRAINING = re.compile(
    r"optim(?:izers?)?(?:_states?|_state_dict)?|(?:lr_)?schedulers?|dataloader|train(?:er)?_state"
    r"|rng_states?|(?:grad_)?scaler"
)
_FLAT = re.compile(
    r"(?P<name>(?:chained_\d+\.)?optim\w*)\.(?:.*\.)?(?:state|param_groups|distributed)\..*",
    re.DOTALL,
)
_OF_PARAMETER = re.compile(r"(?P<name>state|param_groups)\.(?P<of>.+)\.\w+", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One part of a file: its `path` ("" for the root), and its entries by key.

    `unread` are entries that are neither tensors nor data, with why; `others` are the other parts
    of the file, with how many tensors they hold: 0 of values alone.
    """

    path: str
    entries: list[tuple[str, Tensor | LocalPart]]
    unread: tuple[str, ...] = ()
    others: tuple[tuple[str, int | None], ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """The entries as tensors; a rank's part of one says in its key which it is."""
        return [
            entry.named(key)
            if isinstance(entry, Tensor)
            else entry.tensor.named(key + format_steps(entry.steps))
            for key, entry in self.entries
        ]


def find_section(file: TorchFile, name: str, section: str | None) -> Parts:
    """Find the part of a file that is asked for, and list what it holds.

    `section` None looks for the state dict; "." takes all that the file holds; anything else is
    a dotted path into the file (`optimizer_states.0`).
    """
    finder = _Finder(Tree(file, name))
    if section == ".":
        return finder.parts(".", (), file.root)
    if section is not None:
        steps, target = finder.resolve(section)
        found = finder.parts(section, steps, target)
        if all(isinstance(entry, Tensor) and entry.dtype.is_value for _, entry in found.entries):
            raise NoSection(f"{name}: its section {section!r} holds no tensors", hint=finder.hint())
        return found
    state_dict = finder.state_dict()
    if state_dict is None:
        error = NoSection(f"{name}: no state dict found in it", hint=finder.hint())
        error.sections = tuple(finder.named())
        raise error
    path, target = state_dict
    target, beside = finder.without_training(target)
    found = finder.parts(".".join(path), path, target)
    return replace(found, others=(*found.others, *beside))


class _Finder:
    """Finds the parts of one tree."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.root = tree.file.root
        self._weights: dict[int, bool] = {}

    def state_dict(self) -> tuple[tuple[str, ...], Any] | None:
        """Find the state dict: the root if it maps names to tensors, else a known section.

        Where no name is known: the only part of the file that it can be.
        """
        pending: list[tuple[tuple[str, ...], Any]] = [((), self.root)]
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
        return self._only_weights()

    def without_training(self, target: Any) -> tuple[Any, list[tuple[str, int]]]:
        """A state dict without what training code puts beside its weights, and what that is."""
        if not isinstance(target, dict):
            return target, []
        names = {key for key, child in target.items() if self.tree.is_tensor(child)}
        kept, beside = {}, Counter[str]()
        for key, child in target.items():
            name = self._training_in(key, child, names)
            if name is None:
                kept[key] = child
            else:
                beside[name] += self.tree.count(child)
        if not beside or not any(map(self.tree.is_tensor, kept.values())):
            return target, []
        return kept, [(name, count) for name, count in beside.items() if count]

    def _training_in(self, key: Any, child: Any, names: set[Any]) -> str | None:
        """The name of the state of a training, which an entry is or belongs to."""
        if not isinstance(key, str) or len(key) > _MAX_NAME:
            return None
        if isinstance(child, (dict, list, tuple, Record)) and _TRAINING.fullmatch(key):
            return key
        if (flat := _FLAT.fullmatch(key)) is not None:
            return flat["name"]
        own = _OF_PARAMETER.fullmatch(key)
        return own["name"] if own is not None and own["of"] in names else None

    def _only_weights(self) -> tuple[tuple[str, ...], Any] | None:
        found: list[tuple[tuple[str, ...], Any]] = []
        pending: list[tuple[tuple[str, ...], Any]] = [((), self.root)]
        for path, value in pending:
            if path and self._is_weights(value):
                found.append((path, value))
            elif isinstance(value, dict) and len(path) < 3 and "param_groups" not in value:
                self.tree.step(len(value))
                pending.extend(
                    ((*path, key), child)
                    for key, child in value.items()
                    if isinstance(key, str)
                    and len(key) <= _MAX_NAME
                    and isinstance(child, (dict, Record))
                )
        return found[0] if len(found) == 1 else None

    def _is_weights(self, value: Any) -> bool:
        known = self._weights.get(id(value))
        if known is None:
            tree, held = self.tree, value
            known = tree.is_tensor(value) or is_module(value) or tree.is_script(value)
            if isinstance(held, Record):  # a dict of a class of its own
                held = held.pairs
            held = held.values() if isinstance(held, dict) else held
            if not known and isinstance(held, (list, tuple, ValuesView)):
                known = any(map(tree.is_tensor, held))
            self._weights[id(value)] = known
        return known

    def parts(self, name: str, steps: tuple[str, ...], target: Any) -> Parts:
        """List what is below `target`, to which `steps` lead from the root."""
        entries = [(format_key(path), entry) for path, entry in self.tree.entries(target)]
        return Parts(
            path=name,
            entries=entries,
            unread=tuple(self.tree.unread),
            others=tuple(self._others(steps)),
        )

    def _others(self, steps: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        """What else there is on the way from the root to a section, with how many tensors."""
        value, above = self.root, ""
        for taken in steps:
            children = [(spelled(step), child) for step, child in self.tree.children(value)]
            if taken not in dict(children):  # what begins so, of a flat state dict
                return
            for name, child in children:
                count = self.tree.count(child)
                is_said = name in _SAID or child is None or child in ({}, [], (), "")
                if name != taken and (count or not is_said):
                    yield f"{above}{name}", count
            value = dict(children)[taken]
            above = f"{above}{taken}."

    def resolve(self, section: str) -> tuple[tuple[str, ...], Any]:
        """Follow a dotted path; keys that hold dots themselves are matched whole, or in front."""
        value, rest = self.root, section
        steps: tuple[str, ...] = ()
        while rest:
            children = {spelled(step): child for step, child in self.tree.children(value)}
            fitting = [key for key in children if rest == key or rest.startswith(key + ".")]
            # Of a flat state dict: what has keys that begin so.
            below = {k[len(rest) + 1 :]: v for k, v in children.items() if k.startswith(f"{rest}.")}
            if not fitting and below:
                return (*steps, rest), below
            if not fitting:
                there = ", ".join(name[:80] for name in sorted(children)[:8]) or "nothing"
                where = f"{section[: -len(rest) - 1]} has " if steps else ""
                raise NoSection(
                    f"{self.tree.name}: has no section {section!r}, only {where}{there}",
                    hint=self.hint(),
                )
            key = max(fitting, key=len)
            value, rest, steps = children[key], rest[len(key) + 1 :], (*steps, key)
        return steps, value

    def named(self) -> Iterator[str]:
        """The parts at the top that hold weights."""
        for step, child in self.tree.children(self.root):
            if isinstance(step, str) and self._is_weights(child):
                yield step

    def hint(self) -> str:
        """Name the sections that hold tensors, for an error's next step."""
        found, names, at_top = [], [], False
        for step, child in self.tree.children(self.root):
            at_top |= isinstance(child, Tensor)
            count = 0 if isinstance(child, Tensor) else self.tree.count(child)
            if count:
                names.append(spelled(step))
                found.append(f"{names[-1][:80]} ({count} tensor{'s' if count > 1 else ''})")
        if at_top and not found:
            return "its tensors are in no section: leave out --section"
        if not found:
            return "the file holds no tensors: is it the right one?"
        short = next((name for name in names if len(name) <= 80), ".")
        return (
            f"give one of its sections {', '.join(found[:8])}, or --all-sections: "
            f"harness record {quoted(self.tree.name)} --section {quoted(short)}"
        )
