"""How a section of a config is read: checked key by key, with errors that say what to change.

In: YAML text, mappings, omegaconf nodes. Out: plain resolved dicts (`resolve`, `parse`) and
instances of `Section` subclasses, which declare what they implement. Refused with a `ModelError`:
unknown keys, values of another type, and values that a section does not implement.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, Self

from harness.errors import ModelError

NEMO_MODULES = "nemo.collections.asr.modules."
Fixed = Mapping[str, tuple[object, tuple[object, ...]]]
"""Keys that choose what is not implemented: key -> (NeMo's default, the values accepted here)."""


def refuse(where: str, value: object, implemented: str, *, absent: bool = False) -> NoReturn:
    """Raise `ModelError` for a value that NeMo knows and this package does not implement."""
    stated = f"is absent, which means {value!r}, and that" if absent else f"= {value!r}"
    raise ModelError(
        f"config: {where} {stated} is not implemented here (implemented: {implemented})",
        hint=f"set {where} to {implemented}, or run this model with NVIDIA NeMo itself",
    )


def invalid(where: str, value: object, expected: str) -> NoReturn:
    """Raise `ModelError` for a value that makes no model."""
    raise ModelError(
        f"config: {where} = {value!r} is not valid (expected: {expected})",
        hint=f"set {where} to {expected}",
    )


def is_whole(value: object) -> bool:
    """Tell whole numbers from the rest, booleans included in the rest."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_value(where: str, value: object, kind: Any) -> object:
    """Check one value against its annotation; whole numbers pass for floats, never the reverse."""
    if kind is Any:
        return value
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if option is types.NoneType and value is None:
            return None
        if option is int and is_whole(value):
            return value
        if option is float and (is_whole(value) or isinstance(value, float)):
            return float(typing.cast("float", value))
        if option in (bool, str) and isinstance(value, option):
            return value
    names = " or ".join("null" if o is types.NoneType else o.__name__ for o in options)
    invalid(where, value, names)


class Section:
    """One sub-config: its fields with NeMo's defaults, its fixed keys and its ignored keys."""

    name: ClassVar[str]
    nemo_class: ClassVar[str]
    nemo_package: ClassVar[str] = NEMO_MODULES
    fixed: ClassVar[Fixed] = {}
    # keys without effect on tensors and numbers
    ignored: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def read(cls, model: Mapping[str, Any]) -> Self:
        """Read this section of a resolved model config; `ModelError` where it cannot be built."""
        given = model.get(cls.name)
        if not isinstance(given, Mapping):
            invalid(cls.name, given, "a section (mapping)")
        cls._check_class(given)
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(typing.cast("Any", cls))}
        known = {*fields, *cls.fixed, *cls.ignored, "_target_"}
        if unknown := [key for key in given if key not in known]:
            raise ModelError(
                f"config: unknown keys in {cls.name}: {', '.join(map(str, unknown))}",
                hint=f"remove them, or choose among: {', '.join(sorted(known))}",
            )
        for key, (default, accepted) in cls.fixed.items():
            value = given.get(key, default)
            if not any(value == a and isinstance(value, type(a)) for a in accepted):
                shown = " or ".join("null" if a is None else repr(a) for a in accepted)
                refuse(f"{cls.name}.{key}", value, shown, absent=key not in given)
        values: dict[str, object] = {}
        for key, field in fields.items():
            if key in given:
                values[key] = read_value(f"{cls.name}.{key}", given[key], hints[key])
            elif field.default is dataclasses.MISSING:
                raise ModelError(
                    f"config: {cls.name}.{key} is required and absent",
                    hint=f"add {key} to the section {cls.name}",
                )
        return cls(**values)

    @classmethod
    def _check_class(cls, given: Mapping[str, Any]) -> None:
        target = given.get("_target_")
        if target is not None and str(target).rpartition(".")[2] != cls.nemo_class:
            refuse(f"{cls.name}._target_", target, cls.nemo_package + cls.nemo_class)

    def _check(self, key: str, ok: bool, expected: str) -> None:
        if not ok:
            invalid(f"{self.name}.{key}", getattr(self, key), expected)

    def _check_one_of(self, key: str, *accepted: object) -> None:
        if getattr(self, key) not in accepted:
            shown = ", ".join("null" if a is None else repr(a) for a in accepted)
            refuse(f"{self.name}.{key}", getattr(self, key), shown)

    def _check_positive(self, *keys: str) -> None:
        for key in keys:
            self._check(key, getattr(self, key) > 0, "a number > 0")

    def _check_probability(self, *keys: str) -> None:
        for key in keys:
            self._check(key, 0.0 <= getattr(self, key) < 1.0, "a probability in [0, 1)")


def read_present(given: Mapping[str, Any], where: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Read those of the keys in `kinds` that are present and not null; ignore all others."""
    present = {key: given[key] for key in kinds if given.get(key) is not None}
    return {k: read_value(f"{where}.{k}", v, kinds[k]) for k, v in present.items()}
