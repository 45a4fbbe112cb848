"""Which part of a file is compared: as the golden has it, as it is asked for, or all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

import harness
from harness import api
from harness.comparison.comparison import render
from harness.errors import NoSection, UsageError

_WEIGHTS = {"w": torch.arange(3.0)}
_AVERAGE = {"w": torch.arange(3.0) + 1}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    state = {"model": _WEIGHTS, "ema": _AVERAGE, "epoch": 3}
    torch.save(state, tmp_path / "last.pt")
    return tmp_path / "last.pt"


@pytest.fixture
def golden(file: Path, tmp_path: Path) -> Path:
    harness.record(file, tmp_path / "ema.safetensors", section="ema")
    return tmp_path / "ema.safetensors"


def test_a_golden_of_a_section_verifies_the_exported_weights(tmp_path: Path, golden: Path) -> None:
    safetensors.torch.save_file(_AVERAGE, tmp_path / "exported.safetensors")
    assert harness.verify(tmp_path / "exported.safetensors", golden).verdict == "identical"
    torch.save(_WEIGHTS, tmp_path / "other.pt")
    assert harness.verify(tmp_path / "other.pt", golden).verdict == "different"


def test_a_file_with_other_sections_says_so(tmp_path: Path, file: Path, golden: Path) -> None:
    torch.save({"model": _AVERAGE, "optimizer": {"m": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(NoSection, match="has no section 'ema'"):
        harness.verify(tmp_path / "other.pt", golden)
    assert api.verify(tmp_path / "other.pt", golden, section="model").verdict == "identical"
    assert api.verify(file, golden, section="model").verdict == "different"


def test_both_sides_of_a_diff_have_a_section(file: Path, tmp_path: Path, golden: Path) -> None:
    assert api.diff(file, file, section="ema").verdict == "identical"
    assert api.diff(file, file, section="model", section_b="ema").verdict == "different"
    safetensors.torch.save_file(_AVERAGE, tmp_path / "exported.safetensors")
    assert api.diff(file, tmp_path / "exported.safetensors", section="ema").verdict == "identical"
    assert api.diff(golden, file, section_b="model").verdict == "different"
    with pytest.raises(NoSection):
        api.diff(file, tmp_path / "exported.safetensors", section_b="ema")


def test_all_sections_are_one_golden(tmp_path: Path, file: Path) -> None:
    golden = tmp_path / "all.safetensors"
    harness.record(file, golden, section=".")
    for changed, key in (("ema", 'ema["w"]'), ("epoch", "epoch")):
        state = {"model": _WEIGHTS, "ema": _AVERAGE, "epoch": 3}
        torch.save({**state, changed: {"w": torch.zeros(3)} if changed == "ema" else 4}, file)
        found = harness.verify(file, golden)
        assert [finding.key for finding in found.findings] == [key]
        assert "all sections" in render(found)
    with pytest.raises(UsageError, match="from all sections"):
        api.verify(file, golden, section="ema")


def test_one_section_is_not_all_of_them(file: Path, golden: Path) -> None:
    with pytest.raises(UsageError, match="from section ema") as caught:
        api.verify(file, golden, section=".")
    assert "--all-sections" in caught.value.hint
