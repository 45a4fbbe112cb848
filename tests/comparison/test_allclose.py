"""The exact comparison against torch.isclose, element by element, at the limit and beyond."""

from __future__ import annotations

import math

import pytest
import torch

from harness.checkpoint.dtypes import DTYPES
from harness.comparison.chunk_result import MAX_ELEMENTS, ChunkResult, run_numel
from harness.comparison.difference import Difference, exact_difference
from harness.comparison.policy import Tolerance
from harness.fingerprints.fingerprint import TensorFingerprint
from harness.streaming.chunks import CHUNK_NBYTES

NUMEL = 20_000
TOLERANCES = [(1e-5, 1e-5), (1e-3, 0.0), (0.0, 1e-2), (1e-6, 1e-7), (1e-2, 0.1)]
TOLERANCES += [(1.1e-3, 0.1), (0.0, 0.0)]  # the narrow types round 1e-2 up, 1.1e-3 down
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def tensor_fingerprint(tensor: torch.Tensor) -> TensorFingerprint:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorFingerprint(
        key="x", dtype=DTYPES[name], shape=tuple(tensor.shape), digest=None, values=data
    )


def compared(
    expected: torch.Tensor,
    actual: torch.Tensor,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    *,
    exact: bool = False,
) -> Difference:
    tolerance = Tolerance(atol=atol, rtol=rtol, exact=exact)
    return exact_difference(tensor_fingerprint(expected), tensor_fingerprint(actual), tolerance)


def num_beyond(
    expected: torch.Tensor, actual: torch.Tensor, atol: float, rtol: float
) -> tuple[int, int]:
    """What the harness counts, and what torch does."""
    truth = torch.isclose(actual, expected, atol=atol, rtol=rtol).logical_not().sum()
    return compared(expected, actual, atol, rtol).num_beyond or 0, int(truth)


