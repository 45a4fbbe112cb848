"""The columns of a golden are those that the page describes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import harness
from harness.golden.columns import FIELDS

PAGE = Path(harness.__file__).with_name("README.md")
DTYPES = {"F64": "<f8", "U8": "|u1"}


def test_the_page_names_every_column_with_its_dtype_and_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+)(?: \[(\d+)\])? \|", PAGE.read_text(), re.MULTILINE)
    described = {
        name: (np.dtype(DTYPES[dtype]), (int(size),) if size else ())
        for name, dtype, size in rows
        if name not in ("contents", "seal")
    }
    kept = {c.name: (np.dtype(c.dtype), c.shape) for field in FIELDS for c in field.columns}
    assert described == kept
