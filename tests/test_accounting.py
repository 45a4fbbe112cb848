"""Nothing vanishes: whatever an entry of a state dict is, a change of it is found."""

from __future__ import annotations

import argparse
import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import os
import pathlib
import random
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import harness

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(in beta|in prototype|Sparse invariant)"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per"),
]

# 10,000 by hand: ACCOUNTING_CASES=10000 pytest tests/test_accounting.py
_NUM_CASES = int(os.environ.get("ACCOUNTING_CASES", "60"))


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


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Point(NamedTuple):
    x: int
    y: object


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """An object without `__dict__`."""

    it: object


class Named(dict[str, object]):
    """A dict with attributes of its own, as an OrderedDict may have them, too."""


class Built:
    """An object that is made by a call with its parts, and given one more."""

    def __init__(self, part: object, *, named: object = None, state: object = None) -> None:
        self.part, self.named, self.state = part, named, state

    def __reduce__(self) -> tuple[object, ...]:
        made = functools.partial(Built, named=self.named)
        return (made, (self.part,), self.state)


class New:
    """An object that is made by keywords."""

    def __new__(cls, **named: object) -> New:
        made = super().__new__(cls)
        made.named = named
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, object]]:
        return (), self.named

    def __getstate__(self) -> None:
        return None

    named: dict[str, object]


def _with(made: Any, **attributes: object) -> object:
    vars(made).update(attributes)
    return made


def _bits(name: str) -> Callable[[int], object]:
    return lambda s: torch.tensor([s % 100, 7], dtype=torch.uint8).view(getattr(torch, name))


def _optimizer(seed: int) -> object:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3 * (1 + seed), momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2)
    optimizer.step()
    return optimizer.state_dict()


def _module(seed: int) -> object:
    module = torch.nn.Linear(1, 1)
    module.weight = torch.nn.Parameter(torch.tensor([[float(seed)]]))
    module.bias = torch.nn.Parameter(torch.ones(1))
    return module


def _read_file(seed: int) -> io.BytesIO:
    made = io.BytesIO(f"{seed}".encode())
    made.seek(1)
    return made


def _nested(value: object, depth: int = 50) -> object:
    return value if depth == 0 else [_nested(value, depth - 1)]