def at_the_limit(
    dtype: torch.dtype, scale: float, atol: float, rtol: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors whose differences are within an ulp or so of what is allowed, on both sides."""
    g = torch.Generator().manual_seed(0)
    work = torch.complex128 if dtype.is_complex else torch.float64
    expected = (torch.randn(NUMEL, generator=g, dtype=work) * scale).to(dtype)
    wide = expected.to(work)
    offsets = torch.randint(-4, 5, (NUMEL,), generator=g) * torch.finfo(dtype).eps / 4
    error = (atol + rtol * wide.abs()) * (1 + offsets)
    if dtype.is_complex:
        turn = torch.rand(NUMEL, generator=g, dtype=torch.float64) * 2 * math.pi
        return expected, (wide + torch.polar(error, turn)).to(dtype)
    sign = torch.randint(0, 2, (NUMEL,), generator=g) * 2 - 1
    return expected, (wide + error * sign).to(dtype)


@pytest.mark.parametrize(("atol", "rtol"), TOLERANCES)
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64],
)
def test_every_element_at_the_limit_is_decided_as_torch_does(
    dtype: torch.dtype, atol: float, rtol: float
) -> None:
    decided = 0
    for scale in (1.0, 1e-3, 1e-6, 3e4):
        expected, actual = at_the_limit(dtype, scale, atol, rtol)
        ours, theirs = num_beyond(expected, actual, atol, rtol)
        assert ours == theirs, scale
        decided += theirs
    assert decided > 1000 or atol == rtol == 0


@pytest.mark.parametrize("beside", ["equal", "not finite"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_element_about_the_limit_is_decided_as_torch_does_among_others(
    dtype: torch.dtype, beside: str
) -> None:
    """At the limit and a few ulps from it, on both sides, where all others are out of question."""
    inf, nan, tiny = math.inf, math.nan, torch.finfo(dtype).tiny
    others = torch.tensor([0.5, 1e-3, -tiny / 4, inf, -inf, nan, inf, 1.0], dtype=dtype)
    its = torch.tensor([0.5, 1e-3, -tiny / 4, inf, -inf, nan, -inf, nan], dtype=dtype)
    if beside == "equal":
        others, its = others[:3], its[:3]
    integer = BITS[others.element_size()]
    for atol, rtol in [*TOLERANCES[:-1], (tiny / 8, 0.0), (tiny / 8, 1e-2)]:
        decided = set()
        for value in (0.0, 1.0, -3.0, 0.3, 1e-4, tiny, tiny / 8):
            e = torch.tensor([value], dtype=dtype)
            at = (e.double().abs() + atol + rtol * e.double().abs()).to(dtype)
            for ulps in range(-3, 4):
                code = (at.view(integer) + ulps).clamp(min=0).to(integer)
                a = code.view(dtype).copysign(torch.tensor(value, dtype=torch.float64))
                ours, theirs = num_beyond(torch.cat([others, e]), torch.cat([its, a]), atol, rtol)
                assert ours == theirs, (atol, rtol, value, ulps)
                decided.add(theirs)
        assert len(decided) == 2, (atol, rtol)


def test_complex128_at_the_limit_is_decided_as_torch_does_to_an_ulp() -> None:
    """torch's vectors and scalars differ there themselves."""
    for atol, rtol in TOLERANCES:
        expected, actual = at_the_limit(torch.complex128, 1.0, atol, rtol)
        ours, theirs = num_beyond(expected, actual, atol, rtol)
        assert abs(ours - theirs) <= NUMEL // 2000
        away = 1e-15
        wider = torch.isclose(actual, expected, atol=atol * (1 + away), rtol=rtol * (1 + away))
        less = torch.isclose(actual, expected, atol=atol * (1 - away), rtol=rtol * (1 - away))
        assert int((~wider).sum()) <= ours <= int((~less).sum())


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex32_is_decided_as_torch_does() -> None:
    for atol, rtol in TOLERANCES:
        for scale in (1.0, 1e-3, 3e4):
            expected, actual = at_the_limit(torch.complex32, scale, atol, rtol)
            ours, theirs = num_beyond(expected, actual, atol, rtol)
            assert ours == theirs, (atol, rtol, scale)
    infinities = torch.full((3,), complex(-math.inf, 1.7)).to(torch.complex32)
    found = compared(infinities, torch.cat([infinities[:2], expected[:1]]))
    assert (found.num_differing, found.num_beyond) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_pair_of_two_byte_numbers_of_a_sample_is_decided_as_torch_does(
    dtype: torch.dtype,
) -> None:
    """All 65,536 numbers: subnormals, infinities, NaN and overflow to infinity among them."""
    expected = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    g = torch.Generator().manual_seed(0)
    for shift in (0, 1, 2, 700, 1 << 14, 1 << 15):
        actual = expected.roll(shift)
        for atol, rtol in [*TOLERANCES, (0.0, 2.5), (1e4, 1.0), (1e-7, 1e-3)]:
            ours, theirs = num_beyond(expected, actual, atol, rtol)
            assert ours == theirs or shift == 0, (shift, atol, rtol)
    actual = expected[torch.randperm(expected.numel(), generator=g)]
    for atol, rtol in [(1.0, 1.0), (0.0, 2.5), (3e38, 0.0)]:
        ours, theirs = num_beyond(expected, actual, atol, rtol)
        assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64])
