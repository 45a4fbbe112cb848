"""The verbs: record, verify, update and diff, from checkpoints to values.

In: subjects (a path or URL, an open checkpoint, a module, a state dict) and policies. Out: `Golden`
and `Comparison` values; nothing is printed, and a mismatch is not an exception
(`Comparison.raise_for_mismatch()` makes it one). Raises HarnessError where something cannot be
read or written. `jobs`, `progress` and `group` say who reads: see `Workers`.
"""

from __future__ import annotations

from harness.api.recording import KeptValues as KeptValues
from harness.api.recording import fingerprint, record, update
from harness.api.verifying import diff, roundtrip, verify, verify_stages, write_inputs
from harness.checkpoint import open_checkpoint
from harness.golden.file import read_golden
from harness.golden.places import GOLDEN_FOLDER, choose_golden, golden_path
from harness.subjects import Subject

__all__ = [
    "GOLDEN_FOLDER",
    "Subject",
    "choose_golden",
    "diff",
    "fingerprint",
    "golden_path",
    "open_checkpoint",
    "read_golden",
    "record",
    "roundtrip",
    "update",
    "verify",
    "verify_stages",
    "write_inputs",
]
