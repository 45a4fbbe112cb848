"""GoldenTrainerCallback, on a Trainer that calls it as that of transformers does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness import GoldenMismatch, Policy, record
from harness.errors import CheckpointError, UsageError

HOME = "harness.callbacks.transformers"


class Tied(nn.Module):
    """Its save leaves out what is tied, as safetensors need it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def state(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if k != "head.weight"}

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{}")
        save_file(self.state(), Path(folder) / "model.safetensors")


class Stacked(Tied):
    """Holds stacked what it writes one by one, and is loaded by its class alone."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.arange(8.0).reshape(2, 2, 2))

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        stacked = state.pop("experts")
        return {**state, **{f"experts.{i}": stacked[i].clone() for i in range(2)}}

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> Self:
        assert options == {"local_files_only": True, "trust_remote_code": False}
        state = load_file(Path(folder) / "model.safetensors")
        state["experts"] = torch.stack([state.pop(f"experts.{i}") for i in range(2)])
        model = cls()
        model.load_state_dict({**state, "head.weight": state["embedding.weight"]})
        return model


class PeftModel(nn.Module):
    """Its save holds the adapter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(4, 4), nn.Linear(4, 4)

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        save_file(adapter_of(self), Path(folder) / "adapter_model.safetensors")


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.startswith("adapter")}


@pytest.fixture
def callback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    library, peft = ModuleType("transformers"), ModuleType("peft")
    library.TrainerCallback = type("TrainerCallback", (), {})  # type: ignore[attr-defined]
    library.__spec__ = SimpleNamespace()  # type: ignore[assignment] # it is found
    peft.get_peft_model_state_dict = adapter_of  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", library)
    monkeypatch.setitem(sys.modules, "peft", peft)
    import harness

    yield harness.GoldenTrainerCallback
    sys.modules.pop(HOME, None)


def train(
    callback: Any,
    model: Any,
    folder: Path,
    *,
    alter: Callable[[Path], object] = lambda saved: None,
    steps: int = 1,
    **arguments: Any,
) -> None:
    """Save after each step, as `Trainer._maybe_log_save_evaluate` does."""
    given = SimpleNamespace(output_dir=str(folder), **arguments)
    state, control = SimpleNamespace(is_world_process_zero=True, global_step=0), object()
    callback.on_train_begin(given, state, control, model=model)
    for state.global_step in range(1, steps + 1):
        saved = folder / f"checkpoint-{state.global_step}"
        model.save_pretrained(str(saved))
        alter(saved)
        callback.on_save(given, state, control, model=model, optimizer=None)


def zero(key: str) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        state = load_file(path)
        save_file({**state, key: torch.zeros_like(state[key])}, path)

    return alter


@pytest.mark.parametrize("model", [Tied(), Stacked(), PeftModel()])
def test_healthy_checkpoints_pass(callback: Any, model: nn.Module, tmp_path: Path) -> None:
    verified = callback()
    train(verified, model, tmp_path, steps=3)
    assert [Path(save.path).name for save in verified.saves] == [
        f"checkpoint-{step}" for step in (1, 2, 3)
    ]
    assert all(save.headlines[0].startswith("ok identical") for save in verified.saves)


@pytest.mark.parametrize(
    ("model", "key", "named"),
    [
        (Tied(), "body.weight", "body.weight"),
        (Stacked(), "experts.0", "experts"),
        (PeftModel(), "adapter.bias", "adapter.bias"),
    ],
)
def test_what_the_file_holds_otherwise_stops_the_run(
    callback: Any, model: nn.Module, key: str, named: str, tmp_path: Path
) -> None:
    with pytest.raises(GoldenMismatch, match=rf"(?s)allclose is false \(1\)\n +{named}  float32"):
        train(callback(), model, tmp_path, alter=zero(key))


def test_a_key_that_is_not_written_is_named(callback: Any, tmp_path: Path) -> None:
    def drop(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        del state["body.bias"]
        save_file(state, folder / "model.safetensors")

    with pytest.raises(GoldenMismatch, match=r"(?s)missing.*body\.bias"):
        train(callback(), Tied(), tmp_path, alter=drop)
    ignoring = callback(policy=Policy(exact=True, ignore=("body.bias",)))
    train(ignoring, Tied(), tmp_path / "again", alter=drop)
    assert ignoring.saves[0].error is None


def test_a_file_that_cannot_be_read_stops_the_run(callback: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        train(
            callback(), Tied(), tmp_path, alter=lambda f: (f / "model.safetensors").write_bytes(b"")
        )


def test_it_can_warn_and_look_at_every_other_checkpoint(callback: Any, tmp_path: Path) -> None:
    verified = callback(on_mismatch="warn", every=2)
    with pytest.warns(UserWarning, match=r"(?s)body\.bias.*next: "):
        train(verified, Tied(), tmp_path, alter=zero("body.bias"), steps=4)
    assert [save.global_step for save in verified.saves] == [1, 3]


def test_what_is_frozen_must_be_as_in_the_golden(callback: Any, tmp_path: Path) -> None:
    model = Tied()
    model.save_pretrained(str(tmp_path / "base"))
    golden = record(tmp_path / "base", tmp_path / "golden.safetensors").path
    model.body.requires_grad_(False)
    with torch.no_grad():
        model.embedding.weight += 1  # which is trained
    train(callback(golden), model, tmp_path / "good")
    with torch.no_grad():
        model.body.weight += 1
    with pytest.raises(GoldenMismatch, match=r"body\.weight"):
        train(callback(golden), model, tmp_path / "bad")


@pytest.mark.parametrize("arguments", [{"fsdp": ["full_shard"]}, {"deepspeed": "zero3.json"}])
def test_what_writes_shards_is_refused(
    callback: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="writes shards"):
        train(callback(), Tied(), tmp_path, **arguments)
