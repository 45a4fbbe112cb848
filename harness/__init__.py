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
    from harness.callbacks.saves import OnMismatch
    from harness.callbacks.transformers import GoldenTrainerCallback
    from harness.checkpoint import Checkpoint, DType, Tensor, open_checkpoint
    from harness.checkpoint.sources.paths import AnyPath, Location
    from harness.checkpoint.sources.source import Source
    from harness.checkpoint.tensors import Checksum, Storage
    from harness.comparison.cause import Acceptable, Cause, CauseKind, Proof
    from harness.comparison.comparison import Comparison
    from harness.comparison.difference import Difference, Element, Verdict
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
    from harness.fingerprints.hashes import Hashes
    from harness.fingerprints.residues import Residues
    from harness.fingerprints.sketch import Sketch
    from harness.fingerprints.stats import Stats
    from harness.golden.golden import Golden, LiveRecord, PartName, Update
    from harness.model.activations import Activations
    from harness.model.options import LiveOptions
    from harness.streaming.workers import Group, Progress, Task, Workers
    from harness.subjects import Subject
    from harness.version import __version__

_HOMES = {
    "harness.api": (
        *("KeptValues", "diff", "fingerprint", "read_golden", "record"),
        *("roundtrip", "update", "verify", "verify_stages"),
    ),
    "harness.callbacks.lightning": ("GoldenCheckpoint",),
    "harness.callbacks.transformers": ("GoldenTrainerCallback",),
    "harness.callbacks.saves": ("OnMismatch",),
    "harness.checkpoint": ("Checkpoint", "DType", "Tensor", "open_checkpoint"),
    "harness.checkpoint.sources.paths": ("AnyPath", "Location"),
    "harness.checkpoint.sources.source": ("Source",),
    "harness.checkpoint.tensors": ("Checksum", "Storage"),
    "harness.comparison.cause": ("Acceptable", "Cause", "CauseKind", "Proof"),
    "harness.comparison.comparison": ("Comparison",),
    "harness.comparison.difference": ("Difference", "Element", "Verdict"),
    "harness.comparison.findings": ("Divergence", "Finding", "FindingKind"),
    "harness.comparison.policy": ("Policy", "Stage", "Tolerance"),
    "harness.errors": (
        *("CheckpointError", "GoldenError", "GoldenMismatch"),
        *("HarnessError", "ModelError", "UsageError"),
    ),
    "harness.fingerprints.fingerprint": ("Fingerprint", "TensorFingerprint"),
    "harness.fingerprints.hashes": ("Hashes",),
    "harness.fingerprints.residues": ("Residues",),
    "harness.fingerprints.sketch": ("Sketch",),
    "harness.fingerprints.stats": ("Stats",),
    "harness.golden.golden": ("Golden", "LiveRecord", "PartName", "Update"),
    "harness.model.activations": ("Activations",),
    "harness.model.options": ("LiveOptions",),
    "harness.streaming.workers": ("Group", "Progress", "Task", "Workers"),
    "harness.subjects": ("Subject",),
    "harness.version": ("__version__",),
}

__all__ = [
    "Acceptable",
    "Activations",
    "AnyPath",
    "Cause",
    "CauseKind",
    "Checkpoint",
    "CheckpointError",
    "Checksum",
    "Comparison",
    "DType",
    "Difference",
    "Divergence",
    "Element",
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
    "Hashes",
    "KeptValues",
    "LiveOptions",
    "LiveRecord",
    "Location",
    "ModelError",
    "OnMismatch",
    "PartName",
    "Policy",
    "Progress",
    "Proof",
    "Residues",
    "Sketch",
    "Source",
    "Stage",
    "Stats",
    "Storage",
    "Subject",
    "Task",
    "Tensor",
    "TensorFingerprint",
    "Tolerance",
    "Update",
    "UsageError",
    "Verdict",
    "Workers",
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