_structure = np.dtype([("a", [("b", "<i4")])])


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
    *(
        lambda s, dtype=dtype: torch.tensor([s % 100, 1]).to(dtype)
        for dtype in (torch.float16, torch.int16, torch.uint16, torch.uint32, torch.uint64)
    ),
    *map(_bits, ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2", "bits8"]),
    *map(_bits, ["quint4x2", "quint2x4", "qint8"]),
    lambda s: torch.empty(0, s),
    lambda s: torch.empty(0, dtype=[torch.float32, torch.int8][s % 2]),
    lambda s: torch.tensor([float(s)]).expand(3, 2),
    lambda s: torch.tensor([1 + s * 1j]).conj(),
    lambda s: torch.tensor([1 + (1 + s) * 1j]).conj().imag,
    lambda s: _floats(s).to_sparse_csc(),
    lambda s: _floats(s, (4, 4)).to_sparse_bsr((2, 2)),
    lambda s: _floats(s, (4, 4)).to_sparse_bsc((2, 2)),
    lambda s: torch.sparse_coo_tensor([[0, 0]], [1.0, s], (3,)),
    lambda s: torch.sparse_coo_tensor([[0]], [1.0], (3 + s,)),
    lambda s: torch.nested.nested_tensor([_floats(s), _floats(0)]),
    lambda s: torch.nested.nested_tensor([_floats(s), _floats(0)], layout=torch.jagged),
    lambda s: torch.nested.nested_tensor([torch.ones(1 + s % 5), torch.ones(6 - s % 5)]),
    lambda s: torch.quantize_per_channel(
        torch.ones(2, 2), torch.tensor([1.0, 1 + s]), torch.zeros(2), 0, torch.qint8
    ),
    lambda s: torch.quantize_per_channel(
        torch.ones(2, 2), torch.ones(2), torch.zeros(2), s % 2, torch.qint8
    ),
    lambda s: torch.quantize_per_tensor(torch.ones(2), 1.0, s % 100, torch.quint8),
    lambda s: torch.tensor([s % 256], dtype=torch.uint8).untyped_storage(),
    lambda s: [_floats(s)] * 2,
    lambda s: torch.Generator().manual_seed(s).get_state(),
    lambda s: _optimizer(s),
    lambda s: _module(s),
    lambda s: Data(_floats(s)),
    lambda s: Point(1, _floats(s)),
    lambda s: Built(_floats(s)),
    lambda s: Built(torch.ones(2), named=_floats(s)),
    lambda s: Built(torch.ones(2), state=s),
    lambda s: New(it=_floats(s)),
    lambda s: functools.partial(print, _floats(s)),
    lambda s: _with(Named(a=torch.ones(2)), extra=_floats(s)),
    lambda s: _with(collections.OrderedDict(a=torch.ones(2)), extra=_floats(s)),
    lambda s: _with(collections.OrderedDict(a=torch.ones(2)), extra=s),
    lambda s: collections.deque([_floats(s)]),
    lambda s: {_floats(s)},
    lambda s: _nested(_floats(s)),
    lambda s: np.array([2**63 + s], np.uint64),
    lambda s: np.arange(10.0)[::-2] + s,
    lambda s: np.empty((0, s)),
    lambda s: np.array([{"a": _floats(s)}], object),
    lambda s: [torch.ones(2), None, s],
    lambda s: {"t": torch.ones(2), "b": [None, 5][s % 2]},
    lambda s: [{"t": torch.ones(2)}, {"t": torch.ones(2), "a": []}][s % 2],
    lambda s: {"t": torch.ones(2), "b": Data(s)},
    # keys
    *(
        lambda s, keys=keys: {keys[s % 2]: torch.ones(2)}
        for keys in [
            (0, "0"),
            (True, "True"),
            (None, "None"),
            (b"a", "a"),
            (1.0, "1.0"),
            (torch.int8, torch.int16),
            (torch.device("cpu", 1), torch.device("cpu", 2)),
            (Color.RED, Color.BLUE),
            (Point(1, "b"), Point(1, "c")),
            (frozenset({1}), frozenset({2})),
            (np.int64(1), np.int64(2)),
            (2**70, 2**71),
            (pathlib.PurePosixPath("a"), pathlib.PurePosixPath("b")),
        ]
    ),
    lambda s: {0: torch.ones(2), "0": _floats(s)},
    lambda s: {0: _floats(s), "0": torch.ones(2)},
    lambda s: [
        {"a": torch.ones(2), "b": torch.ones(3)},
        {"b": torch.ones(2), "a": torch.ones(3)},
    ][s % 2],
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
    _read_file,
    lambda s: [Color.RED, Color.BLUE][s % 2],
    lambda s: Point(1, s),
    lambda s: Data(s),
    lambda s: Built(1, named=s),
    lambda s: Built(1, state=s),
    lambda s: New(it=s),
    lambda s: _with(Named(a=1), extra=s),
    lambda s: _with(collections.OrderedDict(a=1), extra=s),
    lambda s: collections.defaultdict(int, a=s),
    lambda s: collections.Counter(a=s),
    lambda s: collections.deque([1], s + 1),
    lambda s: argparse.Namespace(a=s),
    lambda s: range(s),
    lambda s: slice(0, s),
    lambda s: fractions.Fraction(s, 7919),
    lambda s: decimal.Decimal(["1.0", "1.00"][s % 2]),
    lambda s: (
        datetime.datetime(2000, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))
        + datetime.timedelta(s)
    ),
    lambda s: uuid.UUID(int=s),
    lambda s: re.compile(f"a{s}"),
    lambda s: array.array("d", [s]),
    lambda s: functools.partial(print, s),
    lambda s: ValueError(s),
    lambda s: [int, str][s % 2],
    lambda s: [len, print][s % 2],
    lambda s: [torch.strided, torch.sparse_coo][s % 2],
    lambda s: 10**1000 + s,
    lambda s: [float("nan"), 1.0][s % 2],
    lambda s: [0.0, -0.0][s % 2],
    lambda s: [float("inf"), -float("inf")][s % 2],
    lambda s: [complex(0.0, 0.0), complex(0.0, -0.0)][s % 2],
    lambda s: f"a\0{s}",
    lambda s: [["a, b", "c"], ["a", "b, c"]][s % 2],
    lambda s: ["\\n", "\n"][s % 2],
    lambda s: [[[], [1]], [[1], []]][s % 2],
    lambda s: _nested(s),
    lambda s: bytes(100_000) + str(s).encode(),
    lambda s: [*range(3000), s],
    lambda s: random.Random(s).getstate(),
    lambda s: np.random.default_rng(s),
    lambda s: np.array([((s,),)], _structure),
    lambda s: np.array(["2020-01-01"], "M8[D]") + s,
    lambda s: np.array([1], ["m8[s]", "m8[D]"][s % 2]),
    lambda s: np.array([b"a", str(s).encode()]),
    lambda s: np.array([s], np.longdouble),
    lambda s: np.ma.array([1, 2], mask=[0, s % 2]),
    lambda s: np.dtype(["f4", "f8"][s % 2]),
    lambda s: np.str_(s),
    # what looks alike
    *(
        lambda s, pair=pair: pair[s % 2]
        for pair in [
            (1, True),
            (1, 1.0),
            (1, "1"),
            (None, "None"),
            (None, []),
            ([], {}),
            ([1], (1,)),
            ([1], {1}),
            (b"a", "a"),
            (1.0, torch.tensor(1.0)),
            ({0: 1}, {"0": 1}),
            ({True: 1}, {1: 1}),
            ({None: 1}, {"None": 1}),
            ({(1, 2): 1}, {(1, 3): 1}),
            ({Color.RED: 1}, {Color.BLUE: 1}),
        ]
    ),
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


def test_an_entry_of_each_kind_is_compared_and_can_be_missing(tmp_path: Path) -> None:
    paths = []
    for name, seed in (("one", 4), ("other", 5), ("none", None)):
        kinds = [*_TENSORS, *_VALUES] if seed is not None else []
        state = {f"it{index}": kind(seed or 0) for index, kind in enumerate(kinds)}
        torch.save({"weight": torch.ones(2), **state}, tmp_path / f"{name}.pt")
        paths.append(tmp_path / f"{name}.pt")
    one, other, none = paths
    numbers = set(range(len(_TENSORS) + len(_VALUES)))
    assert _numbers(harness.diff(one, other)) == numbers
    assert _numbers(harness.diff(one, none)) == numbers
    assert _numbers(harness.diff(none, one)) == numbers


def _numbers(comparison: harness.Comparison) -> set[int]:
    """Which of the kinds a comparison has findings of."""
    assert not comparison.actual.unread
    assert not comparison.expected.unread
    starts = (re.match(r"it(\d+)", finding.key) for finding in comparison.findings)
    return {int(start[1]) for start in starts if start}
