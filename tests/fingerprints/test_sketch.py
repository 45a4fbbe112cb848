"""The sketch's constants, its bounds against the truth, and the recovery of sparse changes."""

from __future__ import annotations

import hashlib
import math

import mpmath
import numpy as np
import pytest

from harness.fingerprints import sketch
from harness.fingerprints.arithmetic import total_squares
from harness.fingerprints.sketch import (
    NUM_PROJECTIONS,
    SEED,
    Gap,
    compare_sketches,
    num_blocks,
    projection,
    recover,
    sketch_values,
)

BLOCK = 8192  # of float32


def gap_of(expected: np.ndarray, actual: np.ndarray, block_numel: int = BLOCK) -> Gap:
    ours, theirs = sketch_values(expected, block_numel), sketch_values(actual, block_numel)
    return compare_sketches(ours, theirs, block_numel, expected.size)


def test_the_projections_never_change() -> None:
    digest = hashlib.sha256(projection(4096).numbers.astype("<f4").tobytes()).hexdigest()
    assert digest == "3631af5b0966580cd0d7bdc2e3cbaf3a0e621b1aff74f65120f13ff3cef83ff3"


def test_smaller_blocks_use_the_first_rows() -> None:
    assert np.array_equal(projection(256).numbers, projection(8192).numbers[:256])


def test_the_quantiles_of_chi_square_are_rounded_away_from_the_middle() -> None:
    with mpmath.workdps(40):
        half = mpmath.mpf(NUM_PROJECTIONS) / 2
        chance = mpmath.mpf(sketch.CHANCE)

        def below(x: float) -> mpmath.mpf:
            return mpmath.gammainc(half, 0, mpmath.mpf(x) / 2, regularized=True)

        def above(x: float) -> mpmath.mpf:
            return mpmath.gammainc(half, mpmath.mpf(x) / 2, mpmath.inf, regularized=True)

        low, high = sketch._CHI2_LOW, sketch._CHI2_HIGH
        assert chance * 0.9999 < below(low) <= chance
        assert chance * 0.9999 < above(high) <= chance


def test_the_norm_of_the_projections_is_within_what_the_rounding_bound_takes() -> None:
    """For every number of elements that a block, or the last part of one, may have."""
    rows = np.random.RandomState(SEED).standard_normal((1 << 18, NUM_PROJECTIONS))
    squares = np.cumsum(np.square(rows).sum(axis=1))
    assert np.all(squares <= 2.0 * NUM_PROJECTIONS * np.arange(1, len(rows) + 1))


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_rounding_of_real_sums_stays_below_noise_and_noise_below_the_bound(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for block in (1, 3, 64, 128, 1000, 4096, 8192):
        values = rng.standard_normal((8, block)) * np.exp(rng.standard_normal((8, block)))
        values = values.astype(dtype)
        one = sketch_values(values.ravel(), block).projections
        # Another order of summation: naive, from the other end.
        products = values[:, ::-1, None] * projection(block).numbers[None, ::-1]
        other = np.add.accumulate(products, axis=1)[:, -1]
        norms = np.linalg.norm(values.astype("<f8"), axis=1)
        gap = compare_sketches(
            sketch.Sketch(projections=one, norms=norms),
            sketch.Sketch(projections=other, norms=norms),
            block,
            values.size,
        )
        assert np.all(gap.noise <= gap.rounding)
        assert len(gap.changed) == 0


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("kind", ["normal", "uniform", "spike", "two spikes", "constant", "heavy"])
def test_the_bounds_hold_the_distance_of_every_block(kind: str, dtype: str) -> None:
    rng = np.random.default_rng(len(kind))
    count, block = 2000, 256
    d = {
        "normal": rng.standard_normal,
        "uniform": rng.random,
        "constant": np.ones,
        "heavy": lambda shape: rng.standard_cauchy(shape),
    }.get(kind, np.zeros)((count, block))
    if "spike" in kind:
        for _ in range(1 + ("two" in kind)):
            d[np.arange(count), rng.integers(block, size=count)] = rng.standard_normal(count)
    d = d * np.exp(5 * rng.standard_normal((count, 1)))
    expected = rng.standard_normal(d.size).astype(dtype)
    actual = (expected + d.ravel()).astype(dtype)
    moved = actual.astype("<f8") - expected
    truth = np.linalg.norm(moved.reshape(count, block), axis=1)
    gap = gap_of(expected, actual, block)
    assert np.all(gap.lower <= truth)
    assert np.all(truth <= gap.upper)
    # ... and they are no wider than 1e-12 needs.
    there = gap.lower > 0
    assert there.mean() > 0.9
    assert np.median(gap.upper[there] / gap.lower[there]) < 20.5


def test_the_estimate_of_rms_is_within_its_chi_square_range() -> None:
    rng = np.random.default_rng(3)
    ratios = []
    for _ in range(300):
        d = rng.standard_normal(5 * 256 + 77)
        x = rng.standard_normal(d.size)
        gap = gap_of(x, x + d, 256)
        ratios.append(np.square(gap.rms / np.sqrt(np.mean(np.square(d)))))
    # 5.3 blocks of 16 projections: a relative variance of about 2 / 85.
    assert 0.97 < np.mean(ratios) < 1.03
    assert 0.12 < np.std(ratios) < 0.19


def test_the_last_block_is_the_rest() -> None:
    values = np.random.default_rng(0).standard_normal(2 * 256 + 3)
    found = sketch_values(values, 256)
    assert found.projections.shape == (num_blocks(values.size, 256), NUM_PROJECTIONS) == (3, 16)
    last = sketch_values(np.append(values[512:], np.zeros(253)), 256)
    assert np.allclose(found.projections[2], last.projections[0], rtol=1e-13)
    assert gap_of(values, values, 256).numels.tolist() == [256, 256, 3]


def test_nothing_is_proved_of_numbers_whose_squares_underflow_or_overflow() -> None:
    for size in (1e-200, 1e200):
        x = np.random.default_rng(0).standard_normal(256) * size
        gap = gap_of(x, 2 * x, 256)
        truth = np.linalg.norm(x / size) * size
        assert gap.lower[0] == 0.0
        assert gap.upper[0] > truth


def test_equal_values_have_equal_sketches_and_no_changed_blocks() -> None:
    x = np.random.default_rng(0).standard_normal(10_000)
    gap = gap_of(x, x.copy(), 256)
    assert gap.changed.size == 0
    assert not gap.lower.any()
    assert recover(gap, 256) is None


def recovery_rate(count: int, draws: int, *, thorough: bool = True, equal: bool = False) -> float:
    """How often `count` changed elements of one block of float32 weights are found."""
    rng = np.random.default_rng(count)
    x = rng.standard_normal(BLOCK)
    ours = sketch_values(x, BLOCK)
    found = 0
    for _ in range(draws):
        where = np.sort(rng.choice(BLOCK, count, replace=False))
        delta = np.ones(count) if equal else rng.standard_normal(count) * rng.choice([1e-6, 1, 1e4])
        y = x.copy()
        y[where] += delta
        gap = compare_sketches(ours, sketch_values(y, BLOCK), BLOCK, BLOCK)
        changes = recover(gap, BLOCK, thorough=thorough)
        if changes is not None:
            assert [index for index, _ in changes] == where.tolist()
            noise = 4 * gap.noise[0]
            assert np.allclose([d for _, d in changes], (y - x)[where], rtol=1e-9, atol=noise)
            found += 1
    return found / draws


@pytest.mark.parametrize("thorough", [True, False])
def test_one_or_two_changed_elements_are_always_found(thorough: bool) -> None:
    assert recovery_rate(1, 100, thorough=thorough) == 1.0
    assert recovery_rate(2, 60, thorough=thorough) == 1.0
    assert recovery_rate(2, 40, thorough=thorough, equal=True) == 1.0


@pytest.mark.parametrize(("count", "least"), [(3, 0.6), (4, 0.55)])
def test_more_changed_elements_are_found_at_times(count: int, least: float) -> None:
    assert recovery_rate(count, 15) >= least


def test_changes_in_several_blocks_are_found() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(5 * 1024 + 100)
    y = x.copy()
    where = [0, 1023, 1024, 3000, 3001, 5219]
    y[where] += [1, -2, 0.3, 4, 4, 1e-3]
    changes = recover(gap_of(x, y, 1024), 1024)
    assert changes is not None
    assert [index for index, _ in changes] == where
    assert np.allclose([delta for _, delta in changes], (y - x)[where], atol=1e-11)


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 6])
def test_the_smallest_tensors_can_be_recovered(numel: int) -> None:
    x = np.arange(1.0, numel + 1)
    changes = recover(gap_of(x, 2 * x, 256), 256)
    if changes is not None:
        assert [index for index, _ in changes] == list(range(numel))
        assert np.allclose([delta for _, delta in changes], x)
    assert changes is not None or numel > 4


