"""Which tensors of a file are meant, and what their keys are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3

from harness.checkpoint import open_checkpoint
from harness.errors import CheckpointError
from tests.checkpoint.conftest import Assert


def lightning() -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "epoch": 1,
        "pytorch-lightning_version": "2.5",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"lr": 0.1, "layers": [1, 2], "shape": (1, 2)},
        "loops": None,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(lightning(), tmp_path / "l.ckpt")
    return tmp_path / "l.ckpt"


def test_the_state_dict_is_found(path: Path, assert_reads: Assert) -> None:
    checkpoint = assert_reads(path, torch.load(path)["state_dict"])
    assert checkpoint.section == "state_dict"
    assert checkpoint.container == "Lightning checkpoint"
    assert checkpoint.config == {"lr": 0.1, "layers": [1, 2], "shape": [1, 2]}


def test_a_section_of_the_optimizer_reads(path: Path, assert_reads: Assert) -> None:
    state = torch.load(path)["optimizer_states"][0]["state"]
    expected = {
        f'state[{index}]["{name}"]': value
        for index, values in state.items()
        for name, value in values.items()
    }
    assert_reads(path, expected, section="optimizer_states.0")  # type: ignore[call-arg]


def test_a_dot_is_every_tensor(path: Path) -> None:
    with open_checkpoint(path, section=".") as checkpoint:
        keys = [key for key, tensor in checkpoint.tensors.items() if not tensor.dtype.is_value]
        values = checkpoint.tensors.keys() - set(keys)
    assert keys[:2] == ['state_dict["weight"]', 'state_dict["bias"]']
    assert 'optimizer_states[0]["state"][1]["exp_avg_sq"]' in keys
    assert len(keys) == 8
    assert {"epoch", 'optimizer_states[0]["param_groups"]'} <= values


def test_an_unknown_section_names_the_candidates(path: Path) -> None:
    with pytest.raises(CheckpointError, match="optimizer") as caught:
        open_checkpoint(path, section="optimizer")
    assert "state_dict (2 tensors)" in str(caught.value.hint)
    assert "optimizer_states (6 tensors)" in str(caught.value.hint)


def test_a_section_without_tensors_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint(path, section="hyper_parameters")


def test_keys_with_dots_newlines_and_brackets_are_all_there(tmp_path: Path) -> None:
    names = ["a.b", "a\nb", "a[0]", 'q"q', "", " ", "ключ", 7, -1, 2.5, True, None, (1, "x"), b"y"]
    torch.save({"model": {name: torch.tensor(1.0) for name in names}}, tmp_path / "w.pt")
    with open_checkpoint(tmp_path / "w.pt") as checkpoint:
        assert list(checkpoint.tensors) == [
            "a.b", "a\nb", '["a[0]"]', 'q"q', '[""]', " ", "ключ",
            "[7]", "[-1]", "[2.5]", "[True]", "[None]", "[(1, 'x')]", "[b'y']",
        ]  # fmt: skip


def test_keys_that_are_no_plain_values_are_told_apart(tmp_path: Path, assert_reads: Assert) -> None:
    long = frozenset({"s" * 300})
    value = {
        key: torch.full((n,), 1.0)
        for n, key in enumerate([np.int64(7), 1 + 2j, torch.device("cpu"), long], 1)
    }
    torch.save({"w": torch.ones(1), "bank": value}, tmp_path / "w.pt")
    digest = blake3(('{"' + "s" * 300 + '"}').encode()).hexdigest()[:16]
    steps = ["7", "builtins.complex(1.0, 2.0)", 'torch.device("cpu")', f'{{"{"s" * 198}… {digest}']
    expected = {f"bank[{step}]": child for step, child in zip(steps, value.values(), strict=True)}
    assert_reads(tmp_path / "w.pt", {"w": torch.ones(1), **expected})


def test_an_object_inside_of_itself_is_entered_once(tmp_path: Path) -> None:
    value: dict[str, Any] = {"w": torch.ones(1)}
    value["self"] = value
    torch.save(value, tmp_path / "w.pt")
    with open_checkpoint(tmp_path / "w.pt") as checkpoint:
        assert list(checkpoint.tensors) == ["w"]


def test_one_tensor_alone_is_a_checkpoint(tmp_path: Path, assert_reads: Assert) -> None:
    torch.save(torch.ones(2), tmp_path / "w.pt")
    assert_reads(tmp_path / "w.pt", {"tensor": torch.ones(2)})
