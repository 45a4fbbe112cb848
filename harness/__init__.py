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
    from harness.api import (
        KeptValues,
        diff,
        fingerprint,
        read_golden,
        record,
        roundtrip,
        update,
        verify,
        verify_stages,
    )
    from harness.callbacks.lightning import GoldenCheckpoint
    from harness.callbacks.transformers import GoldenTrainerCallback
    from harness.checkpoint import Checkpoint, open_checkpoint
    from harness.checkpoint.sources.paths import Location
    from harness.comparison.cause import Cause
    from harness.comparison.comparison import Comparison
    from harness.comparison.difference import Difference, Verdict
    from harness.comparison.findings import Divergence, Finding, FindingKind
    from harness.comparison.policy import Policy, Stage, Tolerance
    from harness.errors import (
        CheckpointError,
        GoldenError,
        GoldenMismatch,
        HarnessError,
        ModelError,
        UsageError,
    )
    from harness.fingerprints.fingerprint import Fingerprint, TensorFingerprint
    from harness.golden.golden import Golden, LiveRecord, Update
    from harness.model.options import LiveOptions
    from harness.streaming.workers import Group, Progress
    from harness.subjects import Subject
    from harness.version import __version__

_HOMES = {
    "harness.api": (
        *("KeptValues", "diff", "fingerprint", "read_golden", "record"),
        *("roundtrip", "update", "verify", "verify_stages"),
    ),
    "harness.callbacks.lightning": ("GoldenCheckpoint",),
    "harness.callbacks.transformers": ("GoldenTrainerCallback",),
    "harness.checkpoint": ("Checkpoint", "open_checkpoint"),
    "harness.checkpoint.sources.paths": ("Location",),
    "harness.comparison.cause": ("Cause",),
    "harness.comparison.comparison": ("Comparison",),
    "harness.comparison.difference": ("Difference", "Verdict"),
    "harness.comparison.findings": ("Divergence", "Finding", "FindingKind"),
    "harness.comparison.policy": ("Policy", "Stage", "Tolerance"),
    "harness.errors": (
        *("CheckpointError", "GoldenError", "GoldenMismatch"),
        *("HarnessError", "ModelError", "UsageError"),
    ),
    "harness.fingerprints.fingerprint": ("Fingerprint", "TensorFingerprint"),
    "harness.golden.golden": ("Golden", "LiveRecord", "Update"),
    "harness.model.options": ("LiveOptions",),
    "harness.streaming.workers": ("Group", "Progress"),
    "harness.subjects": ("Subject",),
    "harness.version": ("__version__",),
}

__all__ = [
    "Cause",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "Difference",
    "Divergence",
    "Finding",
    "FindingKind",
    "Fingerprint",
    "Golden",
    "GoldenCheckpoint",
    "GoldenError",
    "GoldenMismatch",
    "GoldenTrainerCallback",
    "Group",
    "HarnessError",
    "KeptValues",
    "LiveOptions",
    "LiveRecord",
    "Location",
    "ModelError",
    "Policy",
    "Progress",
    "Stage",
    "Subject",
    "TensorFingerprint",
    "Tolerance",
    "Update",
    "UsageError",
    "Verdict",
    "__version__",
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


def __dir__() -> list[str]:
    return sorted(__all__)
