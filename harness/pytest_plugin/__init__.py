"""The pytest plugin; its hooks and its fixture are in `plugin`, which pytest finds here."""

from harness.pytest_plugin.plugin import (
    CheckpointGolden,
    PolicyKeywords,
    checkpoint_golden,
    pytest_addoption,
    pytest_configure,
)
from harness.pytest_plugin.summary import golden_name

__all__ = [
    "CheckpointGolden",
    "PolicyKeywords",
    "checkpoint_golden",
    "golden_name",
    "pytest_addoption",
    "pytest_configure",
]
