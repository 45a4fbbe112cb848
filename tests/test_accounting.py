"""Nothing vanishes: whatever an entry of a state dict is, a change of it is found."""

from __future__ import annotations

import collections
import datetime
import io
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import harness

# 10,000 by hand: ACCOUNTING_CASES=10000 pytest tests/test_accounting.py
_NUM_CASES = int(os.environ.get("ACCOUNTING_CASES", "120"))


class Wrapper(torch.Tensor):
    """A tensor without bytes of its own."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of what is only saved here")


class Pair(Wrapper):
    """One as torchao writes them: inner tensors and numbers in `__dict__`."""

    low: torch.Tensor
    high: torch.Tensor
    scale: float


class Slotted(Wrapper):
    """One that keeps its parts in `__slots__`, as DTensor does."""

    __slots__ = ("note", "values_of")


class Plain(torch.Tensor):
    """A subclass of the same bytes."""


class Thing:
    """An object of a class that only its own program knows."""

    def __init__(self, number: int) -> None:
        self.number = number


def _floats(seed: int, shape: tuple[int, ...] = (3, 2)) -> torch.Tensor:
    made = torch.arange(float(np.prod(shape))).reshape(shape)
    made.view(-1)[seed % made.numel()] += 1 + seed
    return made


def _wrapper(kind: type[Wrapper], inner: torch.Tensor, **parts: object) -> Any:
    made = torch.Tensor._make_wrapper_subclass(kind, inner.shape, dtype=inner.dtype)
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def _pair(low: torch.Tensor, high: torch.Tensor, scale: float) -> Any:
    return _wrapper(Pair, low, low=low, high=high, scale=scale)


def _slotted(inner: torch.Tensor, note: str) -> Any:
    return _wrapper(Slotted, inner, values_of=inner, note=note)


def _attached(seed: int) -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.scales = _floats(seed)  # type: ignore[attr-defined]
    return tensor


def _parameter(seed: int) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.absmax = _floats(seed)  # type: ignore[attr-defined]
    return parameter


def _file(seed: int) -> io.BytesIO:
    made = io.BytesIO()
    torch.save({"amax": _floats(seed)}, made)
    return made


_TENSORS: list[Callable[[int], object]] = [
    _floats,
    lambda s: _floats(s).to(torch.bfloat16),
    lambda s: _floats(s).to(torch.float64).t(),
    lambda s: _floats(s).to(torch.complex64),
    lambda s: torch.tensor(s),
    lambda s: torch.tensor([s % 2 == 0, True]),
    lambda s: torch.tensor([s % 200], dtype=torch.uint8),
    lambda s: _floats(s).to_sparse(),
    lambda s: _floats(s).to_sparse_csr(),
    lambda s: torch.quantize_per_tensor(torch.ones(3), 1.0 + s, 0, torch.qint8),
    lambda s: torch.nn.Parameter(_floats(s)),
    _attached,
    _parameter,
    lambda s: _floats(s).as_subclass(Plain),
    lambda s: _pair(_floats(s), torch.ones(3, 2), 0.5),
    lambda s: _pair(torch.ones(3, 2), _floats(s), 0.5),
    lambda s: _pair(torch.ones(2), torch.ones(2), 0.5 + s),
    lambda s: _slotted(_floats(s), "a"),
    lambda s: _slotted(torch.ones(2), f"note {s}"),
    lambda s: _pair(_slotted(_floats(s), "b"), torch.ones(3, 2), 0.5),
    lambda s: np.arange(6.0).reshape(2, 3) + s,
    lambda s: np.asfortranarray(np.arange(6.0).reshape(2, 3) + s),
    lambda s: np.array([s, 1], ">i4"),
    lambda s: np.array([s % 2 == 0]),
    lambda s: np.float32(s),
    lambda s: np.array([1 + s * 1j]),
]
_VALUES: list[Callable[[int], object]] = [
    lambda s: None if s % 2 else False,
    lambda s: s % 2 == 0,
    lambda s: s,
    lambda s: s << 70,
    lambda s: 0.5 + s,
    lambda s: 1j * s,
    lambda s: f"text {s}",
    lambda s: "\ud800" + str(s),
    lambda s: b"b" * 100 + str(s).encode(),
    lambda s: bytearray(str(s).encode()),
    lambda s: [1, s],
    lambda s: (1, s),
    lambda s: {"a": s, "b": None},
    lambda s: {1, s + 2},
    lambda s: frozenset({f"item {i}" for i in range(20)} | {str(s)}),
    lambda s: collections.OrderedDict(a=s),
    lambda s: {(1, 2): s, 3.5: "x"},
    lambda s: torch.Size([1, s]),
    lambda s: [torch.float32, torch.float16][s % 2],
    lambda s: torch.device("cpu", s % 100),
    lambda s: np.array(["a", str(s)]),
    lambda s: np.array([None, s], object),
    lambda s: datetime.date(2000 + s % 1000, 1, 1),
    lambda s: pathlib.PurePosixPath(f"a/{s}"),
    lambda s: collections.deque([s], 3),
    lambda s: Thing(s),
    _file,
]

_Leaf = tuple[int, int]  # which of the kinds, and what makes its content
_leaf = st.tuples(st.integers(0, len(_TENSORS) + len(_VALUES) - 1), st.integers(0, 999))
_names = st.text("ab.0[_é", min_size=1, max_size=4)
_states = st.dictionaries(
    _names,
    st.recursive(
        _leaf,
        lambda children: (
            st.lists(children, max_size=3)
            | st.dictionaries(_names | st.integers(0, 3), children, max_size=3)
        ),
        max_leaves=5,
    ),
    min_size=1,
    max_size=4,
)


def _leaves(spec: object) -> list[_Leaf]:
    if isinstance(spec, tuple):
        return [spec]
    children = spec.values() if isinstance(spec, dict) else spec
    assert isinstance(children, list | type({}.values()))
    return [leaf for child in children for leaf in _leaves(child)]


def _build(spec: object, leaves: list[_Leaf]) -> Any:
    """What a description stands for; `leaves` are taken one by one, in order."""
    if isinstance(spec, tuple):
        kind, seed = leaves.pop(0)
        return [*_TENSORS, *_VALUES][kind](seed)
    if isinstance(spec, dict):
        return {name: _build(child, leaves) for name, child in spec.items()}
    assert isinstance(spec, list)
    return [_build(child, leaves) for child in spec]


def _save(path: Path, spec: dict[str, object], leaves: list[_Leaf]) -> Path:
    state = _build(spec, list(leaves))
    torch.save({"a weight": torch.ones(2), **state}, path)
    return path


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@settings(
    max_examples=_NUM_CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(spec=_states, data=st.data())
def test_no_change_of_an_entry_is_called_identical(
    tmp_path: Path, spec: dict[str, object], data: st.DataObject
) -> None:
    leaves = _leaves(spec)
    golden = tmp_path / "golden.safetensors"
    before = _save(tmp_path / "before.pt", spec, leaves)
    harness.record(before, golden, overwrite=True)
    again = harness.verify(_save(tmp_path / "again.pt", spec, leaves), golden)
    assert again.verdict == "identical"
    assert not again.actual.unread
    if not leaves:
        return
    changed = list(leaves)
    place = data.draw(st.integers(0, len(leaves) - 1))
    changed[place] = (leaves[place][0], leaves[place][1] + 1)
    after = _save(tmp_path / "after.pt", spec, changed)
    assert harness.verify(after, golden).verdict != "identical"
    assert harness.diff(before, after).verdict != "identical"


@pytest.mark.parametrize("kind", range(len(_TENSORS) + len(_VALUES)))
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_an_entry_of_each_kind_is_compared_and_can_be_missing(tmp_path: Path, kind: int) -> None:
    one, other, without = ({"it": (kind, 1)}, {"it": (kind, 2)}, {"none": [(len(_TENSORS), 0)]})
    paths = []
    for name, spec in (("one", one), ("other", other), ("without", without)):
        paths.append(_save(tmp_path / f"{name}.pt", dict(spec), _leaves(dict(spec))))
    first, second, third = paths
    assert harness.diff(first, second).verdict == "different"
    kinds = {finding.kind for finding in harness.diff(first, third).findings}
    assert kinds == {"missing", "unexpected"}
