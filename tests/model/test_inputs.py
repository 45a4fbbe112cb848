"""The example inputs of a model, as a file that another implementation is run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness import api
from harness.errors import ModelError, UsageError
from tests.conftest import Harness

HERE = __name__


class Scaled(nn.Linear):
    """Takes its first argument by position, one that is no tensor, and one tensor twice."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, train: bool = False) -> Tensor:
        return super().forward(x if mask is None else x * mask)

    def golden_inputs(self) -> Any:
        x = torch.ones(2, 4).t().contiguous().t()
        return {"x": x, "mask": x, "train": False}


class ByPosition(Scaled):
    def golden_inputs(self) -> Any:
        return torch.ones(2, 4), torch.zeros(4)


class Trains(Scaled):
    def golden_inputs(self) -> Any:
        return {"x": torch.ones(2, 4), "train": True}


@pytest.mark.parametrize("name", ["Scaled", "ByPosition"])
def test_inputs_are_named_by_forward_and_run_the_model(
    harness: Harness, tmp_path: Path, name: str
) -> None:
    file, target = tmp_path / "inputs.safetensors", f"{HERE}:{name}"
    run = harness("inputs", target, "-o", file)
    assert run.code == 0
    assert run.out.startswith(f"wrote {file}: ")
    assert set(load_file(file)) == {"x", "mask"}
    torch.save(Scaled().state_dict(), tmp_path / "scaled.pt")
    file, golden = tmp_path / "scaled.pt", ("-g", tmp_path / "golden.safetensors")
    next_step = run.out.split("next: harness record CKPT ")[1].split()
    assert harness("record", file, *golden, *next_step).code == 0
    assert harness("verify", file, *golden, "--model", target, "--outputs").code == 0


def test_a_checkpoint_s_model_is_asked_and_a_file_is_not_replaced_unasked(
    tmp_path: Path, data: Path
) -> None:
    file = tmp_path / "inputs.safetensors"
    shapes = api.write_inputs(data / "nest_tiny.nemo", file)
    assert shapes["noisy_input_signal"] == (2, 25440)
    before = file.read_bytes()
    with pytest.raises(UsageError, match="already exists"):
        api.write_inputs(f"{HERE}:Scaled", file)
    assert file.read_bytes() == before
    api.write_inputs(f"{HERE}:Scaled", file, overwrite=True)
    assert set(load_file(file)) == {"x", "mask"}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (f"{HERE}:Trains", "its example input train is a bool"),
        ("torch.nn:ReLU", "no example inputs"),
        ("torch.nn:Linear", "cannot be called with no arguments"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path: Path, target: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        api.write_inputs(target, tmp_path / "inputs.safetensors")
    assert not list(tmp_path.iterdir())