def test_subnormals_infinities_nan_and_overflow_are_decided_as_torch_does(
    dtype: torch.dtype,
) -> None:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    info = torch.finfo(real)
    inf, nan = math.inf, math.nan
    values = torch.tensor(
        [
            *(0.0, -0.0, 1.0, -1.0, 1e-5, info.tiny, info.tiny / 64, info.max, -info.max),
            *(info.max / 2, inf, -inf, nan, 1 + info.eps),
        ],
        dtype=real,
    )
    if dtype.is_complex:
        values = torch.complex(
            *(x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
        )
    expected, actual = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    for atol, rtol in [*TOLERANCES, (1e30, 2.0), (0.0, 1e-6)]:
        ours, theirs = num_beyond(expected, actual, atol, rtol)
        assert ours == theirs, (atol, rtol)
    found = compared(expected, actual)
    assert found.max_abs == (math.inf, math.inf)
    assert found.num_nonfinite == tuple(
        int((~torch.isfinite(side)).sum()) for side in (expected, actual)
    )


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    ],
)
def test_float8_is_decided_as_torch_does_in_float32(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.repeat(256).view(dtype)
    actual = codes.repeat_interleave(256).view(dtype)
    for atol, rtol in [*TOLERANCES, (0.25, 0.125), (0.0, 0.5)]:
        truth = torch.isclose(actual.float(), expected.float(), atol=atol, rtol=rtol)
        found = compared(expected, actual, atol, rtol)
        assert found.num_beyond == int((~truth).sum())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.float8_e4m3fn, torch.float8_e5m2),
        (torch.float8_e5m2, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.complex64),
        (torch.complex128, torch.float16),
    ],
)
def test_two_dtypes_are_compared_in_float64(one: torch.dtype, other: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, generator=g) * 3
    expected, actual = x.to(one), x.to(other)
    wide = torch.complex128 if one.is_complex or other.is_complex else torch.float64
    e, a = expected.to(wide), actual.to(wide)
    for atol, rtol in [(1e-5, 1e-5), (1e-3, 1e-3), (0.1, 0.05)]:
        truth = torch.isclose(a, e, atol=atol, rtol=rtol)
        found = compared(expected, actual, atol, rtol)
        assert found.num_beyond == int((~truth).sum())
        assert found.num_differing == int((e != a).sum())
        assert found.max_abs[0] == pytest.approx(float((a - e).abs().max()), rel=1e-12)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint64, torch.int8, torch.uint16, torch.int32]
)
def test_integers_must_be_equal_even_beyond_what_float64_tells_apart(dtype: torch.dtype) -> None:
    top = torch.iinfo(dtype).max
    expected = torch.tensor([top, 0, 5], dtype=dtype)
    actual = torch.tensor([top - 1, 0, 5], dtype=dtype)
    found = compared(expected, actual, 1e9, 1e9)
    assert (found.verdict, found.num_beyond, found.max_abs) == ("different", 1, (1.0, 1.0))
    assert found.min_atol == (math.inf, math.inf)
    [worst] = found.elements
    assert (worst.index, worst.expected, worst.actual) == ((0,), top, top - 1)


def test_integers_and_floats_are_equal_or_different() -> None:
    x = torch.tensor([1.0, 2.0, 3.5])
    assert compared(x[:2], x[:2].to(torch.int32)).verdict == "close"
    found = compared(x, x.to(torch.int32), 1.0, 1.0)
    assert (found.verdict, found.num_beyond, found.max_abs[0]) == ("different", 1, 0.5)
    mixed = compared(x.to(torch.complex64), torch.tensor([1, 2, 4]))
    assert (mixed.verdict, mixed.num_beyond, mixed.max_abs[0]) == ("different", 1, 0.5)
    # A type of floats that cannot hold the integer must not round it.
    byte, float8 = torch.tensor([255], dtype=torch.uint8), torch.tensor([256.0])
    assert compared(byte, float8.to(torch.float8_e5m2)).max_abs == (1.0, 1.0)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_integers_and_complex32_are_compared_by_value() -> None:
    x = torch.tensor([1, 2, 3])
    assert compared(x, x.to(torch.complex32)).verdict == "close"
    assert compared(x.to(torch.complex32), x + 1).max_abs == (1.0, 1.0)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_what_is_not_finite_is_no_integer(special: float) -> None:
    found = compared(torch.tensor([special, 1.0, 2.0]), torch.tensor([1, 1, 3]))
    assert (found.num_beyond, found.max_abs) == (2, (math.inf, math.inf))
    assert found.rms == pytest.approx(math.sqrt(1 / 3))
    assert found.num_nonfinite == (1, 0)
    assert [e.index for e in found.elements] == [(0,), (2,)]


