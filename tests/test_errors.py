"""Errors as Python shows them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from traceback import format_exception

import harness


def test_a_traceback_ends_with_the_next_step() -> None:
    error = harness.GoldenError("golden/net.safetensors: no golden there", hint="record it")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert one.hint == "record it"
        assert "".join(format_exception(one)).endswith("no golden there\nnext: record it\n")
    assert not hasattr(harness.UsageError("give a checkpoint, a golden, or both"), "__notes__")


def test_a_system_without_what_reading_takes_is_named() -> None:
    program = "import os; del os.preadv; import harness"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: checkpoint-harness runs on Linux and macOS" in run.stderr
