"""What nested outputs hold, place by place: tensors, and of the model's own whatever else is there.

In: what a module got or gave. Out: its leaves by name: `hidden.0`, `scores.[0]`. Containers and
objects inside of themselves are not entered again.
"""

from __future__ import annotations

import dataclasses
import json
from collections import UserList, deque
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from enum import Enum
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

Leaf = tuple[str, object]
_SEQUENCES = (tuple, list, deque, UserList, KeysView, ValuesView, ItemsView)
_NUMBERS = (bool, int, float, complex, np.ndarray, np.generic)
# What has attributes, and is no record of values.
_WHOLE = (type, nn.Module, Enum, FunctionType, ModuleType)


def leaves(key: str, value: object, *, whole: bool) -> Iterator[Leaf]:
    """Name what is in nested outputs: fields, keys and indices joined by dots.

    Where the `whole` is asked for, arrays and numbers are tensors as well, objects are their
    attributes, and what is left are leaves as they are; else tensors alone. No two keys are alike.
    """
    names: set[str] = set()
    for name, leaf in _leaves(key, value, (), whole):
        if whole or isinstance(leaf, torch.Tensor):
            while name in names:  # of keys that print alike
                name += "'"
            names.add(name)
            yield name, leaf


def _leaves(key: str, value: Any, above: tuple[int, ...], whole: bool) -> Iterator[Leaf]:
    if id(value) in above:
        return
    children = _parts(value) if isinstance(value, torch.Tensor) else _children(value, whole)
    if not children:
        yield key, _as_tensor(value) if whole and isinstance(value, _NUMBERS) else value
    for name, child in children:
        yield from _leaves(f"{key}.{name}", child, (*above, id(value)), whole)


def _children(value: Any, whole: bool) -> list[Leaf]:
    """What a container or an object holds, by name; nothing for what is neither."""
    if isinstance(value, Mapping):
        found = [(_spelled(name), child) for name, child in value.items()]
    elif hasattr(value, "_fields"):
        found = [(name, getattr(value, name)) for name in value._fields]
    elif isinstance(value, _SEQUENCES):
        found = [(str(index), child) for index, child in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        found = [(name, getattr(value, name)) for name in fields]
    elif whole and not isinstance(value, (*_NUMBERS, *_WHOLE)):
        return _attributes(value)
    else:
        return []
    if whole and isinstance(value, (dict, list, tuple)):
        # Of a class of one's own, which may hold its items as attributes, too.
        items = {id(child) for _, child in found}
        found += (pair for pair in _attributes(value) if id(pair[1]) not in items)
    return found


def _attributes(value: object) -> list[Leaf]:
    held = getattr(value, "__dict__", {})
    return [(_spelled(name), child) for name, child in held.items() if child is not None]


def _spelled(name: object) -> str:
    """A key of a mapping, so that what is no string differs from one: `a`, `"a.b"`, `[0]`."""
    if not isinstance(name, str):
        return f"[{name}]"
    is_plain = name and not set(name) & set('."[]') and name.isprintable()
    return name if is_plain else json.dumps(name)


def _as_tensor(value: object) -> object:
    """An array or a number as a tensor; others, as of strings or beyond 64 bits, as they are."""
    array = np.asarray(value)
    try:  # of a copy: torch takes no other byte order, and no strides that run backwards
        return torch.as_tensor(array.astype(array.dtype.newbyteorder("=")))
    except TypeError:
        return value


def _parts(tensor: torch.Tensor) -> list[Leaf]:
    """The tensors and numbers that others than dense ones are made of."""
    if tensor.is_nested:
        return [(str(index), part) for index, part in enumerate(tensor.unbind())]
    if hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "device_mesh"):
        names, made_with = tensor.__tensor_flatten__()
        return [*((name, getattr(tensor, name)) for name in names), ("context", repr(made_with))]
    if tensor.is_quantized:
        return [("int_repr", tensor.int_repr()), *_scales(tensor)]
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        parts = {"indices": tensor.indices(), "values": tensor.values()}
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = {"rows": tensor.crow_indices(), "columns": tensor.col_indices()}
        parts["values"] = tensor.values()
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = {"columns": tensor.ccol_indices(), "rows": tensor.row_indices()}
        parts["values"] = tensor.values()
    else:
        return []
    return [*parts.items(), ("size", torch.tensor(tensor.shape))]


def _scales(tensor: torch.Tensor) -> list[Leaf]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale, zero_point = tensor.q_scale(), tensor.q_zero_point()
        return [("scale", torch.tensor(scale)), ("zero_point", torch.tensor(zero_point))]
    scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return [("scales", scales), ("zero_points", zero_points)]
