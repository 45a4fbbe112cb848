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


def flat(model: torch.nn.Module) -> dict[str, Any]:
    """The state of an optimizer as torch flattens it."""
    named = [(f"{name}.{leaf}", torch.ones(2)) for name in model.state_dict() for leaf in ("step",)]
    return {
        **{f"state.{key}": value for key, value in named},
        **{f"param_groups.{key.rpartition('.')[0]}.betas": (0.9, 0.99) for key, _ in named},
    }


@pytest.mark.parametrize(
    ("beside", "others"),
    [
        (lambda model: {"optimizer": flat(model), "lr_scheduler": {"last": 3}}, {"optimizer": 2}),
        (flat, {"state": 2}),
        (
            lambda model: {f"chained_0.optimizer.{key}": v for key, v in flat(model).items()},
            {"chained_0.optimizer": 2},
        ),
        (
            lambda model: {f"optimizer.state.exp_avg.{key}": torch.ones(2) for key in ("a", "b")},
            {"optimizer": 2},
        ),
    ],
)
def test_a_training_that_lies_beside_the_weights_is_no_part_of_them(
    tmp_path: Path, assert_reads: Assert, beside: Any, others: dict[str, int]
) -> None:
    model = torch.nn.Linear(3, 2)
    torch.save({**model.state_dict(), **beside(model)}, tmp_path / "w.pt")
    checkpoint = assert_reads(tmp_path / "w.pt", dict(model.state_dict()))
    assert dict(checkpoint.others) == others
    for name, count in others.items():
        with open_checkpoint(tmp_path / "w.pt", section=name) as other:
            assert sum(not tensor.dtype.is_value for tensor in other.tensors.values()) == count


@pytest.mark.parametrize("name", ["optimizer.weight", "state.head.weight", "scheduler.state"])
def test_a_module_by_the_name_of_a_training_keeps_its_weights(tmp_path: Path, name: str) -> None:
    torch.save({"head.weight": torch.ones(2), name: torch.ones(3)}, tmp_path / "w.pt")
    with open_checkpoint(tmp_path / "w.pt") as checkpoint:
        assert list(checkpoint.tensors) == ["head.weight", name]


def test_of_flat_keys_a_section_is_what_begins_so(tmp_path: Path) -> None:
    torch.save({"model.a": torch.ones(2), "ema.a": torch.zeros(2)}, tmp_path / "w.pt")
    with open_checkpoint(tmp_path / "w.pt", section="ema") as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


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