def test_dense_changes_are_not_taken_for_sparse_ones() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20 * 256)
    for size in (1e-14, 1e-9, 1, 1e9):
        gap = gap_of(x, x + size * rng.standard_normal(x.size), 256)
        for block in (0, 19):
            one = Gap(
                difference=gap.difference[[block]],
                lower=gap.lower[[block]],
                upper=gap.upper[[block]],
                numels=gap.numels[[block]],
                rounding=gap.rounding[[block]],
            )
            assert recover(one, 256) is None


def test_squares_whose_sum_has_no_float_are_infinite() -> None:
    assert total_squares([1.5e308, 1.5e308]) == math.inf
    assert total_squares([0.1] * 10) == 1.0


@pytest.mark.parametrize("extra", [0, 1, 2, 3, 4, 255])
def test_the_same_values_are_the_same_in_either_width(extra: int) -> None:
    """The last block too, which may have so few elements that the bound takes few roundings."""
    rng = np.random.default_rng(extra)
    for _ in range(30):
        values = rng.standard_normal(2 * 256 + extra).astype("<f4")
        both = values, values.astype("<f8")
        narrow, wide = (sketch_values(x, 256) for x in both)
        gap = compare_sketches(narrow, wide, 256, values.size)
        assert len(gap.changed) == 0
        assert not gap.lower.any()


def test_the_matrix_does_not_depend_on_how_it_is_made() -> None:
    whole = np.random.RandomState(SEED).standard_normal((20_000, NUM_PROJECTIONS))
    assert np.array_equal(projection(20_000).numbers, whole.astype("<f4"))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("numel", [1, 100, 2048, 5000])
def test_a_small_tensor_takes_a_small_matrix_whatever_the_block(
    monkeypatch: pytest.MonkeyPatch, numel: int, dtype: str
) -> None:
    """A large model may have a hundred thousand of them."""
    values = np.random.default_rng(numel).standard_normal(numel).astype(dtype)
    padded = np.zeros((1, 1 << 16), dtype)
    padded[0, :numel] = values
    expected = projection(1 << 16).product(padded)
    taken: list[int] = []
    monkeypatch.setattr(
        sketch, "projection", lambda size: (taken.append(size), projection(size))[1]
    )
    np.testing.assert_array_equal(sketch_values(values, 1 << 16).projections, expected)
    [size] = taken
    assert numel <= size < max(257, 2 * numel)
