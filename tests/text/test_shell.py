"""Commands as a shell takes them, whatever the words hold."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.text.shell import command_line, quoted
from tests.report.samples import HOSTILE

NAMES = [*(name for name in HOSTILE if "\x00" not in name and "\ud800" not in name)]
NAMES += ["\x1bc\u202e\nrm -rf x", "it's\t1", "\x01" + "2", os.fsdecode(b"\xff.pt"), ""]


@pytest.mark.parametrize("name", NAMES)
def test_bash_reads_any_name_back(name: str) -> None:
    command = command_line(["printf", "%s", name])
    assert command.isprintable()
    run = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert os.fsdecode(run.stdout) == name


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])).filter(str.isprintable))
def test_what_is_plain_is_quoted_as_ever(word: str) -> None:
    assert quoted(word) == shlex.quote(word)
