"""Golden fingerprints of checkpoints: record once, verify ever after, without the reference.

The public names below load on first use: `import harness` costs nothing and never imports torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if not hasattr(os, "preadv"):
    raise ImportError(
        "checkpoint-harness runs on Linux and macOS; this system has no os.preadv "
        "(on Windows, use WSL)"
    )

if TYPE_CHECKING:
    from harness.api import diff, fingerprint, record, roundtrip, update, verify, verify_stages
    from harness.checkpoint import open_checkpoint
    from harness.comparison.comparison import Comparison
    from harness.comparison.policy import Policy
    from harness.errors import (
        CheckpointError,
        GoldenError,
        GoldenMismatch,
        HarnessError,
        ModelError,
        UsageError,
    )
    from harness.golden.file import read_golden
    from harness.lightning_callback import GoldenCheckpoint
    from harness.model.options import LiveOptions


_HOMES = {
    "harness.api": (
        *("diff", "fingerprint", "open_checkpoint", "read_golden", "record"),
        *("roundtrip", "update", "verify", "verify_stages"),
    ),
    "harness.comparison.comparison": ("Comparison",),
    "harness.comparison.policy": ("Policy",),
    "harness.errors": (
        "CheckpointError",
        "GoldenError",
        "GoldenMismatch",
        "HarnessError",
        "ModelError",
        "UsageError",
    ),
    "harness.lightning_callback": ("GoldenCheckpoint",),
    "harness.model.options": ("LiveOptions",),
    "harness.version": ("__version__",),
}

__all__ = [
    "CheckpointError",
    "Comparison",
    "GoldenCheckpoint",
    "GoldenError",
    "GoldenMismatch",
    "HarnessError",
    "LiveOptions",
    "ModelError",
    "Policy",
    "UsageError",
    "diff",
    "fingerprint",
    "open_checkpoint",
    "read_golden",
    "record",
    "roundtrip",
    "update",
    "verify",
    "verify_stages",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
