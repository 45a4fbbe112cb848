"""Golden fingerprints of checkpoints: record once, verify ever after, without the reference.

The public names below load on first use: `import harness` costs nothing and never imports torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.api import (
        diff,
        fingerprint,
        open_checkpoint,
        read_golden,
        record,
        roundtrip,
        update,
        verify,
        verify_stages,
    )
    from harness.compare import Comparison
    from harness.errors import (
        CheckpointError,
        GoldenError,
        GoldenMismatch,
        HarnessError,
        ModelError,
        UsageError,
    )
    from harness.model.callback import GoldenCheckpoint
    from harness.policy import Policy

_HOMES = {
    "harness.api": (
        *("diff", "fingerprint", "open_checkpoint", "read_golden", "record"),
        *("roundtrip", "update", "verify", "verify_stages"),
    ),
    "harness.compare": ("Comparison",),
    "harness.policy": ("Policy",),
    "harness.errors": (
        "CheckpointError",
        "GoldenError",
        "GoldenMismatch",
        "HarnessError",
        "ModelError",
        "UsageError",
    ),
    "harness.model.callback": ("GoldenCheckpoint",),
}

__all__ = [
    "CheckpointError",
    "Comparison",
    "GoldenCheckpoint",
    "GoldenError",
    "GoldenMismatch",
    "HarnessError",
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
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `fingerprint` the verb: importing the submodule of that name would take its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
