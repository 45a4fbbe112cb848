"""Residues: 4 or 8 bits of each element and 64 of each block, which decide allclose near its limit.

In: finite or non-finite float values of a tensor, a tolerance and b, the number of bits. Out:
`Residues`, of float32 an eighth or a quarter; and, with the other side's values, what they prove
block by block (`check`, `judge`).

**Grid.** With A = atol and R = rtol (both a little more, for what torch rounds), T(y) = A + R|y| is
the tolerance at y, and F(y) = sign(y) log(1 + |y| R / A) / (R s) measures y in steps of about s of
T(y), whatever y is (R = 0: y / (A s)). Kept is q = round(F(y)) modulo 2^b for each element, and
a digest of all q of a block. Who has x in place of y takes c, the integer of that residue nearest
to F(x): c = q unless |F(x) - q| >= 2^(b - 1), hence unless F(x) and F(y) are M = 2^(b - 1) - 1/2
steps apart.

**The digest fits.** Then c = q for every element, up to a collision of 64 bits, and F(y) is within
half a step of c: D = |F(x) - F(y)| is known to half a step. With L = D R s and d = x - y,

    T(y) (1 - exp(-L)) / R  <=  |d|  <=  T(y) (exp(L) - 1) / R.

For x and y of one sign, T(x) / T(y) = exp(+-L), and |d| = |T(x) - T(y)| / R. Across zero let
u = T(y) / A and v = T(x) / A, both >= 1: uv = exp(L) and |d| = A (u + v - 2) / R. The lower bound
says v + w >= 2 for w = u exp(-L) = 1 / v, and that is (1 - w)^2 >= 0. The upper one says
1 - 2/u + exp(L)/u^2 <= exp(L) - 1: convex in 1/u, which is in [exp(-L), 1], and true at both ends.

**It does not.** Then D >= M for some element of the block, and s is chosen so that the lower bound
at M is T(y) itself: that element is beyond the tolerance. Nothing is assumed here, nothing can
collide.

**Slack.** torch rounds its own test: atol and rtol are taken as `roundings` allows, outwards.
F is computed to less than 2^-8 of a step where |F| < 2^40 (ten roundings of 2^-53 each, log1p to
four units in the last place); other tensors keep no residues. NaN and the infinities have an
integer each, beyond all others; equal infinities are close, NaN never is.
So what lies below (M - 1) / M of the tolerance or above (M + 1) / M is always decided: below 0.87
or above 1.13 with 4 bits, below 0.992 or above 1.008 with 8; of 16-bit types a little less, which
torch rounds more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from harness.checkpoint.dtypes import DType
from harness.streaming.chunks import buffers

DEFAULT_TOLERANCE = 1e-5, 1e-5  # atol, rtol
Bits = Literal[4, 8]
BLOCK_NUMEL = 8192
DIGEST_NBYTES = 8
# Elements at a time, 512 KiB as float64: larger arrays leave the cache between the steps. Plain
# numpy on all of a tensor takes ten times as long.
_PASS_NUMEL = 1 << 16
_ERROR = 2.0**-8  # of F, in steps
_REACH = 2.0**40  # of F
_NARROW = 2.0**31 - 1  # of integers that are digested as int32
_NAN, _POSINF = 2.0**60, 2.0**61
_MARGIN = 2.0**-30  # for the arithmetic of the bounds themselves
_LEAST_ATOL = 1e-30
_LEAST_RTOL = 1e-100

Floats = NDArray[np.floating]
Doubles = NDArray[np.float64]


def roundings(dtype: DType) -> tuple[float, float]:
    """Relative and absolute rounding of torch's own test in this dtype, generously."""
    unit, least = {
        "float64": (2.0**-53, 2.0**-1074),
        "complex128": (2.0**-53, 2.0**-1074),
        "float16": (2.0**-11, 2.0**-24),
        "complex32": (2.0**-11, 2.0**-24),
        "bfloat16": (2.0**-8, 2.0**-133),
    }.get(dtype.name, (2.0**-24, 2.0**-149))
    return 8 * unit, 4 * least


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """A tolerance, and how far torch's own rounding in a dtype may move it (`roundings`)."""

    atol: float
    rtol: float
    relative: float
    absolute: float

    def limits(self, towards: int) -> tuple[float, float]:
        """(a, r): what is beyond a + r|y| fails (`towards` 1), what is within passes (-1)."""
        factor, more = 1 + towards * (self.relative + _MARGIN), towards * self.absolute
        return self.atol * factor + more, self.rtol * factor + (more if self.rtol else 0.0)


