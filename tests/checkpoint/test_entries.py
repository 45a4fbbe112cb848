"""Entries of a state dict that are no tensors, and parts of a file that are not compared."""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import harness
from harness import api
from harness.checkpoint import open_checkpoint
from harness.checkpoint.dtypes import DTYPES
from harness.comparison.comparison import render
from harness.errors import CheckpointError, NoSection
from harness.report.table import render_table


def _saved(path: Path, state: object, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


def _texts(path: Path, **options: Any) -> dict[str, str]:
    with open_checkpoint(path, **options) as checkpoint:
        return {
            key: bytes(tensor.array()).decode()
            for key, tensor in checkpoint.tensors.items()
            if tensor.dtype.is_value
        }


def test_values_are_texts_as_python_writes_them(tmp_path: Path) -> None:
    state = {
        "w": torch.ones(1),
        "none": None,
        "true": True,
        "number": 0.5,
        "text": "mel80",
        "bytes": b"ab",
        "list": [1, (2, 3)],
        "dict": {"b": 1, "a": {}},
        "set": {3, 1, 2},
        "big": 1 << 80,
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
    }
    assert _texts(_saved(tmp_path / "w.pt", state)) == {
        "none": "None",
        "true": "True",
        "number": "0.5",
        "text": '"mel80"',
        "bytes": "b'ab'",
        "list": "[1, (2, 3)]",
        "dict": '{"a": {}, "b": 1}',
        "set": "{1, 2, 3}",
        "big": str(1 << 80),
        "size": "(2, 3)",
        "dtype": "torch.float16",
        "device": 'torch.device("cpu")',
    }


def test_the_protocol_of_the_pickle_does_not_matter(tmp_path: Path) -> None:
    state = {
        "w": torch.ones(1),
        "bytes": b"\xff" * 5000,
        "array": bytearray(b"a\xff"),
        "set": {"a", "b", "c"},
        "frozen": frozenset({1, 2}),
        "complex": 1j,
        "numbers": np.arange(5),
        "one": np.int8(3),
    }
    paths = [
        _saved(tmp_path / f"{protocol}.pt", state, pickle_protocol=protocol)
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    ]
    for path in paths[1:]:
        assert harness.diff(paths[0], path).verdict == "identical"


def test_numpy_arrays_are_tensors(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "plain": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype="i2").reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "bits": np.array([True, False]),
        "scalar": np.float16(0.25),
        "empty": np.zeros((0, 3)),
        "text": np.array(["a"]),
    }
    with open_checkpoint(_saved(tmp_path / "w.pt", arrays)) as checkpoint:
        assert checkpoint.tensors.pop("text").dtype is DTYPES["value"]  # type: ignore[attr-defined]
        for key, tensor in checkpoint.tensors.items():
            assert np.array_equal(tensor.array(), arrays[key]), key
            assert tensor.shape == arrays[key].shape


