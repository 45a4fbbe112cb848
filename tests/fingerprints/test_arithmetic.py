"""Sums and products: within their bound of the exact ones, and the same bits in any company."""

from __future__ import annotations

import math
import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.fingerprints.arithmetic import Matrix, moments_of_runs, sums_of_squares

Array = np.ndarray[Any, np.dtype[Any]]
UNIT = 2.0**-53
KINDS = ("normal", "tiny", "huge", "wide", "cancelling", "constant")


def values_of(kind: str, numel: int, dtype: str, seed: int = 0) -> Array:
    draw = np.random.default_rng([seed, numel])
    normal = draw.standard_normal(numel)
    found = {
        "normal": normal,
        "tiny": normal * 1e-42,  # subnormal as float32
        "huge": np.clip(normal, -3, 3) * 1e38,
        "wide": normal * 10.0 ** draw.integers(-30, 30, numel),
        "cancelling": np.where(np.arange(numel) % 2, -1.0, 1.0) * (1e6 + normal),
        "constant": np.full(numel, 0.1),
    }[kind]
    return found.astype(dtype)


def exact(*factors: Array) -> Fraction:
    """The sum of the products of the factors, of which all denominators are powers of two."""
    products = [
        tuple(map(math.prod, zip(*(float(x).as_integer_ratio() for x in term), strict=True)))
        for term in zip(*factors, strict=True)
    ]
    common = max(denominator for _, denominator in products)
    return Fraction(sum(n * (common // denominator) for n, denominator in products), common)


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("numel", "run"), [(1, 8192), (4096, 4096), (5000, 2048), (3000, 256), (8193, 8192), (77, 64)]
)
def test_moments_are_within_their_bound(kind: str, dtype: str, numel: int, run: int) -> None:
    values = values_of(kind, numel, dtype)
    found = moments_of_runs(values, run)
    assert found.sums.dtype == found.squares.dtype == np.float64
    assert len(found.sums) == len(found.squares) == -(-numel // run)
    for index in range(len(found.sums)):
        part = values[index * run : (index + 1) * run]
        size = float(exact(np.abs(part)))
        error = abs(Fraction(float(found.sums[index])) - exact(part))
        assert error <= len(part) * UNIT * size
        squares = exact(part, part)
        if squares > 1e-280:  # else float64 itself has lost them
            error = abs(Fraction(float(found.squares[index])) - squares)
            assert error <= (len(part) + 1) * UNIT * squares


def test_there_are_no_moments_of_nothing() -> None:
    found = moments_of_runs(np.zeros(0, "<f4"), 8)
    assert found.sums.shape == found.squares.shape == (0,)
    assert sums_of_squares(np.zeros((0, 8), "<f4")).shape == (0,)
    assert Matrix(np.ones((8, 3), "<f4")).product(np.zeros((0, 8), "<f4")).shape == (0, 3)


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "numel"), [(1, 8192), (3, 1000), (40, 256), (2, 1)])
def test_products_are_within_their_bound(kind: str, dtype: str, count: int, numel: int) -> None:
    rows = values_of(kind, count * numel, dtype).reshape(count, numel)
    matrix = Matrix(np.random.RandomState(3).standard_normal((numel, 16)).astype("<f4"))
    found = matrix.product(rows)
    assert (found.dtype, found.shape) == (np.dtype("<f8"), (count, 16))
    for row, column in [(0, 0), (count - 1, 15), (count // 2, 7)]:
        x, p = rows[row], matrix.numbers[:, column]
        size = exact(np.abs(x), np.abs(p))
        error = abs(Fraction(float(found[row, column])) - exact(x, p))
        assert error <= (numel + 1) * UNIT * size + Fraction(1e-300)


@settings(max_examples=40)
@given(st.data())
def test_bits_do_not_depend_on_what_stands_beside(data: st.DataObject) -> None:
    numel = data.draw(st.sampled_from([256, 1000, 4096, 8192]))
    dtype = data.draw(st.sampled_from(["<f4", "<f8"]))
    rows = values_of("normal", 9 * numel, dtype, data.draw(st.integers(0, 99))).reshape(9, numel)
    matrix = Matrix(np.random.RandomState(1).standard_normal((numel, 16)).astype("<f4"))
    first = data.draw(st.integers(0, 7))
    last = data.draw(st.integers(first + 2, 9))
    part = rows[first:last].copy()
    assert np.array_equal(sums_of_squares(part), sums_of_squares(rows)[first:last])
    whole, some = (moments_of_runs(x.ravel(), numel) for x in (rows, part))
    assert np.array_equal(some.sums, whole.sums[first:last])
    assert np.array_equal(some.squares, whole.squares[first:last])
    if dtype == "<f4":  # of float64, BLAS and not, by the number of rows
        assert np.array_equal(matrix.product(part), matrix.product(rows)[first:last])


def test_bits_do_not_depend_on_threads() -> None:
    rows = values_of("normal", 64 * 8192, "<f4").reshape(64, 8192)
    matrix = Matrix(np.random.RandomState(1).standard_normal((8192, 16)).astype("<f4"))

    def run() -> bytes:
        found = moments_of_runs(rows.ravel(), 8192)
        return matrix.product(rows).tobytes() + found.sums.tobytes() + found.squares.tobytes()

    expected, results = run(), []
    threads = [threading.Thread(target=lambda: results.append(run())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


@pytest.mark.parametrize("count", [1, 3])
def test_products_beyond_float64_are_not_finite_and_warn_of_nothing(count: int) -> None:
    rows = np.full((count, 8192), 1e308)
    matrix = Matrix(np.random.RandomState(1).standard_normal((8192, 16)).astype("<f4"))
    assert not np.isfinite(matrix.product(rows)).all()


def test_values_that_are_not_finite_make_sums_that_are_not() -> None:
    """As allclose counts on, whose squares tell whether to look for them."""
    for bad in (math.nan, math.inf, -math.inf):
        values = np.ones((1, 4096), "<f4")
        values[0, 777] = bad
        assert not math.isfinite(sums_of_squares(values)[0])
