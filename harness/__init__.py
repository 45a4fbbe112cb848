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
    from harness.api import KeptValues as KeptValues
    from harness.api import diff as diff
    from harness.api import fingerprint as fingerprint
    from harness.api import read_golden as read_golden
    from harness.api import record as record
    from harness.api import roundtrip as roundtrip
    from harness.api import update as update
    from harness.api import verify as verify
    from harness.api import verify_stages as verify_stages
    from harness.callbacks.lightning import GoldenCheckpoint as GoldenCheckpoint
    from harness.callbacks.saves import OnMismatch as OnMismatch
    from harness.callbacks.transformers import GoldenTrainerCallback as GoldenTrainerCallback
    from harness.checkpoint import Checkpoint as Checkpoint
    from harness.checkpoint import DType as DType
    from harness.checkpoint import Tensor as Tensor
    from harness.checkpoint import open_checkpoint as open_checkpoint
    from harness.checkpoint.sources.paths import AnyPath as AnyPath
    from harness.checkpoint.sources.paths import Location as Location
    from harness.checkpoint.sources.source import Source as Source
    from harness.checkpoint.tensors import Checksum as Checksum
    from harness.checkpoint.tensors import Storage as Storage
    from harness.comparison.cause import Acceptable as Acceptable
    from harness.comparison.cause import Cause as Cause
    from harness.comparison.cause import CauseKind as CauseKind
    from harness.comparison.cause import Proof as Proof
    from harness.comparison.comparison import Comparison as Comparison
    from harness.comparison.difference import Difference as Difference
    from harness.comparison.difference import Element as Element
    from harness.comparison.difference import Verdict as Verdict
    from harness.comparison.findings import Divergence as Divergence
    from harness.comparison.findings import Finding as Finding
    from harness.comparison.findings import FindingKind as FindingKind
    from harness.comparison.policy import Policy as Policy
    from harness.comparison.policy import Stage as Stage
    from harness.comparison.policy import Tolerance as Tolerance
    from harness.errors import CheckpointError as CheckpointError
    from harness.errors import GoldenError as GoldenError
    from harness.errors import GoldenMismatch as GoldenMismatch
    from harness.errors import HarnessError as HarnessError
    from harness.errors import ModelError as ModelError
    from harness.errors import UsageError as UsageError
    from harness.fingerprints.fingerprint import Fingerprint as Fingerprint
    from harness.fingerprints.fingerprint import TensorFingerprint as TensorFingerprint
    from harness.fingerprints.hashes import Hashes as Hashes
    from harness.fingerprints.residues import Residues as Residues
    from harness.fingerprints.sketch import Sketch as Sketch
    from harness.fingerprints.stats import Stats as Stats
    from harness.golden.golden import Golden as Golden
    from harness.golden.golden import LiveRecord as LiveRecord
    from harness.golden.golden import PartName as PartName
    from harness.golden.golden import Update as Update
    from harness.model.activations import Activations as Activations
    from harness.model.options import LiveOptions as LiveOptions
    from harness.streaming.workers import Group as Group
    from harness.streaming.workers import Progress as Progress
    from harness.streaming.workers import Task as Task
    from harness.streaming.workers import Workers as Workers
    from harness.subjects import Subject as Subject
    from harness.version import __version__ as __version__

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

__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> object:
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