@dataclass(frozen=True, kw_only=True)
class Grid(Allowance):
    """The grid of one tolerance and dtype, of whose places so many bits are kept."""

    bits: Bits

    @classmethod
    def of(cls, dtype: DType, atol: float, rtol: float, bits: Bits) -> Grid | None:
        """The grid of a dtype's values, None where there can be none."""
        relative, absolute = roundings(dtype)
        grid = cls(atol=atol, rtol=rtol, relative=relative, absolute=absolute, bits=bits)
        return grid if dtype.kind == "float" and grid.is_usable else None

    @property
    def is_usable(self) -> bool:
        """Whether a value may be beyond the tolerance at all, and is measured by normal numbers."""
        return self.limits(1)[1] < 1 and (self.rtol == 0 or self.rtol > _LEAST_RTOL)

    @property
    def modulus(self) -> int:
        """How many residues there are."""
        return 1 << self.bits

    @property
    def apart(self) -> float:
        """M of the proof: how many steps another integer means."""
        return self.modulus / 2 - 0.5 - 2 * _ERROR

    @cached_property
    def A(self) -> float:  # noqa: N802 - as in the proof
        return max(self.atol, _LEAST_ATOL) + self.absolute

    @cached_property
    def R(self) -> float:  # noqa: N802
        return self.rtol + self.absolute if self.rtol else 0.0

    @cached_property
    def step(self) -> float:
        """s of the proof: M steps are (1 + relative) T(y) downwards."""
        most = 1 + self.relative + 2 * _MARGIN
        if self.R == 0:
            return most / self.apart
        return -math.log1p(-self.R * most) / (self.apart * self.R)

    def measure(self, values: Floats) -> Doubles:
        """|F| of each value, good until the next call; its sign is the value's."""
        out = buffers.get("residue places", values.size, "<f8")
        np.copyto(out, values)
        np.abs(out, out=out)
        if self.R == 0:
            np.multiply(out, 1 / (self.A * self.step), out=out)
        else:
            np.multiply(out, self.R / self.A, out=out)
            np.log1p(out, out=out)
            np.multiply(out, 1 / (self.R * self.step), out=out)
        return out

    def growth(self, steps: Doubles) -> Doubles:
        """(T(x) / T(y) - 1) / R of x and y of one sign, x so many steps farther out.

        Up to that distance |d| / T(y) is at most so much; from there on at least -growth(-steps).
        """
        if self.R == 0:
            return np.asarray(steps * self.step)
        return np.asarray(np.expm1(steps * (self.R * self.step)) / self.R)

    def inverse(self, steps: Doubles) -> Doubles:
        """The value at so many steps."""
        if self.R == 0:
            return np.asarray(steps * (self.A * self.step))
        # Not by `growth`, which is out of range where the value is not.
        grown = np.expm1(np.abs(steps) * (self.R * self.step)) * (self.A / self.R)
        return np.asarray(np.copysign(grown, steps))


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Residues:
    """`packed` uint8 (num_residue_bytes,): element i is byte i, or with 4 bits the bits 4 (i mod 2)
    of byte i // 2; `digests` uint8 (num_blocks, 8): BLAKE3 of the block's integers as int32, or as
    int64 where one needs it, little-endian. A block has 8192 elements, the last one perhaps fewer.
    They are those of a tensor's elements from `first` on."""

    grid: Grid
    packed: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    first: int = 0

    @classmethod
    def joined(cls, parts: Sequence[Residues | None]) -> Residues | None:
        """Those of a tensor from those of its parts, of a whole number of blocks each."""
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        packed = np.concatenate([part.packed for part in known])
        digests = np.concatenate([part.digests for part in known])
        return cls(grid=known[0].grid, packed=packed, digests=digests)

    def elements(self, first: int, numel: int) -> NDArray[np.uint8]:
        """The residue of each of some elements, one a byte."""
        if self.grid.bits == 8:
            return np.asarray(self.packed[first - self.first :][:numel])
        start, odd = divmod(first - self.first, 2)
        pairs = np.asarray(self.packed[start:][: (odd + numel + 1) // 2]).astype("<u2")
        pairs = (pairs | (pairs << np.uint16(4))) & np.uint16(0x0F0F)
        return np.asarray(pairs.view("|u1")[odd : odd + numel])

    def part(self, first: int, numel: int) -> Residues:
        """Those of elements from a block's `first` on."""
        start, bits = first - self.first, self.grid.bits
        packed = self.packed[start * bits // 8 :][: num_residue_bytes(numel, bits)]
        digests = self.digests[start // BLOCK_NUMEL :][: num_residue_blocks(numel)]
        return replace(self, packed=packed, digests=digests, first=first)


def num_residue_blocks(numel: int) -> int:
    """How many blocks `numel` elements have."""
    return -(-numel // BLOCK_NUMEL)


def num_residue_bytes(numel: int, bits: Bits) -> int:
    """How many bytes their residues take."""
    return -(-numel * bits // 8)


def encode(values: Floats, grid: Grid) -> Residues | None:
    """Keep residues of float values (n,); None where they reach beyond the grid.

    Memory: 2 MB a thread, plus what is returned.
    """
    packed = np.empty(num_residue_bytes(values.size, grid.bits), "|u1")
    digests: list[bytes] = []
    with np.errstate(all="ignore"):
        for start in range(0, values.size, _PASS_NUMEL):
            part = values[start : start + _PASS_NUMEL]
            f = grid.measure(part)
            top = float(f.max())
            if not top < _REACH and not (f[np.isfinite(part)] < _REACH).all():
                return None
            np.rint(f, out=f)
            integers = _integers(f, _signs(part), part, top + 1)
            digests += _digests(integers)
            _pack(integers, packed[start * grid.bits // 8 :], grid.bits)
    return Residues(grid=grid, packed=packed, digests=_joined(digests))


def _signs(values: Floats) -> NDArray[np.int32]:
    """-1 for each negative value, else 0: (i ^ sign) - sign is i with that sign.

    Several times as fast as numpy's copysign.
    """
    signs = buffers.get("signs", values.size, "<i4")
    bits = values.view(f"<i{values.itemsize}")
    np.right_shift(bits, values.itemsize * 8 - 1, out=signs, casting="unsafe")
    return signs


def _integers(
    sizes: Doubles, signs: NDArray[np.int32], values: Floats, top: float
) -> NDArray[np.signedinteger]:
    """Whole numbers up to `top` with their signs, as int32 or int64; NaN and infinities by name."""
    if top < _NARROW:
        narrow = buffers.get("narrow integers", sizes.size, "<i4")
        np.copyto(narrow, sizes, casting="unsafe")
        np.bitwise_xor(narrow, signs, out=narrow)
        np.subtract(narrow, signs, out=narrow)
        return narrow
    wide = np.where(signs < 0, -1.0, 1.0) * np.minimum(sizes, 2 * _REACH)
    wide[np.isnan(values)] = _NAN
    wide[values == np.inf], wide[values == -np.inf] = _POSINF, -_POSINF
    return wide.astype("<i8")


def _pack(integers: NDArray[np.signedinteger], packed: NDArray[np.uint8], bits: Bits) -> None:
    """Keep the lowest bits of each, in the first bytes of `packed`."""
    low = integers.astype("|u1")
    if bits == 8:
        packed[: low.size] = low
        return
    low &= 0x0F
    pairs = low[: low.size // 2 * 2].view("<u2")
    np.copyto(packed[: pairs.size], pairs | (pairs >> 4), casting="unsafe")
    if low.size % 2:
        packed[pairs.size] = low[-1]


def _joined(digests: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(digests), "|u1").reshape(-1, DIGEST_NBYTES)


def _digests(integers: NDArray[np.signedinteger]) -> list[bytes]:
    """The digest of each block: as int32 where all of it is."""
    found = []
    for start in range(0, integers.size, BLOCK_NUMEL):
        block = integers[start : start + BLOCK_NUMEL]
        if block.itemsize > 4 and np.abs(block).max() < _NARROW:
            block = block.astype("<i4")
        found.append(blake3(block.view("|u1").data).digest(length=DIGEST_NBYTES))
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Checked:
    """One side's values beside the residues of the other's, block by block: arrays (num_blocks,).

    `fits`: the digest does. `steps`: the greatest distance of an F(x) from its integer c, that of
    the element `index` of the tensor, whose c is `integer`; infinite where a value is NaN. `reach`:
    the greatest |F(x)| of finite values. `moved`: how many elements are surely not what they were.
    """

    fits: NDArray[np.bool_]
    steps: Doubles
    index: NDArray[np.int64]
    integer: Doubles
    reach: Doubles
    moved: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence[Checked]) -> Checked:
        """All blocks of a tensor, from those of its parts in order."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in names})


def check(values: Floats, residues: Residues) -> Checked:
    """Look at float values (n,) beside the residues of the others. Memory: 2 MB a thread."""
    grid = residues.grid
    digests: list[bytes] = []
    rows: list[tuple[NDArray[Any], ...]] = []
    with np.errstate(all="ignore"):
        for start in range(0, values.size, _PASS_NUMEL):
            part = values[start : start + _PASS_NUMEL]
            count = part.size
            f, c = grid.measure(part), buffers.get("residue integers", count, "<f8")
            reach = _by_block(np.max, f)
            top = float(reach.max())
            if not math.isfinite(top):
                reach = _by_block(np.max, np.where(np.isfinite(part), f, 0.0))
            signs = _signs(part)
            low = residues.elements(residues.first + start, count)
            sign = signs.astype("|i1").view("|u1")
            low = ((low ^ sign) - sign) & np.uint8(grid.modulus - 1)  # of |q|
            # |F(x)| / 2^b, rounded so that its remainder is `low`.
            r = buffers.get("residues", count, "<f8")
            np.copyto(r, low)
            np.subtract(f, r, out=c)
            np.multiply(c, 1 / grid.modulus, out=c)
            np.rint(c, out=c)
            np.multiply(c, grid.modulus, out=c)
            np.add(c, r, out=c)
            digests += _digests(_integers(c, signs, part, top + grid.modulus))
            np.abs(np.subtract(f, c, out=f), out=f)
            if not math.isfinite(top):
                f[np.isinf(part)], f[np.isnan(part)] = 0.0, np.inf
                f[np.isnan(f)] = 0.0  # finite, but too great for F: its block does not fit
            starts = np.arange(0, count, BLOCK_NUMEL)
            index = _by_block(np.argmax, f) + starts
            signed = np.where(signs[index] < 0, -c[index], c[index])
            is_moved = f > 0.5 + 2 * _ERROR
            counts = (np.count_nonzero(is_moved[i : i + BLOCK_NUMEL]) for i in starts)
            moved = np.fromiter(counts, "<i8")
            rows.append((f[index], index + residues.first + start, signed, reach, moved))
    steps, index, integer, reach, moved = map(np.concatenate, zip(*rows, strict=True))
    fits = (residues.digests == _joined(digests)).all(axis=1)
    return Checked(fits=fits, steps=steps, index=index, integer=integer, reach=reach, moved=moved)


def _by_block(function: Callable[..., Any], values: NDArray[Any]) -> NDArray[Any]:
    """Reduce each block of values (n,)."""
    whole = values.size // BLOCK_NUMEL * BLOCK_NUMEL
    found = function(values[:whole].reshape(-1, BLOCK_NUMEL), axis=1)
    return found if whole == values.size else np.append(found, function(values[whole:]))


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What residues prove of allclose.

    `max_abs` bounds the greatest |d|, which is `about` so much where all blocks are known; `share`
    bounds the greatest |d| / t of the tolerance asked for, `min_atol` the least atol that passes.
    `beyond` counts the blocks with an element that is surely beyond it, `elements` are (index,
    about the value it had) of some of these, worst first, where they are known. `is_measured`:
    unless of some blocks nothing is known but that they differ by more than was recorded.
    """

    verdict: Literal["close", "different", "undecided"]
    max_abs: tuple[float, float]
    about: float
    share: tuple[float, float]
    min_atol: tuple[float, float]
    beyond: int
    elements: tuple[tuple[int, float], ...]
    is_measured: bool


_MAX_ELEMENTS = 5


def judge(checked: Checked, grid: Grid, asked: Allowance, absmax: float) -> Judgement:
    """Decide allclose under `asked`, whose rounding is that of both dtypes.

    `absmax` is the greatest finite |y|. The bounds are linear in |y|, hence sure on a range where
    they are at its ends.
    """
    fits, slack = checked.fits, 0.5 + 2 * _ERROR
    with np.errstate(all="ignore"):
        apart = np.where(fits, np.maximum(checked.steps - slack, 0.0), grid.apart)
        most, least = grid.growth(checked.steps + slack), -grid.growth(-apart)
        # Of the element that is farthest off, or, where the digest does not fit, of any.
        near = np.abs(checked.integer)
        low = np.where(fits, grid.inverse(np.maximum(near - slack, 0.0)), 0.0) * (1 - _MARGIN)
        high = np.where(fits, grid.inverse(near + slack), absmax) * (1 + _MARGIN)
        surely = np.minimum(*(_share(grid, least, y, asked.limits(1)) for y in (low, high)))
        # Of all elements of the block.
        top = grid.inverse(checked.reach + checked.steps + slack) * (1 + _MARGIN)
        zero = np.zeros(len(top))
        perhaps = np.maximum(*(_share(grid, most, y, asked.limits(-1)) for y in (zero, top)))
        perhaps[~fits] = np.inf
        is_beyond = (surely > 1) | (fits & np.isinf(checked.steps))
        lower, upper = least * (grid.A + grid.R * low), most * (grid.A + grid.R * top)
        upper[~fits] = np.inf
        needed = np.minimum(*(least * (grid.A + grid.R * y) - asked.rtol * y for y in (low, high)))
        enough = np.maximum(*(most * (grid.A + grid.R * y) - asked.rtol * y for y in (zero, top)))
        enough[~fits] = np.inf
        likely = grid.growth(checked.steps) * (grid.A + grid.R * low)
        known = np.flatnonzero(is_beyond & fits & np.isfinite(checked.steps))
        worst = known[np.argsort(-lower[known], kind="stable")[:_MAX_ELEMENTS]]
        values = grid.inverse(checked.integer[worst])
    bounds = (lower, upper, surely, perhaps, needed, enough)
    ends = [float(bound.max(initial=0.0)) for bound in bounds]
    return Judgement(
        verdict="different" if is_beyond.any() else "close" if ends[3] <= 1 else "undecided",
        max_abs=(ends[0], ends[1]),
        about=min(max(float(likely.max(initial=0.0)), ends[0]), ends[1]),
        share=(ends[2], ends[3]),
        min_atol=(ends[4], ends[5]),
        beyond=int(np.count_nonzero(is_beyond)),
        elements=tuple(zip(checked.index[worst].tolist(), values.tolist(), strict=True)),
        is_measured=bool((fits | is_beyond).all()),
    )


def _share(grid: Grid, bound: Doubles, y: Doubles, limits: tuple[float, float]) -> Doubles:
    """A bound of |d| / T(y), as a share of what is allowed at |y|."""
    size, limit = bound * (grid.A + grid.R * y), limits[0] + limits[1] * y
    return np.where(limit > 0, size / limit, np.where(size > 0, np.inf, 0.0))