def test_integers_are_as_far_apart_as_they_are() -> None:
    """Where float64 has no such numbers, too."""
    top, other = torch.tensor([2**63 - 1]), torch.tensor([2**63 + 6], dtype=torch.uint64)
    assert compared(top, top - 7).max_abs == (7.0, 7.0)
    assert compared(-top, 7 - top).max_abs == (7.0, 7.0)
    assert compared(top, other).max_abs == compared(other, top).max_abs == (7.0, 7.0)
    assert compared(-top, other).max_abs == (2.0**64, 2.0**64)


def test_nan_at_the_same_place_is_close_to_nothing_but_the_same_bytes_are_identical() -> None:
    x = torch.tensor([math.nan, 1.0])
    assert compared(x, x.clone()).verdict == "identical"
    found = compared(x, x + torch.tensor([0, 1e-7]))
    assert (found.verdict, found.num_beyond) == ("different", 1)
    assert [e.index for e in found.elements] == [(0,)]


def test_exact_compares_bits() -> None:
    x = torch.tensor([math.nan, 0.0, 1.0, math.inf])
    y = torch.tensor([math.nan, -0.0, 1.0, math.inf])
    assert compared(x, y, exact=True).num_beyond == 1
    assert compared(x, y, exact=True).verdict == "different"
    assert compared(x[1:], y[1:]).verdict == "close"
    assert compared(x, x.clone(), exact=True).verdict == "identical"
    one, zero = torch.ones(2), torch.zeros(2)
    negative = torch.tensor([0.0, -0.0])
    found = compared(torch.complex(one, zero), torch.complex(one, negative), exact=True)
    assert (found.verdict, found.num_beyond) == ("different", 1)
    assert compared(x.double(), x, exact=True).num_beyond == 1  # NaN: no bits to compare


def test_the_worst_elements_come_first_and_the_place_is_named() -> None:
    expected = torch.zeros(100, 1000)
    actual = expected.clone()
    for count, (row, column) in enumerate([(3, 5), (99, 999), (40, 0), (3, 6), (7, 1), (8, 2)]):
        actual[row, column] = count + 1.0
    found = compared(expected, actual)
    assert [e.index for e in found.elements] == [(8, 2), (7, 1), (3, 6), (40, 0), (99, 999)]
    assert len(found.elements) == MAX_ELEMENTS
    assert [e.actual for e in found.elements] == [6.0, 5.0, 4.0, 3.0, 2.0]
    assert found.where == "rows 3-99"
    assert (found.num_differing, found.num_beyond, found.max_abs) == (6, 6, (6.0, 6.0))
    assert found.rms == pytest.approx(math.sqrt(sum(i * i for i in range(1, 7)) / 100_000))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [1e-4, 0.02, 1.0])
