"""Residues against torch.allclose: over thousands of tensors no verdict is wrong, and what is well
within or beyond the tolerance is decided. As a program, with a seed and a count, it runs more."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from harness.checkpoint.dtypes import DTYPES
from harness.fingerprints.residues import (
    BLOCK_NUMEL,
    Allowance,
    Bits,
    Checked,
    Grid,
    Judgement,
    Residues,
    check,
    encode,
    judge,
    roundings,
)

FLOATS = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}
TOLERANCES = [(1e-5, 1e-5), (1e-4, 1e-4), (1e-3, 0.0), (1e-8, 1e-3), (1e-9, 1e-6), (2.0, 0.3)]
EXTREME = [(1e-12, 1e-12), (1e-9, 0.0), (0.0, 1e-5), (1e-3, 0.9), (1e-30, 1e-7)]
BITS: list[Bits] = [4, 8]
KINDS = [
    *("uniform", "one element", "all at the size", "multiples of the modulus", "at the limit"),
    *("signs", "tiny", "not finite"),
]
Array = np.ndarray[Any, np.dtype[Any]]


def grid_of(dtype: torch.dtype, atol: float, rtol: float, bits: Bits = 4) -> Grid:
    relative, absolute = roundings(DTYPES[FLOATS[dtype]])
    return Grid(atol=atol, rtol=rtol, relative=relative, absolute=absolute, bits=bits)


def floats(tensor: torch.Tensor) -> Array:
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()


def verdict(x: torch.Tensor, y: torch.Tensor, kept: Residues, grid: Grid, asked: Grid) -> Judgement:
    finite = floats(y)[np.isfinite(floats(y))]
    absmax = float(np.abs(finite).max(initial=0.0))
    allowance = Allowance(
        atol=asked.atol, rtol=asked.rtol, relative=asked.relative, absolute=asked.absolute
    )
    return judge(check(floats(x), kept), grid, allowance, absmax)


def is_close(x: torch.Tensor, y: torch.Tensor, atol: float, rtol: float) -> bool:
    if x.dtype.itemsize == 1:  # which torch cannot compare
        x, y = x.float(), y.float()
    return torch.allclose(x, y, atol=atol, rtol=rtol)


@dataclass(frozen=True)
class Case:
    """One random pair of tensors, of which `kept` is known of the expected one."""

    kind: str
    x: torch.Tensor
    y: torch.Tensor
    kept: Residues
    grid: Grid


def tensors(rng: np.random.Generator, *, extreme: bool) -> tuple[torch.Tensor, float, float]:
    choice = [torch.float32, torch.float64] if extreme else [torch.float32, *FLOATS]
    dtype = choice[rng.integers(len(choice))]
    tolerances = EXTREME if extreme else TOLERANCES
    atol, rtol = tolerances[rng.integers(len(tolerances))]
    numel = int(rng.choice([1, 2, 99, 3000, 9001]))
    exponent = rng.uniform(-7, 4)
    if extreme:
        exponent = rng.uniform(-38, 38 if dtype == torch.float32 else 300)
    wide = rng.standard_normal(numel) * 10.0**exponent
    wide = wide * np.exp(rng.standard_normal(numel) * rng.choice([0, 2]))
    if rng.random() < 0.2:
        wide[rng.random(numel) < 0.3] = 0
    if rng.random() < 0.1:
        wide[rng.integers(numel)] = rng.choice([np.inf, -np.inf, np.nan])
    return torch.from_numpy(wide).to(dtype), atol, rtol


def cases(seed: int, count: int, *, extreme: bool = False) -> Iterator[Case]:
    rng = np.random.default_rng(seed)
    for _ in range(count):  # of tensors
        y, atol, rtol = tensors(rng, extreme=extreme)
        grid = grid_of(y.dtype, atol, rtol, BITS[rng.integers(2)])
        kept = encode(floats(y), grid)
        if kept is None:
            continue
        wide = floats(y).astype("<f8")
        for kind in KINDS:
            with np.errstate(all="ignore"):
                changed = change(kind, wide, grid, rng)
                x = torch.from_numpy(changed).to(y.dtype)
            yield Case(kind, x, y, kept, grid)


def change(kind: str, wide: Array, grid: Grid, rng: np.random.Generator) -> Array:
    finite = np.where(np.isfinite(wide), wide, 0)
    t, size, numel = (
        grid.atol + grid.rtol * np.abs(finite),
        10.0 ** rng.uniform(-2.5, 2.5),
        wide.size,
    )
    few, signs = rng.random(numel) < 2 / numel, rng.choice([-1, 1], numel)
    match kind:
        case "uniform":
            return np.asarray(wide + rng.uniform(-1, 1, numel) * size * t)
        case "one element":
            changed = wide.copy()
            changed[rng.integers(numel)] += size * t[0] * rng.choice([-1, 1])
            return changed
        case "all at the size":
            return np.asarray(wide + size * t * signs)
        case "multiples of the modulus":  # whose residues are the same
            places = np.copysign(grid.measure(finite), finite)
            return np.where(
                few, grid.inverse(places + grid.modulus * rng.integers(-3, 4, numel)), wide
            )
        case "at the limit":
            return np.asarray(
                wide + (1 + rng.choice([0.15, 0.01]) * rng.uniform(-1, 1)) * t * signs
            )
        case "signs":
            return np.where(few, -wide, wide)
        case "tiny":
            return np.asarray(wide + t * 1e-3 * rng.standard_normal(numel))
    changed = wide + t * 1e-3 * rng.standard_normal(numel)
    changed[rng.integers(numel)] = rng.choice([np.inf, -np.inf, np.nan])
    return changed


def wrong(case: Case, count: Counter[tuple[str, bool]] | None = None) -> list[str]:
    """Judge a case at the recorded tolerance, at looser ones and tighter ones."""
    grid, found = case.grid, []
    moved = int(check(floats(case.x), case.kept).moved.sum())
    if moved > np.count_nonzero(floats(case.x) != floats(case.y)):
        found.append(f"{case.kind} {case.y.dtype} {grid}: {moved} are said to have changed")
    asked = [
        (grid.atol, grid.rtol),
        *((grid.atol * 3, grid.rtol * 3), (grid.atol / 4, grid.rtol / 4)),
        *((grid.atol * 2, grid.rtol), (grid.atol, grid.rtol / 3), (0.0, grid.rtol)),
    ]
    for atol, rtol in asked:
        told = verdict(case.x, case.y, case.kept, grid, grid_of(case.y.dtype, atol, rtol))
        truth = is_close(case.x, case.y, atol, rtol)
        if count is not None:
            count[told.verdict, truth] += 1
        if told.verdict == ("different" if truth else "close"):
            found.append(f"{case.kind} {case.y.dtype} {grid}: {told} at {atol}, {rtol}")
        with np.errstate(invalid="ignore"):
            x, y = (floats(side).astype("<f8") for side in (case.x, case.y))
            error = np.abs(x - y)
        if not np.isfinite(error).all():
            continue
        needed = float((error - rtol * np.abs(y)).max(initial=0.0))
        for truth_of, bounds in ((float(error.max()), told.max_abs), (needed, told.min_atol)):
            slack = 1e-9 * float(error.max())
            if not bounds[0] - slack <= truth_of <= bounds[1] + slack:
                found.append(f"{case.kind} {case.y.dtype} {grid}: {truth_of} outside {bounds}")
    return found


@pytest.mark.parametrize("extreme", [False, True])
def test_no_verdict_and_no_bound_is_wrong(extreme: bool) -> None:
    count: Counter[tuple[str, bool]] = Counter()
    found = [text for case in cases(20240607, 40, extreme=extreme) for text in wrong(case, count)]
    assert not found, found[0]
    assert count["close", True] > 100
    assert count["different", False] > 100


@pytest.mark.parametrize(("bits", "band"), [(4, 0.16), (8, 0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("atol", "rtol"), TOLERANCES[:5])
def test_all_but_a_narrow_band_around_the_tolerance_is_decided(
    dtype: torch.dtype, atol: float, rtol: float, bits: Bits, band: float
) -> None:
    rng = np.random.default_rng(1)
    y = torch.from_numpy(rng.standard_normal(BLOCK_NUMEL + 77)).to(dtype)
    grid = grid_of(dtype, atol, rtol, bits)
    kept = encode(floats(y), grid)
    assert kept is not None
    t = atol + rtol * y.double().abs()
    for share, expected in (
        (0.01, "close"),
        (1 - band, "close"),
        (1 + band, "different"),
        (9, "different"),
    ):
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], len(y)))
        x = (y.double() + share * t * signs).to(dtype)
        told = verdict(x, y, kept, grid, grid)
        # Below the spacing of float32 a change is none, or a greater one.
        if dtype == torch.float64 or atol >= 1e-4:
            assert told.verdict == expected
        x = y.clone()
        x[3000] = y[3000].double() + share * t[3000]
        told = verdict(x, y, kept, grid, grid)
        if dtype == torch.float64 or atol >= 1e-4:
            assert told.verdict == expected
            assert told.beyond == (expected == "different")


def test_beyond_a_tighter_tolerance_the_element_is_named() -> None:
    y = torch.linspace(-2, 2, 20_000)
    grid = grid_of(torch.float32, 1e-4, 1e-4)
    kept = encode(floats(y), grid)
    assert kept is not None
    x = y.clone()
    x[17_000] += 8e-5
    told = verdict(x, y, kept, grid, grid_of(torch.float32, 1e-5, 1e-5))
    assert (told.verdict, told.beyond, told.is_measured) == ("different", 1, True)
    ((index, about),) = told.elements
    assert index == 17_000
    assert abs(about - float(y[17_000])) < 0.07 * (1e-4 + 1e-4 * 2)
    assert told.max_abs[0] < 8e-5 < told.max_abs[1]


def test_beyond_the_recorded_tolerance_a_looser_one_is_not_measured() -> None:
    y = torch.ones(20_000)
    grid = grid_of(torch.float32, 1e-5, 1e-5)
    kept = encode(floats(y), grid)
    assert kept is not None
    told = verdict(y + 1e-3, y, kept, grid, grid_of(torch.float32, 1e-2, 1e-5))
    assert (told.verdict, told.is_measured) == ("undecided", False)
    told = verdict(y + 1e-5, y, kept, grid, grid_of(torch.float32, 1e-2, 1e-5))
    assert (told.verdict, told.is_measured) == ("close", True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("numel", [1, 2, 8191, 8193, 65536, 140_001])
@pytest.mark.parametrize("bits", BITS)
def test_the_parts_of_a_tensor_make_the_whole(dtype: torch.dtype, numel: int, bits: Bits) -> None:
    rng = np.random.default_rng(numel)
    y = torch.from_numpy(rng.standard_normal(numel)).to(dtype)
    x = torch.from_numpy(rng.standard_normal(numel)).to(dtype)
    if numel > 2:
        y[[0, numel // 2, -1]] = torch.tensor([np.inf, np.nan, 1e30], dtype=torch.float64).to(dtype)
    grid = grid_of(dtype, 1e-4, 1e-4, bits)
    whole = encode(floats(y), grid)
    assert whole is not None
    assert whole.packed.size == (numel * bits + 7) // 8
    assert whole.digests.shape == (-(-numel // BLOCK_NUMEL), 8)
    starts = range(0, numel, 2 * BLOCK_NUMEL)
    parts = [encode(floats(y)[i : i + 2 * BLOCK_NUMEL], grid) for i in starts]
    joined = Residues.joined(parts)
    assert joined is not None
    assert np.array_equal(joined.packed, whole.packed)
    assert np.array_equal(joined.digests, whole.digests)
    assert Residues.joined([*parts, None]) is None
    together, size = check(floats(x), whole), 2 * BLOCK_NUMEL
    apart = [check(floats(x)[i : i + size], whole.part(i, min(size, numel - i))) for i in starts]
    for name, found in vars(Checked.joined(apart)).items():
        assert np.array_equal(found, vars(together)[name], equal_nan=True)


def test_equal_infinities_are_close_and_no_nan_is() -> None:
    y = torch.zeros(100)
    y[3], y[4] = np.inf, -np.inf
    grid = grid_of(torch.float32, 1e-5, 1e-5)
    kept = encode(floats(y), grid)
    assert kept is not None
    x = y + 1e-6
    assert verdict(x, y, kept, grid, grid).verdict == "close"
    x[4] = np.inf
    assert verdict(x, y, kept, grid, grid).verdict == "different"
    y[5] = np.nan
    kept = encode(floats(y), grid)
    assert kept is not None
    assert verdict(y, y, kept, grid, grid).verdict == "different"
    x = y.clone()
    x[5] = 0
    assert verdict(x, y, kept, grid, grid).verdict == "different"


def test_what_the_grid_cannot_reach_keeps_no_residues() -> None:
    grid = grid_of(torch.float64, 1e-12, 0.0)
    assert encode(np.array([1.0, 1e6]), grid) is None
    assert encode(np.array([0.1]), grid) is not None
    # On the other side it is surely another integer.
    kept = encode(np.zeros(3), grid)
    assert kept is not None
    asked = Allowance(atol=1e-12, rtol=0.0, relative=2.0**-50, absolute=0.0)
    for far in (1e6, 1e300, -1e308):
        told = judge(check(np.array([0, far, 0.0]), kept), grid, asked, 0.0)
        assert told.verdict == "different"


@pytest.mark.parametrize("bits", BITS)
def test_bounds_are_finite_as_far_as_the_grid_reaches(bits: Bits) -> None:
    y = torch.full((3,), 1e280, dtype=torch.float64)
    grid = grid_of(torch.float64, 1e-30, 1e-7, bits)
    kept = encode(floats(y), grid)
    assert kept is not None
    told = verdict(y * (1 + 3e-8), y, kept, grid, grid)
    assert told.verdict == "close"
    assert 0 < told.max_abs[0] < 3e272 < told.max_abs[1] < 1e273


@pytest.mark.parametrize(
    ("rtol", "relative", "usable"),
    [
        (0.0, 0.1, True),
        (0.9, 0.01, True),
        (1.0, 0.0, False),
        (0.98, 0.03, False),
        (1e-200, 0.0, False),
    ],
)
def test_a_tolerance_of_everything_has_no_grid(rtol: float, relative: float, usable: bool) -> None:
    assert Grid(atol=1e-5, rtol=rtol, relative=relative, absolute=0.0, bits=4).is_usable is usable


if __name__ == "__main__":
    total: Counter[tuple[str, bool]] = Counter()
    first, number = int(sys.argv[1]), int(sys.argv[2])
    bad = [
        text
        for kind in (False, True)
        for case in cases(first, number, extreme=kind)
        for text in wrong(case, total)
    ]
    sys.stdout.write("\n".join([f"{len(bad)} wrong of {total.total()}: {total}", *bad[:10], ""]))
