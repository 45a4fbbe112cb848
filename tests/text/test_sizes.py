"""Sizes are read as people write them, and written so that they are enough."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.text.sizes import parse_size, size_at_least


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        *(("57MB", 57_000_000), ("1.5GB", 1_500_000_000), ("900 kb", 900_000), ("64KiB", 65536)),
        *(("12", 12), ("0.1b", 1), ("2TiB", 2 << 40)),
    ],
)
def test_a_size_is_read(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1e6", "5 bytes", "1,5MB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 57MB"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=10**13))
def test_what_is_written_is_enough_and_not_much_more(nbytes: int) -> None:
    assert nbytes <= parse_size(size_at_least(nbytes)) <= max(nbytes * 1.12, nbytes + 1)