def test_the_worst_are_those_of_the_elements_beyond_and_the_first_of_equal_ones(
    dtype: torch.dtype, share: float, exact: bool
) -> None:
    """Also where few are beyond, and where the greatest differences are not: rtol allows them."""
    g = torch.Generator().manual_seed(0)
    expected = torch.randint(1, 5, (NUMEL,), generator=g).to(dtype)
    expected[::7] *= 1024  # whose differences are greater, but within
    off = (torch.rand(NUMEL, generator=g) < share) * torch.randint(1, 9, (NUMEL,), generator=g)
    actual = expected + (off * expected.clamp(min=64) / 128).to(dtype)
    actual[NUMEL // 2] = expected[NUMEL // 2] = math.nan
    found = compared(expected, actual, 1e-3, 0.25, exact=exact)
    close = torch.isclose(actual, expected, atol=1e-3, rtol=0.25)
    same = actual.view(BITS[actual.element_size()]) == expected.view(BITS[actual.element_size()])
    beyond = (~same if exact else ~close).nonzero().flatten().tolist()
    sizes = (actual.double() - expected.double()).abs().nan_to_num(math.inf)
    worst = sorted(beyond, key=lambda index: (-float(sizes[index]), index))[:MAX_ELEMENTS]
    assert found.num_beyond == len(beyond) > 0
    assert [element.index[0] for element in found.elements] == worst
    assert found.num_differing == int((actual != expected).sum()) - exact
    assert found.max_abs[0] == (float(sizes[worst[0]]) if exact else math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_elements_are_counted_across_chunks_and_passes(dtype: torch.dtype, extra: int) -> None:
    itemsize = torch.empty(0, dtype=dtype).element_size()
    numel = CHUNK_NBYTES // itemsize + extra
    expected = torch.zeros(numel, dtype=dtype)
    actual = expected.clone()
    places = [0, numel // 2 - 1, numel // 2, CHUNK_NBYTES // itemsize - 2, numel - 1]
    for place in places:
        actual[place] = 1.0
    found = compared(expected, actual)
    assert found.num_beyond == len(set(places))
    assert sorted(e.index[0] for e in found.elements) == sorted(set(places))


@pytest.mark.parametrize("place", [0, 600_000, 1_048_575, 1_100_000])
def test_what_is_the_same_before_the_first_difference_is_looked_at_too(place: int) -> None:
    """In a pass of its own, before or after: NaN never compares close."""
    expected = torch.arange(1_200_000, dtype=torch.float32)
    expected[[5, 700_000]] = math.nan
    actual = expected.clone()
    actual[place] += 3
    found = compared(expected, actual, 0.1, 0.0)
    assert found.num_beyond == 3
    assert found.num_nonfinite == (2, 2)
    assert {element.index for element in found.elements} == {(5,), (700_000,), (place,)}


def test_the_elements_named_are_those_beyond_wherever_others_are_farther_off() -> None:
    """Also in another pass, or chunk, where rtol allows all that differs."""
    for numel in (600_000, 3_000_000):
        expected = torch.zeros(numel)
        expected[:100] = 1e6
        actual = expected.clone()
        actual[:100] += 1
        actual[-1] = 1e-3
        found = compared(expected, actual)
        assert (found.num_beyond, found.num_differing) == (1, 101)
        assert [e.index for e in found.elements] == [(numel - 1,)]
        back = compared(expected.flip(0), actual.flip(0))
        assert [e.index for e in back.elements] == [(0,)]


def test_chunks_end_where_runs_do() -> None:
    """Else the strip of a large tensor would be of other places than it says."""
    for dtype in DTYPES.values():
        assert CHUNK_NBYTES // dtype.itemsize % run_numel(10**12) == 0


def test_rms_and_max_of_the_smallest_differences_do_not_vanish() -> None:
    x = torch.full((1000,), 1e-30)
    found = compared(x, 2 * x)
    assert found.rms == pytest.approx(1e-30, rel=1e-5, abs=0)
    assert found.max_abs[0] == pytest.approx(1e-30, rel=1e-5, abs=0)
    assert found.verdict == "close"


def test_min_atol_is_the_least_that_passes() -> None:
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.complex64):
        expected = torch.randn(5000, generator=g, dtype=dtype)
        actual = expected + 1e-3 * torch.randn(5000, generator=g, dtype=dtype)
        for rtol in (0.0, 1e-4, 1e-2):
            least = compared(expected, actual, 1e-9, rtol).min_atol[0]
            assert compared(expected, actual, least * (1 + 1e-5), rtol).verdict == "close"
            assert compared(expected, actual, least * (1 - 1e-5), rtol).verdict == "different"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_of_one_sign_need_no_tolerance(dtype: torch.dtype) -> None:
    expected = torch.tensor([math.inf, -math.inf, 0.0], dtype=dtype)
    found = compared(expected, torch.tensor([math.inf, -math.inf, 0.5], dtype=dtype), 0.0, 0.0)
    assert (found.max_abs, found.min_atol) == ((0.5, 0.5), (0.5, 0.5))
    assert [e.index for e in found.elements] == [(2,)]


def test_the_sum_of_nothing_is_no_difference() -> None:
    assert ChunkResult() == ChunkResult(num_differing=0, num_beyond=0, first=-1, last=-1)
    assert compared(torch.empty(0, 3), torch.empty(0, 3)).verdict == "identical"