def test_a_composite_without_tensors_is_an_error(tmp_path: Path) -> None:
    class Hollow(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    hollow = torch.Tensor._make_wrapper_subclass(Hollow, (2,), dtype=torch.float32)
    hollow.name_of_it = "hollow"  # type: ignore[attr-defined]
    globals()["Hollow"] = Hollow
    Hollow.__qualname__ = "Hollow"
    path = _saved(tmp_path / "w.pt", {"w": hollow, "b": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"tensor w \(.*Hollow\) has no tensors inside"):
        open_checkpoint(path)


def test_what_cannot_be_read_as_data_is_named_everywhere(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    path = _saved(tmp_path / "w.pt", {"w": torch.ones(1), "loop": endless, "other": {"a": endless}})
    found = harness.diff(path, path)
    assert found.verdict == "identical"
    assert "2 entries not compared: loop (" in render(found)
    with open_checkpoint(path) as checkpoint:
        assert [entry.partition(" ")[0] for entry in checkpoint.unread] == ["loop", "other"]


def test_both_values_are_in_the_report(tmp_path: Path) -> None:
    one = _saved(tmp_path / "one.pt", {"w": torch.ones(1), "mel": "mel80", "hf_token": "abc"})
    other = _saved(tmp_path / "other.pt", {"w": torch.ones(1), "mel": "mel128", "hf_token": "xyz"})
    golden = tmp_path / "golden.safetensors"
    harness.record(one, golden)
    found = harness.verify(other, golden)
    assert [(f.kind, f.key) for f in found.findings] == [("value", "mel"), ("value", "hf_token")]
    assert (found.findings[0].expected, found.findings[0].actual) == ('"mel80"', '"mel128"')
    assert "abc" not in render(found)
    assert "xyz" not in str(found)
    assert b"mel80" in golden.read_bytes()
    assert b"abc" not in golden.read_bytes()


def test_a_live_module_has_the_values_of_its_file(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        steps = 3

        def get_extra_state(self) -> Any:
            return {"steps": self.steps, "amax": torch.ones(2), "names": {"a", "b"}}

        def set_extra_state(self, state: Any) -> None: ...

    module = Counting(2, 2)
    path = _saved(tmp_path / "w.pt", module.state_dict())
    golden = tmp_path / "golden.safetensors"
    harness.record(path, golden)
    assert harness.verify(module, golden).verdict == "identical"
    assert harness.fingerprint(module).root == harness.fingerprint(path).root
    module.steps = 4
    [finding] = harness.verify(module, golden).findings
    assert (finding.kind, finding.key) == ("value", '_extra_state["steps"]')


@pytest.mark.parametrize(
    ("main", "copy"),
    [("model", "ema"), ("params", "params_ema"), ("model", "model_avg"), ("net", "net_g")],
)
def test_a_second_copy_of_the_weights_is_named(tmp_path: Path, main: str, copy: str) -> None:
    weights = {"w": torch.ones(2)}
    one = _saved(tmp_path / "one.pt", {main: weights, copy: weights, "epoch": 1})
    other = _saved(tmp_path / "other.pt", {main: weights, copy: {"w": torch.zeros(2)}, "epoch": 1})
    found = harness.diff(one, other)
    assert found.verdict == "identical"
    assert f"1 identical (section {main}; not compared: {copy}, value epoch)" in render(found)
    assert found.actual.others == ((copy, 1), ("epoch", 0))


def test_values_beside_the_weights_are_named(tmp_path: Path) -> None:
    beside = {
        "step": 1,
        "scheduler": {"lr": 0.1},
        "none": None,
        "empty": {},
        "pytorch-lightning_version": "2",
    }
    state: dict[str, Any] = {"state_dict": {"w": torch.ones(2)}, **beside}
    found = harness.diff(
        _saved(tmp_path / "one.pt", state), _saved(tmp_path / "two.pt", {**state, "step": 2})
    )
    assert found.verdict == "identical"
    assert "(section state_dict; not compared: values step, scheduler)" in render(found)
    shown = render_table(harness.fingerprint(tmp_path / "one.pt"))
    assert "not shown  values: step, scheduler: --all-sections" in shown
    whole = api.diff(tmp_path / "one.pt", tmp_path / "two.pt", section=".")
    assert [f.key for f in whole.findings] == ["step"]


@pytest.mark.parametrize("name", ["weight", "generator"])
def test_weights_under_an_unknown_name_are_opened_there(tmp_path: Path, name: str) -> None:
    state = {name: {"w": torch.ones(2)}, "epoch": 1, "optim": {"state": {0: {"m": torch.ones(1)}}}}
    state["optim"]["param_groups"] = []
    with open_checkpoint(_saved(tmp_path / "w.pt", state)) as checkpoint:
        assert (checkpoint.section, list(checkpoint.tensors)) == (name, ["w"])
        assert checkpoint.others == (("epoch", 0), ("optim", 1))
    both = {"generator": {"w": torch.ones(2)}, "discriminator": {"w": torch.ones(2)}}
    with pytest.raises(NoSection, match="no state dict found"):
        open_checkpoint(_saved(tmp_path / "two.pt", both))


@pytest.mark.parametrize(
    "entry",
    [
        {"api_key": "s3cr3t"},
        {"config": {"user": "me", "wandb_token": "s3cr3t", "size": 3}},
        {"url": "https://me:s3cr3t@example.org"},
        {"arguments": ["--lr=1", "--password=s3cr3t"]},
        {"folder": str(PurePosixPath("/", "home", "s3cr3t", "data"))},
    ],
)
def test_no_secret_stands_in_the_golden(tmp_path: Path, entry: dict[str, Any]) -> None:
    golden = tmp_path / "golden.safetensors"
    path = _saved(tmp_path / "w.pt", {"w": torch.ones(1), **entry, "mel": "mel80"})
    harness.record(path, golden)
    assert b"s3cr3t" not in golden.read_bytes()
    assert b"mel80" in golden.read_bytes()
    assert harness.verify(path, golden).verdict == "identical"
