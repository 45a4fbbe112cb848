"""Non-persistent buffers of a live module: recorded, compared, and said to be such."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import harness
from harness import api
from harness.comparison.comparison import render

_WHAT = "non-persistent buffer: in no file, built by the model's code"


class Rotary(nn.Module):
    """A layer whose frequencies are in no file, as those of many language models."""

    inv_freq: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2)
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.1]), persistent=False)


@pytest.fixture
def module() -> Rotary:
    torch.manual_seed(0)
    return Rotary()


@pytest.fixture
def golden(tmp_path: Path, module: Rotary) -> Path:
    harness.record(module, tmp_path / "golden.safetensors")
    return tmp_path / "golden.safetensors"


def test_a_buffer_that_was_never_initialised_is_found(module: Rotary, golden: Path) -> None:
    assert harness.verify(module, golden).num_identical == 3
    module.inv_freq.zero_()
    found = harness.verify(module, golden)
    [finding] = found.findings
    assert (finding.kind, finding.key) == ("different", "inv_freq")
    assert finding.expected == f"float32 [2], {_WHAT}"
    assert _WHAT in render(found)
    assert found.verdict == "different"


@pytest.mark.parametrize(("name", "kind"), [("inv_freq", "missing"), ("other", "unexpected")])
def test_a_buffer_may_be_missing_or_new(module: Rotary, golden: Path, name: str, kind: str) -> None:
    if kind == "missing":
        del module.inv_freq
    else:
        module.register_buffer(name, torch.ones(3), persistent=False)
    [finding] = harness.verify(module, golden).findings
    assert (finding.kind, finding.key) == (kind, name)
    assert str(finding.expected or finding.actual).endswith(_WHAT)


def test_a_golden_of_a_file_has_none_and_the_report_says_so(
    tmp_path: Path, module: Rotary, golden: Path
) -> None:
    torch.save(module.state_dict(), tmp_path / "w.pt")
    of_file = harness.record(tmp_path / "w.pt", tmp_path / "file.safetensors").path
    found = harness.verify(module, of_file)
    assert found.verdict == "identical"
    assert found.notes[0].startswith("1 non-persistent buffer is not compared")
    of_module = harness.verify(tmp_path / "w.pt", golden)
    assert (of_module.verdict, of_module.num_identical) == ("identical", 2)
    assert harness.fingerprint(module).root == harness.fingerprint(tmp_path / "w.pt").root


def test_an_update_takes_the_buffers_over(module: Rotary, golden: Path) -> None:
    module.inv_freq.zero_()
    api.update(module, golden, reason="frequencies")
    assert harness.verify(module, golden).verdict == "identical"
    assert len(api.read_golden(golden).history) == 1
    assert api.update(module, golden).history == api.read_golden(golden).history


@pytest.mark.parametrize("order", [("head", "all"), ("all", "head")])
def test_two_storages_may_begin_at_one_place(order: tuple[str, str]) -> None:
    """As a numpy array and its head do: which is first must not matter."""
    array = np.arange(1000, dtype="f4")
    tensors = {"head": torch.from_numpy(array[:10]), "all": torch.from_numpy(array)}
    found = harness.fingerprint({key: tensors[key] for key in order})
    expected = harness.fingerprint({key: tensor.clone() for key, tensor in tensors.items()})
    assert found.root == expected.root
