"""Hashes of roundings are those of torch's casts; sums have no order, and tell small changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint.dtypes import DTYPES
from harness.fingerprints.hashes import (
    UNIT_NUMEL,
    hash_chunk,
    hash_unit,
    join_hashes,
    join_units,
    unordered_sums,
)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rounding_has_the_hash_of_what_torch_casts(
    wide: torch.dtype, narrow: torch.dtype
) -> None:
    if wide == narrow:
        return
    g = torch.Generator().manual_seed(0)
    values = torch.randn(UNIT_NUMEL + 1000, generator=g, dtype=wide)
    specials = [0.0, -0.0, 1e-45, 6e-8, 65504.0, 65520.0, 3.39e38, np.inf, -np.inf, np.nan, 1e-6]
    values[: len(specials)] = torch.tensor(specials, dtype=wide)
    stored, dtype = (DTYPES[str(d).removeprefix("torch.")] for d in (wide, narrow))
    kept = join_hashes([hash_chunk(bits(values), stored)])
    cast = values.to(narrow)
    units = [
        hash_unit(cast[start : start + UNIT_NUMEL].float().numpy(), dtype)
        for start in (0, UNIT_NUMEL)
    ]
    assert kept.of_rounding(stored, dtype) == join_units(units)
    changed = values.clone()
    changed[-1] *= 1.1
    other = join_hashes([hash_chunk(bits(changed), stored)])
    assert other.of_rounding(stored, dtype) != kept.of_rounding(stored, dtype)


def test_chunks_join_into_the_hashes_of_the_whole() -> None:
    values = torch.randn(2 * UNIT_NUMEL + 77, generator=torch.Generator().manual_seed(1))
    data, dtype = bits(values), DTYPES["float32"]
    whole = join_hashes([hash_chunk(data, dtype)])
    end = 4 * UNIT_NUMEL
    parts = join_hashes([hash_chunk(data[:end], dtype), hash_chunk(data[end:], dtype)])
    assert whole == parts


@given(
    name=st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
    seed=st.integers(0, 1000),
    steps=st.sampled_from([(1, -1), (1, 1), (256, -256), (3, 0)]),
)
def test_an_order_leaves_the_sums_and_a_last_bit_changes_them(
    name: str, seed: int, steps: tuple[int, int]
) -> None:
    dtype = DTYPES[name]
    random = np.random.default_rng(seed)
    words = random.integers(0, 2 ** (8 * dtype.itemsize), 3000, dtype=f"<u{dtype.itemsize}")
    sums = unordered_sums(words.view("|u1"), dtype)
    assert np.array_equal(unordered_sums(random.permutation(words).view("|u1"), dtype), sums)
    one, other = random.choice(len(words), 2, replace=False)
    changed = words.copy()
    modulus = 2 ** (8 * dtype.itemsize)
    changed[[one, other]] += np.array([step % modulus for step in steps], words.dtype)
    if not np.array_equal(np.sort(changed), np.sort(words)):
        assert not np.array_equal(unordered_sums(changed.view("|u1"), dtype), sums)
