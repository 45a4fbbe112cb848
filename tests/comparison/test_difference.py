"""Differences decided from a golden alone: their intervals, and the elements that they name."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from harness import api
from harness.checkpoint import open_checkpoint
from harness.comparison.difference import Difference, element, round_outward, sufficient_atol
from harness.comparison.measuring import nothing
from harness.comparison.policy import Policy
from harness.fingerprints.scan import fingerprint
from harness.golden.golden import Golden
from tests.comparison.test_allclose import tensor_fingerprint

pytestmark = pytest.mark.usefixtures("without_causes")

NUMEL = 50_000  # several blocks, the last one in part


def difference(
    folder: Path,
    expected: torch.Tensor,
    actual: torch.Tensor,
    policy: Policy | None = None,
    block_nbytes: int = 32768,
) -> Difference:
    """The difference of two tensors from a golden without values."""
    one, other, golden = folder / "one.pt", folder / "other.pt", folder / "golden"
    torch.save({"x": expected}, one)
    torch.save({"x": actual}, other)
    with open_checkpoint(one) as checkpoint:
        sketched = fingerprint(checkpoint, keep_values=nothing, block_nbytes=block_nbytes)
    recorded = Golden(path=golden, fingerprint=sketched, source="")
    [finding] = api.verify(other, recorded, policy=policy).findings
    assert finding.difference is not None
    return finding.difference


def weights(dtype: torch.dtype = torch.float32, numel: int = NUMEL, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=g, dtype=torch.float64).mul(0.1).to(dtype)


SHORT = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def put(x: torch.Tensor, index: int, value: float) -> torch.Tensor:
    changed = x.clone()
    if changed.element_size() == 1:
        code = torch.tensor([value]).to(x.dtype).view(torch.uint8)
        changed.view(torch.uint8)[index] = code[0]
    else:
        changed[index] = value
    return changed


@pytest.mark.parametrize("dtype", SHORT)
def test_one_changed_element_is_recovered_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    x = weights(dtype)
    for number, value in enumerate([0.0, 1.0, -7.5, 448.0]):
        index = (number * 17_389 + 11) % NUMEL
        y = put(x, index, value)
        found = difference(tmp_path, x, y)
        assert found.is_exact
        assert "proved by the digest" in found.why
        assert (found.num_differing, found.num_beyond, found.chance) == (1, 1, 0.0)
        [one] = found.elements
        assert (one.index, one.expected, one.actual) == ((index,), float(x[index]), float(y[index]))
        assert found.max_abs == (found.max_abs[0],) * 2


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_value_under_a_nan_or_an_infinity_is_recovered(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    if dtype == torch.float8_e4m3fn:
        value = math.nan  # it has no infinity
    x = weights(dtype)
    found = difference(tmp_path, x, put(x, 41_000, value))
    assert found.verdict == "different"
    [one] = found.elements
    assert (one.index, one.expected) == ((41_000,), float(x[41_000]))
    assert not math.isfinite(float(one.actual.real))
    assert found.num_nonfinite == (0, 1)


def test_an_expected_zero_is_recovered(tmp_path: Path) -> None:
    x = weights()
    x[:1000] = 0
    found = difference(tmp_path, x, put(x, 7, 1e-3))
    [one] = found.elements
    assert (one.index, one.expected, found.is_exact) == ((7,), 0.0, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_in_many_blocks_are_recovered_together(tmp_path: Path, dtype: torch.dtype) -> None:
    x = weights(dtype).reshape(500, 100)
    y = x.clone()
    places = [(0, 0), (0, 1), (200, 5), (290, 99), (499, 98), (499, 99)]
    for row, column in places:
        y[row, column] += 1
    found = difference(tmp_path, x, y)
    assert (found.num_differing, found.is_exact) == (6, True)
    assert {e.index for e in found.elements} < set(places)
    for one in found.elements:
        assert one.expected == float(x[one.index])
    assert found.where == "rows 0-499" or found.where is None


def test_a_recovered_change_within_the_tolerance_is_close(tmp_path: Path) -> None:
    x = weights()
    y = put(x, 5, float(x[5]) + 4e-6)
    found = difference(tmp_path, x, y)
    assert (found.verdict, found.is_exact, found.num_differing) == ("close", True, 1)


def test_one_ulp_is_recovered(tmp_path: Path) -> None:
    x = weights()
    x[77] = 0.5
    found = difference(tmp_path, x, put(x, 77, 0.5 + 2.0**-24))
    assert (found.verdict, found.is_exact) == ("close", True)
    assert found.max_abs == (2.0**-24, 2.0**-24)


def test_float64_elements_are_named_with_about_the_value_they_had(tmp_path: Path) -> None:
    """The sketch has no more digits than the values: the bounds decide, not the digest."""
    x = weights(torch.float64)
    y = put(put(x, 5, 3.0), 49_999, 7.0)
    found = difference(tmp_path, x, y)
    assert (found.verdict, found.is_exact, found.num_differing) == ("different", False, None)
    assert [e.index for e in found.elements] == [(49_999,), (5,)]
    assert [e.actual for e in found.elements] == [7.0, 3.0]
    for one in found.elements:
        assert one.expected == pytest.approx(float(x[one.index]), abs=1e-11)
    assert "about" in found.why
    assert "proved by the digest" not in found.why


def test_float64_noise_is_not_taken_for_changed_elements(tmp_path: Path) -> None:
    x = weights(torch.float64)
    found = difference(tmp_path, x, x * (1 + 2e-16))
    assert (found.verdict, found.elements) == ("close", ())


def test_a_dense_change_names_no_elements_but_the_rows(tmp_path: Path) -> None:
    x = weights(torch.float32, 65536).reshape(64, 1024)
    y = x.clone()
    y[40:48] += 1e-3 * weights(torch.float32, 8192, seed=1).reshape(8, 1024)
    found = difference(tmp_path, x, y, Policy(atol=1e-4))
    assert (found.elements, found.is_exact) == ((), False)
    assert found.where == "rows 40-47"


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *itertools.product(
            (torch.float64, torch.float32, torch.complex64), (1e-7, 1e-5, 1e-3, 1.0)
        ),
        *((torch.bfloat16, size) for size in (1e-3, 1.0)),
    ],
)
def test_intervals_hold_the_truth(tmp_path: Path, dtype: torch.dtype, size: float) -> None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x = weights(dtype, 10_001)
    noise = torch.randn(10_001, generator=torch.Generator().manual_seed(0), dtype=wide) * size
    y = (x.to(wide) + noise).to(dtype)
    e, d = x.to(wide).abs(), (y.to(wide) - x.to(wide)).abs()
    for rtol in (0.0, 1e-5, 1e-2):
        found = difference(tmp_path, x, y, Policy(rtol=rtol), block_nbytes=2048)
        assert found.max_abs[0] <= float(d.max()) <= found.max_abs[1]
        least = max(0.0, float((d - rtol * e).max()))
        assert found.min_atol[0] <= least <= found.min_atol[1]
        # 80 blocks (complex: 40) of 16 projections: within 7 standard deviations.
        assert found.rms == pytest.approx(float(d.square().mean().sqrt()), rel=0.2)


def test_the_least_atol_is_beyond_the_tolerance_where_different_is_proved(tmp_path: Path) -> None:
    x = weights()
    y = x + 3e-2 * weights(seed=1)
    y[:2] = x[:2] = torch.tensor([5.0, -5.0])  # the extremes stay
    found = difference(tmp_path, x, y)
    assert (found.verdict, found.is_exact) == ("different", False)
    assert 1e-5 < found.min_atol[0] <= found.min_atol[1]
    assert 0 < found.chance < 1e-9


def test_complex_tolerances_are_of_magnitudes_not_of_components(tmp_path: Path) -> None:
    """|1 + 1j| allows more than its greatest component does."""
    x = torch.complex(torch.full((100,), 100.0), torch.full((100,), 100.0))
    y = x.clone()
    y[3] += 1.2e-3
    assert torch.allclose(y, x, rtol=1e-5, atol=1e-5)
    assert difference(tmp_path, x, y).verdict != "different"


def test_what_underflows_in_squares_is_undecided(tmp_path: Path) -> None:
    x = weights(torch.float64) * 1e-200
    found = difference(tmp_path, x, x * (1 + 1e-7), Policy(atol=0.0, rtol=1e-5))
    assert found.verdict == "undecided"
    assert difference(tmp_path, x, x * 1.5, Policy(atol=1e-9)).verdict == "close"


def test_rounding_of_subnormals_is_allowed_for(tmp_path: Path) -> None:
    """rtol * |expected| rounds up by half of the least float32."""
    least = 2.0**-149
    x = torch.tensor([7_160_000 * least], dtype=torch.float64).float()
    y = torch.tensor([7_160_072 * least], dtype=torch.float64).float()
    policy = Policy(atol=0.0, rtol=1e-5)
    assert torch.allclose(y, x, rtol=1e-5, atol=0.0)
    assert difference(tmp_path, x, y, policy).verdict != "different"


def test_nan_and_infinities_are_counted_on_both_sides(tmp_path: Path) -> None:
    x = weights()
    x[3], x[4] = math.inf, math.nan
    y = weights()
    y[3] = -math.inf
    found = difference(tmp_path, x, y)
    assert (found.verdict, found.num_nonfinite) == ("different", (2, 1))
    assert found.max_abs[1] == found.min_atol[1] == math.inf


def test_infinities_that_may_have_moved_are_undecided(tmp_path: Path) -> None:
    x, y = torch.zeros(9000), torch.zeros(9000)
    x[3] = y[4] = math.inf
    found = difference(tmp_path, x, y)
    assert (found.verdict, found.max_abs[1]) == ("undecided", math.inf)
    z = torch.full((9000,), 1e-12)
    z[3] = math.inf
    assert difference(tmp_path, x, z).verdict == "undecided"


def test_an_extreme_that_moved_is_different_beside_infinities(tmp_path: Path) -> None:
    x = weights()
    x[3] = math.inf
    y = x.clone()
    y[100:300] *= -1
    y[200] = 0.9
    found = difference(tmp_path, x, y)
    assert (found.verdict, found.max_abs[1]) == ("different", math.inf)
    assert "minimum or maximum moved" in found.why


def test_negative_zero_is_close_but_not_exactly_equal(tmp_path: Path) -> None:
    x = weights()
    x[9] = 0.0
    assert difference(tmp_path, x, put(x, 9, -0.0)).verdict == "close"
    assert difference(tmp_path, x, put(x, 9, -0.0), Policy(exact=True)).verdict == "different"


def test_another_dtype_is_measured_by_the_same_blocks(tmp_path: Path) -> None:
    x = weights(torch.float32)
    policy = Policy(check_dtype=False, atol=1e-2)
    found = difference(tmp_path, x.double(), x, Policy(check_dtype=False))
    assert (found.verdict, found.rms) == ("close", pytest.approx(0.0, abs=1e-15))
    found = difference(tmp_path, x, x.bfloat16(), policy)
    truth = (x.bfloat16().float() - x).abs().max()
    assert found.max_abs[0] <= float(truth) <= found.max_abs[1]
    # Equal values in another type are no proof of another value.
    exact = Policy(check_dtype=False, exact=True)
    assert difference(tmp_path, x.double(), x, exact).verdict == "undecided"
    assert difference(tmp_path, x, x.bfloat16(), exact).verdict == "different"


@pytest.mark.parametrize("block_nbytes", [32768, 1 << 20])
def test_sketches_of_real_and_of_complex_numbers_tell_nothing_of_each_other(
    tmp_path: Path, block_nbytes: int
) -> None:
    """They are of components, and allclose holds for the same values."""
    x, policy = weights(numel=3000).abs(), Policy(check_dtype=False)
    for one, other in [(x, x.to(torch.complex64)), (x.to(torch.complex64), x)]:
        found = difference(tmp_path, one, other, policy, block_nbytes)
        assert found.verdict == "undecided"
        assert "cannot be compared" in found.why


def test_a_difference_carries_the_stats_of_both_sides(tmp_path: Path) -> None:
    # Decided by a sketch, a recovered element, kept values, a digest; a reference; a checkpoint.
    x = weights()
    before = {"many": x, "one": x.clone(), "few": x[:300].clone(), "integers": torch.arange(9000)}
    after = {k: t + 1 for k, t in before.items()} | {"one": put(x, 7, 3.0)}
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    torch.save(before, one)
    torch.save(after, other)
    recorded = api.record(one, tmp_path / "golden")
    for comparison in (
        api.verify(other, recorded),
        api.verify(other, recorded, reference=one),
        api.diff(one, other, stats=True),
    ):
        assert len(comparison.findings) == 4
        for finding in comparison.findings:
            assert finding.difference is not None
            sides = zip(finding.difference.stats, (before, after), strict=True)
            for stats, tensors in sides:
                truth = tensors[finding.key].double()
                assert stats is not None
                assert (stats.min, stats.max) == (truth.min(), truth.max())
                assert stats.l2 == pytest.approx(float(truth.norm()), rel=1e-12)
                assert stats.num_zero == int((truth == 0).sum())


def test_stats_of_two_checkpoints_are_measured_only_where_asked_for(tmp_path: Path) -> None:
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    torch.save({"x": weights()}, one)
    torch.save({"x": weights(seed=1)}, other)
    [finding] = api.diff(one, other).findings
    assert finding.difference is not None
    assert finding.difference.stats == (None, None)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64], ids=str
)
@pytest.mark.parametrize("count", [0, 3])
def test_nan_in_chunks_that_are_the_same_is_close_to_nothing(
    tmp_path: Path, dtype: torch.dtype, count: int
) -> None:
    numel = 12_600_000 // dtype.itemsize  # four chunks
    x = torch.zeros(numel).to(dtype)
    x[:count] = math.nan
    y = x.clone()
    y[-1] = 1e-7 if dtype.itemsize > 1 else 1.52587890625e-05
    torch.save({"x": x}, tmp_path / "one.pt")
    torch.save({"x": y}, tmp_path / "other.pt")
    policy = Policy(atol=1e-4)
    [finding] = api.diff(tmp_path / "one.pt", tmp_path / "other.pt", policy=policy).findings
    assert finding.kind == ("different" if count else "close")
    assert finding.difference is not None
    assert finding.difference.num_nonfinite == (count, count)
    assert finding.difference.num_beyond == count
    assert math.isinf(finding.difference.min_atol[0]) == bool(count)


def test_infinities_in_chunks_that_are_the_same_are_counted(tmp_path: Path) -> None:
    x = torch.zeros(3_000_000)
    x[:2] = math.inf
    torch.save({"x": x}, tmp_path / "one.pt")
    torch.save({"x": put(x, -1, 1.0)}, tmp_path / "other.pt")
    [finding] = api.diff(tmp_path / "one.pt", tmp_path / "other.pt").findings
    assert finding.difference is not None
    assert finding.difference.num_nonfinite == (2, 2)
    assert (finding.difference.num_beyond, finding.difference.max_abs) == (1, (1.0, 1.0))


@pytest.mark.parametrize(
    ("ends", "outwards", "suffices"),
    [
        ((1.2349, 5.6701), (1.2, 5.7), (1.2, 5.7)),
        ((1.2001e-9, 1.0001e-5), (1.2e-9, 1.1e-5), (1.2e-9, 1.1e-5)),
        ((0.0, 2.5), (0.0, 2.5), (0.0, 2.5)),
        ((9.999, math.inf), (9.9, math.inf), (9.9, math.inf)),
        ((1.2341, 1.2341), (1.2341, 1.2341), (1.24, 1.24)),
        ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
        ((math.inf, math.inf), (math.inf, math.inf), (math.inf, math.inf)),
    ],
)
def test_what_is_rounded_for_a_person_still_holds(
    ends: tuple[float, float], outwards: tuple[float, float], suffices: tuple[float, float]
) -> None:
    assert round_outward(ends) == outwards
    assert sufficient_atol(ends) == suffices


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_one_element_is_read_in_its_own_type() -> None:
    for value, dtype in [
        (1.5, torch.bfloat16),
        (0.5, torch.float8_e4m3fn),
        (1 + 2j, torch.complex64),
        (1 + 2j, torch.complex32),
        (True, torch.bool),
        (-7, torch.int8),
    ]:
        found = element(tensor_fingerprint(torch.tensor([0, value]).to(dtype)), 1)
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_rtol_allows_of_the_least_element_is_close(tmp_path: Path, sign: float) -> None:
    # As log-probabilities are: all of one sign, and far from 0.
    x = sign * (8 + 2 * torch.rand(NUMEL, generator=torch.Generator().manual_seed(0)))
    y = x + 1e-6 * torch.randn(NUMEL, generator=torch.Generator().manual_seed(1))
    found = difference(tmp_path, x, y, Policy(atol=1e-8, rtol=1e-3))
    assert found.verdict == "close"
    assert torch.allclose(y, x, atol=1e-8, rtol=1e-3)
    # With one element near 0, of which nothing may be added, it stays open.
    x[77] = y[77] = 1e-3
    assert difference(tmp_path, x, y, Policy(atol=1e-8, rtol=1e-3)).verdict == "undecided"


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_no_element_is_off_by_more_than_both_ranges_span(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    x = weights(dtype) * 1e-5
    y = weights(dtype, seed=1) * 1e-5
    found = difference(tmp_path, x, y, Policy(atol=1e-4))
    assert found.verdict == "close"
    assert found.max_abs[0] <= float((x - y).abs().max()) <= found.max_abs[1] <= 1e-4
