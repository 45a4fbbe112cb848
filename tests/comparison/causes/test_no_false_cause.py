"""A cause is said only where it holds: of tensors that are random, near, of low rank, or tied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import api
from harness.comparison.cause import Cause

State = dict[str, torch.Tensor]
EXACT = ("moved", "reshaped", "transposed", "joined", "split", "stacked", "reordered", "widened")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


def causes(folder: Path, before: State, after: State, how: str) -> list[tuple[str, Cause]]:
    torch.save(before, folder / "before.pt")
    torch.save(after, folder / "after.pt")
    if how == "both":
        found = api.diff(folder / "before.pt", folder / "after.pt")
    else:
        golden = api.record(folder / "before.pt", folder / "g.safetensors", overwrite=True)
        found = api.verify(folder / "after.pt", golden)
    return [(finding.key, cause) for finding in found.findings for cause in finding.causes]


def tensor(kind: str, shape: tuple[int, int], seed: int, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rows, columns = shape
    if kind == "low rank":
        made = torch.randn(rows, 1, generator=g) @ torch.randn(1, columns, generator=g)
    elif kind == "constant":
        made = torch.full(shape, float(seed % 3))
    elif kind == "few values":
        made = torch.randint(-2, 3, shape, generator=g).float()
    else:
        made = torch.randn(shape, generator=g)
    return made.to(dtype)


KINDS = st.sampled_from(["random", "low rank", "constant", "few values"])
SHAPES = st.sampled_from([(8, 8), (6, 12), (64, 64), (96, 128), (128, 128)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
STATES = st.lists(st.tuples(KINDS, SHAPES, st.integers(0, 50)), min_size=1, max_size=4)


def made(rows: list[tuple[str, tuple[int, int], int]], dtype: torch.dtype, name: str) -> State:
    return {
        f"{name}.{place}.weight": tensor(kind, shape, seed, dtype)
        for place, (kind, shape, seed) in enumerate(rows)
    }


def in_place(old: torch.Tensor, there: torch.Tensor, cause: Cause) -> bool:
    if "negated" in cause.text:
        return bool(torch.equal(old.abs(), there.abs()))
    if "set to zero" in cause.text:
        return bool(((old == there) | (there == 0)).all())
    if "factor of its own" not in cause.text:
        return False
    factors = (old.double() * there.double()).sum(1 - (cause.axis or 0), keepdim=True)
    factors /= old.double().square().sum(1 - (cause.axis or 0), keepdim=True).clamp_min(1e-30)
    return bool(torch.allclose(there.double(), old.double() * factors, rtol=0.02, atol=1e-6))


def holds(before: State, after: State, key: str, cause: Cause) -> bool:
    """Whether what a cause says is so, as far as a test can tell."""
    sources = [before[k] for k in cause.of if k in before] or [before[key]]
    there = after.get(key)
    if there is None:
        return True  # under another key, whose bytes its own findings are of
    old = sources[0]
    if cause.kind == "constant" and "values are zero" in cause.text:
        return cause.text.startswith(f"{int((there == 0).sum()):,} of ")
    if cause.kind == "constant":
        of = old if cause.text.startswith("was") else there
        return bool((of == of.flatten()[0]).all())
    if cause.kind == "rounded" and cause.proof == "sketch":
        away = (there.double() - old.double()).norm() / old.double().norm()
        return bool(away <= (cause.bound or 0.0))
    if cause.kind == "rounded" and cause.dtype == str(old.dtype).removeprefix("torch."):
        return bool(torch.equal(there.to(old.dtype), old))  # with more digits
    if cause.kind == "rounded":
        return bool(torch.equal(old.to(getattr(torch, str(cause.dtype))).to(there.dtype), there))
    if cause.kind in EXACT:
        ours, theirs = (np.sort(t.double().flatten().numpy()) for t in (old, there))
        return bool(np.array_equal(ours, theirs))
    if cause.kind == "sum":
        factors = cause.factors or (cause.factor or 0.0,) * len(cause.of)
        terms = (f * t.double() for f, t in zip(factors, sources, strict=True))
        away = float((there.double() - sum(terms)).norm() / there.double().norm())
        return away <= (cause.bound or 0.0) + 1e-6
    if cause.kind == "scaled" and cause.factor is None:
        return in_place(old, there, cause)
    if cause.kind in ("scaled", "shifted"):
        factor = 1.0 if cause.factor is None else cause.factor
        wanted = old.double() * factor + (cause.offset or 0.0)
        away = (there.double() - wanted).norm() / there.double().norm()
        rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(there.dtype, 2.0**-22)
        return bool(away <= max(cause.bound or 0.0, rounding))
    if cause.kind == "unrelated":
        stacked = torch.stack([old.double().flatten(), there.double().flatten()])
        return bool(torch.corrcoef(stacked)[0, 1].abs() < 0.9)
    if cause.kind == "rows" and cause.changed is not None:
        kept = [r for r in range(len(old)) if r not in cause.changed]
        axis = cause.axis or 0
        return bool(torch.equal(*(t.index_select(axis, torch.tensor(kept)) for t in (old, there))))
    if cause.kind == "rows":
        ours, theirs = (np.sort(t.double().flatten().numpy()) for t in (old, there))
        return bool(np.array_equal(ours, theirs))
    return False


@settings(max_examples=25, deadline=None)
@given(before=STATES, after=STATES, dtype=DTYPES, how=st.sampled_from(["golden", "both"]))
def test_of_unlike_tensors_only_what_holds_is_said(
    folder: Path, before: Any, after: Any, dtype: torch.dtype, how: str
) -> None:
    # One shape a place, so that values are compared; other shapes are in the other tests.
    after = [(k, s, n + 100) for (k, _, n), (_, s, _) in zip(after, before, strict=False)]
    ours, theirs = made(before[: len(after)], dtype, "a"), made(after, dtype, "a")
    for key, cause in causes(folder, ours, theirs, how):
        assert holds(ours, theirs, key, cause), (key, cause)


@settings(max_examples=25, deadline=None)
@given(
    rows=STATES,
    dtype=DTYPES,
    now=DTYPES,
    scale=st.sampled_from([0.0, 1e-6, 1e-3, 0.05]),
    how=st.sampled_from(["golden", "both"]),
)
def test_of_tensors_that_are_near_only_what_holds_is_said(
    folder: Path, rows: Any, dtype: torch.dtype, now: torch.dtype, scale: float, how: str
) -> None:
    ours = made(rows, dtype, "a")
    g = torch.Generator().manual_seed(5)
    theirs = {
        k: (t.float() + scale * torch.randn(t.shape, generator=g)).to(now) for k, t in ours.items()
    }
    for key, cause in causes(folder, ours, theirs, how):
        assert holds(ours, theirs, key, cause), (key, cause)
        assert cause.kind != "unrelated" or "few" in str(rows) or "constant" in str(rows)


@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, dtype=DTYPES, swap=st.booleans(), seed=st.integers(0, 99))
def test_elements_that_change_a_little_are_no_new_order(
    folder: Path, shape: Any, dtype: torch.dtype, swap: bool, seed: int
) -> None:
    """Two elements, one up and one down by a last bit: sums, ends and most bytes stay."""
    ours = {"w": tensor("random", shape, seed, dtype)}
    flat = ours["w"].clone().flatten()
    bits = flat.view(torch.int32 if dtype == torch.float32 else torch.int16)
    one, other = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))[:2]
    if swap:
        flat[one], flat[other] = flat[other].clone(), flat[one].clone()
    else:
        bits[one] += 1
        bits[other] -= 1
    for key, cause in causes(folder, ours, {"w": flat.view(shape)}, "golden"):
        # Neighbours that change so have changed places.
        assert holds(ours, {"w": flat.view(shape)}, key, cause), (key, cause)


@settings(max_examples=10, deadline=None)
@given(shape=SHAPES, dtype=DTYPES)
def test_tied_tensors_have_no_cause_of_their_own(
    folder: Path, shape: Any, dtype: torch.dtype
) -> None:
    weight = tensor("random", shape, 1, dtype)
    tied = {"embed": weight, "head": weight}
    assert causes(folder, tied, tied, "golden") == []
    apart = {"embed": weight, "head": weight.clone()}
    assert causes(folder, tied, apart, "golden") == []


@settings(max_examples=15, deadline=None)
@given(
    before=STATES,
    after=STATES,
    dtypes=st.tuples(DTYPES, DTYPES),
    turn=st.booleans(),
    how=st.sampled_from(["golden", "both"]),
)
def test_under_other_keys_only_the_same_values_are_each_other(
    folder: Path, before: Any, after: Any, dtypes: Any, turn: bool, how: str
) -> None:
    """Some of the tensors are the golden's, cast and perhaps transposed; the others are not."""
    ours = made(before, dtypes[0], "a")
    theirs = {k.replace("a", "b"): (t.t() if turn else t).contiguous() for k, t in ours.items()}
    theirs |= made([(k, s, n + 100) for k, s, n in after], dtypes[0], "b")
    theirs = {key: tensor.to(dtypes[1]) for key, tensor in theirs.items()}
    torch.save(ours, folder / "before.pt")
    torch.save(theirs, folder / "after.pt")
    if how == "both":
        found = api.diff(folder / "before.pt", folder / "after.pt")
    else:
        golden = api.record(folder / "before.pt", folder / "g.safetensors", overwrite=True)
        found = api.verify(folder / "after.pt", golden)
    for finding in found.findings:
        first = finding.causes[0] if finding.causes else None
        if finding.kind != "renamed" or first is None or not first.accept or first.num_added:
            continue
        keys = first.of if first.kind in ("joined", "stacked") else (finding.key,)
        there = (finding.actual or "").split(", ")
        one, other = (
            torch.cat([state[key].flatten() for key in some])
            for state, some in ((ours, keys), (theirs, there))
        )
        if "more digits" in first.text:
            other = other.to(one.dtype)
        one = one.to(other.dtype)
        assert torch.equal(one.double().sort().values, other.double().sort().values), first
