"""Checkpoints outside of the project: named below its roots, and found again where they moved."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness import api
from harness.errors import CheckpointError, UsageError
from harness.golden.golden import source_of
from harness.golden.project import ROOT_VARIABLE, roots_of, settings_of


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint beside the project, which is the current folder and names the root."""
    project = tmp_path / "project"
    (tmp_path / "store/run").mkdir(parents=True)
    project.mkdir()
    (project / "pyproject.toml").write_text('[tool.harness]\nroot = "../store"\n')
    monkeypatch.chdir(project)
    path = tmp_path / "store/run/net.safetensors"
    save_file({"w": np.arange(9, dtype="f4")}, path)
    return path


def test_a_checkpoint_below_a_root_is_found_again_from_its_golden(weights: Path) -> None:
    golden = api.record(weights)
    assert golden.source == "root:run/net.safetensors"
    assert api.verify(None, golden.path).verdict == "identical"


def test_a_moved_file_is_found_below_the_root_by_its_name_and_weights(weights: Path) -> None:
    golden = api.record(weights)
    moved = weights.parents[1] / "archive" / weights.name
    moved.parent.mkdir()
    shutil.move(weights, moved)
    assert api.verify(None, golden.path).actual.name == str(moved)
    other = weights.parents[1] / "another" / weights.name
    other.parent.mkdir()
    save_file({"w": np.zeros(9, dtype="f4")}, other)
    assert api.verify(None, golden.path).actual.name == str(moved)
    moved.unlink()
    assert api.verify(None, golden.path).verdict == "different"
    other.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        api.verify(None, golden.path)


def test_the_variable_stands_in_place_of_the_setting(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = Path("golden/net.safetensors")
    assert source_of(weights, golden) == "root:run/net.safetensors"
    monkeypatch.setenv(ROOT_VARIABLE, str(weights.parent))
    assert source_of(weights, golden) == "root:net.safetensors"
    monkeypatch.setenv(ROOT_VARIABLE, "")
    assert source_of(weights, golden) == "net.safetensors"


@pytest.mark.parametrize("text", ["[tool.harness]\nroot = 5\n", "[tool.harness]\nroot = [1]\n"])
def test_a_root_that_is_no_folder_is_a_usage_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(UsageError, match=r"\[tool.harness\] root is") as caught:
        roots_of(tmp_path)
    assert "root = " in str(caught.value.hint)


def test_a_broken_pyproject_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool")
    with pytest.raises(UsageError, match="not valid TOML"):
        settings_of(tmp_path)
